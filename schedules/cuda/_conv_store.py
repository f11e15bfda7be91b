"""From the sums of a warp to C, straight from registers."""

from __future__ import annotations

from math import gcd
from typing import Any

from ...workload import INT8_LIMITS
from ._conv_block import Block, u32
from ._ir import T, address, call, do, i32, local, tirx

__all__ = ["Stores"]


class Stores(Block):
    def store(self) -> None:
        """From the sums to C: per run of filters, 4 at a time for all rows of the thread."""
        p, work = self.p, self.work
        codes = work.out in INT8_LIMITS
        run = p.run(codes)
        part = gcd(run, self.own)  # filters that are stored together: all of them exist, or none
        rows = [(i, half) for i in range(p.wm // 16) for half in range(2)]
        row = T.Bind(self.warp_m * p.wm + tirx.floordiv(self.lane, i32(4)))
        begin = self.panel * p.bn + self.warp_n * p.wn + tirx.floormod(self.lane, i32(4)) * run
        begin = T.Bind(begin)
        base = T.Bind(self.first * work.filters + self._cast(self.group) * self.own)
        for u in range(p.wn // 4 // run):
            filter0 = T.Bind(begin + u * 4 * run)
            there = [filter0 + q < self.own for q in range(0, run, part)]
            places = [
                T.Bind(base + self._cast((row + i * 16 + half * 8) * work.filters + filter0))
                for i, half in rows
            ]
            exist = [T.Bind(row + i * 16 + half * 8 < self.left) for i, half in rows]
            words = [local(run // 4 if codes else run, "uint32") for _ in rows]
            if self.r is not None:
                for held, place, ok in zip(words, places, exist, strict=True):
                    self._load_residual(held, place, ok, there, part)
            slot = T.Bind((self.group * self.lay.panels) * p.bn + filter0)
            for q in range(0, run, 4):
                filters = self.end.filters(slot + q, 4)
                for (i, half), held in zip(rows, words, strict=True):
                    values = []
                    for e in range(4):
                        tile = u * (run // 2) + (q + e) // 2
                        acc = self.acc[(i * (p.wn // 8) + tile) * 4 + half * 2 + e % 2]
                        r = None if self.r is None else self.end.residual(held[q // 4], e)
                        values.append(self.end.value(acc, filters[e], r))
                    if codes:
                        T.buffer_store(held, self.end.words(values)[0], [q // 4])
                        continue
                    for e, value in enumerate(values):
                        if work.out == "f32":
                            value = call("uint32", "as_uint", value)
                        T.buffer_store(held, tirx.Cast("uint32", value), [q + e])
            for held, place, ok in zip(words, places, exist, strict=True):
                for q, inside in zip(range(0, run, part), there, strict=True):
                    with T.If(self._both(ok, inside)), T.Then():
                        self._store_part(held, place + q, q, part)

    def _both(self, row: Any, column: Any) -> Any:
        whole = self.own % self.p.bn == 0
        return row if whole else tirx.And(row, column)

    def _load_residual(self, held: Any, place: Any, ok: Any, there: list[Any], part: int) -> None:
        assert self.r is not None
        count = int(held.shape[0])
        for q in range(count):
            T.buffer_store(held, u32(0), [q])
        for q, inside in zip(range(0, 4 * count, part), there, strict=True):
            with T.If(self._both(ok, inside)), T.Then():
                if part == 4:
                    value = call("uint32", "load4", address(self.r, place + q))
                    T.buffer_store(held, value, [q // 4])
                elif part > 4:
                    do(f"load{part}", address(held, q // 4), address(self.r, place + q))
                else:
                    for e in range(q, q + part):
                        byte = tirx.Cast("uint32", tirx.Cast("uint8", self.r[place + e]))
                        T.buffer_store(held, held[e // 4] | (byte << (e % 4 * 8)), [e // 4])

    def _store_part(self, held: Any, place: Any, q: int, part: int) -> None:
        """Stores filters q .. q + part - 1 of a run at `place`."""
        size = 1 if self.work.out in INT8_LIMITS else 4
        if part * size == 4:
            do("store4", address(self.c, place), held[q * size // 4])
        elif part * size > 4:
            do(f"store{part * size}", address(self.c, place), address(held, q * size // 4))
        else:
            for e in range(part):
                byte = held[(q + e) // 4] >> ((q + e) % 4 * 8)
                T.buffer_store(self.c, tirx.Cast(self.c.dtype, byte), [place + e])
