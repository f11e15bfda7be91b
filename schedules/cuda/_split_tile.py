"""One tile of a product of f32 and f16 on the tensor cores, which know 11 significant bits.

    A = high + low, 11 bits each: two mma.m16n8k8.tf32 for each tile of a warp.  B: f16 are exact
    shared memory, `stages` times: A (bk / 16, bm, 16) f32 | W's tile as packed, f16

The split leaves at most 2**-23 |a| of each a, one unit in its last place; products are exact.
Tensor cores cut sums off instead of rounding them, which over a long k adds up (modelled: 1e-4 of a
sum of 4096 products of one sign), so the sums of bk products are added by f32 additions: then 1e-6.

Lane 4g + t has rows g and g + 8, the 4 k from 4t of every 16: one 16-byte load a row, a quarter of
a warp reads 128 bytes in a row. W is packed in the same order of k.

An infinite or NaN weight must not meet a low of 0, or one of the other sign: where W's flag says
that there are some, the low halves meet 0 in their place. That is another loop, of the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ._float_layout import Layout
from ._float_loops import Output, as_word, copies, each, quad
from ._float_tile import Source
from ._ir import T, address, barrier, call, ceil_div, do, i32, i64, local, shared, tirx

__all__ = ["SplitBlock", "split_tile"]

_SHARED = 48 << 10
_EXPONENT = 0x7F800000  # all of it: infinity or NaN


@dataclass(frozen=True)
class SplitBlock:
    """A block of threads and its part of C."""

    wm: int = 2  # warps along m
    wn: int = 2  # warps along n
    fm: int = 2  # 16 rows each, of a warp
    fn: int = 4  # 16 columns each, of a warp
    bk: int = 16  # k in shared memory
    stages: int = 3  # how often shared memory holds bk of k

    @property
    def bm(self) -> int:
        return 16 * self.wm * self.fm

    @property
    def bn(self) -> int:
        return 16 * self.wn * self.fn

    @property
    def threads(self) -> int:
        return 32 * self.wm * self.wn

    @property
    def stage(self) -> tuple[int, int]:
        """Words of A and of W."""
        return self.bm * self.bk, self.bn * self.bk // 2

    @property
    def tall(self) -> SplitBlock:
        """The highest block that reads the same tiles of W."""
        heights = [(4, 2), (2, 2), (2, 1)] if self.fn > 1 else [(2, 4), (2, 2), (2, 1)]
        blocks = (replace(self, wm=wm, fm=fm, stages=2) for wm, fm in heights)
        return next((b for b in blocks if b.fits and b.bm > self.bm), self)

    @property
    def registers(self) -> int:
        """Sums, those of bk, 16 k of A, 8 of them split, those of W, addresses."""
        return 16 * self.fm * self.fn + 16 * self.fm + 4 * self.fn + 36

    @property
    def fits(self) -> bool:
        resident = self.threads * self.registers <= 65536 and self.registers <= 255
        return resident and 4 * sum(self.stage) * self.stages <= _SHARED


def split_tile(
    block: SplitBlock,
    lay: Layout,
    source: Source,
    out: Output,
    at: tuple[Any, Any],
    thread: Any,
    rows: Any,
) -> None:
    """C's tile at = (along m, along n), of `rows` rows; emitted within `pragmas`."""
    _Tile(block, lay, source, out, thread).run(
        T.Bind(tirx.Cast("int64", at[0]) * block.bm), at[1], rows
    )


class _Tile:
    def __init__(
        self, block: SplitBlock, lay: Layout, source: Source, out: Output, thread: Any
    ) -> None:
        self.block, self.lay, self.source, self.out = block, lay, source, out
        self.thread = thread
        self.a = shared(block.stages * block.stage[0], "float32")
        self.b = shared(block.stages * block.stage[1], "uint32")
        self.acc = local(8 * block.fm * block.fn, "float32")
        warp, lane = thread // 32, thread % 32
        self.lane = lane
        self.row = T.Bind(warp // block.wn * (16 * block.fm) + lane // 4)
        self.blocks = T.Bind(warp % block.wn * block.fn)  # of 16 columns, before this warp's

    def run(self, first: Any, n_tile: Any, rows: Any) -> None:
        block, lay = self.block, self.lay
        units = block.bk // self.source.width
        per = block.threads // units

        def row_of(index: Any) -> Any:
            return first + self.thread // units + index * per

        self.source.prepare(ceil_div(block.bm, per), row_of)
        self.weights = T.Bind(tirx.Cast("int64", n_tile) * (lay.k_tiles * lay.tile))
        flag = call("uint32", "load4", address(self.out.w, i64(lay.flag)))
        infinite = T.Bind(tirx.Cast("int32", flag))
        with each(8 * block.fm * block.fn) as i:
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        for stage in range(block.stages - 1):
            if stage < lay.k_tiles:
                self._fetch(i32(stage), i32(stage), row_of)
            do("commit")
        ahead = block.stages - 1
        with T.serial(0, lay.k_tiles) as k:
            do(f"wait{block.stages - 2}")
            barrier()
            with T.If(k + ahead < lay.k_tiles), T.Then():
                self._fetch(k + ahead, (k + ahead) % block.stages, row_of)
            do("commit")
            with T.If(tirx.EQ(infinite, 0)):
                with T.Then():
                    self._multiply(k % block.stages, False)
                with T.Else():
                    self._multiply(k % block.stages, True)
        self._store(first, n_tile, rows)

    def _fetch(self, k: Any, stage: Any, row_of: Callable[[Any], Any]) -> None:
        block, lay, width = self.block, self.lay, self.source.width
        units = block.bk // width
        to_a, to_b = (T.Bind(stage * size) for size in block.stage)

        def of_a(index: Any, e: Any) -> None:
            inner = T.Bind(e % units * width)
            place, count = self.source.piece(index, row_of(index), k * block.bk + inner)
            to = to_a + inner // 16 * (16 * block.bm) + e // units * 16 + inner % 16
            do(f"copy{4 * width}", address(self.a, to), place, count)

        copies(block.bm * units, block.threads, self.thread, of_a)
        start = T.Bind(self.weights + tirx.Cast("int64", k) * lay.tile)

        def of_b(_: Any, e: Any) -> None:
            do("copy16", address(self.b, to_b + e * 4), address(self.out.w, start + e * 16), 16)

        copies(lay.tile // 16, block.threads, self.thread, of_b)

    def _multiply(self, stage: Any, infinite: bool) -> None:
        """The products of bk of k, summed by themselves, then added to the sums."""
        block, fm, fn = self.block, self.block.fm, self.block.fn
        a, words = local(8 * fm, "float32"), local(4 * fm, "uint32")
        high, low = local(4 * fm, "uint32"), local(4 * fm, "uint32")
        w, b, finite = local(4 * fn, "uint32"), local(4, "uint32"), local(4, "uint32")
        sums = local(8 * fm * fn, "float32")
        from_a = T.Bind(stage * block.stage[0] + self.row * 16 + self.lane % 4 * 4)
        from_b = T.Bind(stage * block.stage[1] + self.blocks * 128 + self.lane * 4)
        first = "mma_tf32_first"
        for s in range(block.bk // 16):
            with each(fm) as i, each(2) as half:
                where = from_a + (s * block.bm + i * 16 + half * 8) * 16
                T.buffer_store(a, self.a[quad(where)], [quad(i * 8 + half * 4)])
            with each(fn) as j:
                where = from_b + (s * (block.bn // 16) + j) * 128
                T.buffer_store(w, self.b[quad(where)], [quad(j * 4)])
            for step in range(2):
                with each(fm) as i:
                    with each(4) as r:  # register r: row r % 2, k r / 2
                        value = as_word(a[i * 8 + r % 2 * 4 + step * 2 + r // 2])
                        T.buffer_store(words, value, [i * 4 + r])
                    do("split_tf32", *(address(part, i * 4) for part in (high, low, words)))
                with each(fn) as j:
                    with each(2) as c:
                        self._widen(w[j * 4 + c * 2 + step], b, c * 2, finite if infinite else None)
                    parts = (first, low, finite if infinite else b), ("mma_tf32", high, b)
                    for name, part, weight in parts:
                        with each(2) as c, each(fm) as i:
                            place = address(sums, ((i * fn + j) * 2 + c) * 4)
                            do(name, place, address(part, i * 4), address(weight, c * 2))
                first = "mma_tf32"
        with each(8 * fm * fn) as i:
            T.buffer_store(self.acc, self.acc[i] + sums[i], [i])

    def _widen(self, word: Any, b: Any, at: Any, finite: Any) -> None:
        """Two f16 of a word as f32; in `finite` those that are neither infinite nor NaN, or 0."""
        with each(2) as h:
            bits = word >> tirx.Cast("uint32", h * 16) & tirx.const(0xFFFF, "uint32")
            T.buffer_store(b, as_word(call("float32", "half_to_float", bits)), [at + h])
            if finite is not None:
                inside = (tirx.Cast("int32", b[at + h]) & _EXPONENT) < _EXPONENT
                kept = tirx.Select(inside, b[at + h], tirx.const(0, "uint32"))
                T.buffer_store(finite, kept, [at + h])

    def _store(self, first: Any, n_tile: Any, rows: Any) -> None:
        """A lane has columns 2t, 2t + 1 of every 8, of rows g and g + 8 of every 16."""
        block = self.block
        column = T.Bind(n_tile * block.bn + self.blocks * 16 + self.lane % 4 * 2)
        factors = self.out.factors(2 * block.fn, 2, lambda j: column + j * 8)
        with each(block.fm) as i, each(2) as half:
            row = T.Bind(first + self.row + i * 16 + half * 8)
            with T.If(row < rows), T.Then(), each(2 * block.fn) as j:
                here = (i * (2 * block.fn) + j) * 4 + half * 2
                self.out.store(
                    row, column + j * 8, 2, lambda c, h=here: self.acc[h + c], factors, j * 2
                )
