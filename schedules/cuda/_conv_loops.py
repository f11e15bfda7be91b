"""The code of one block of an integer convolution by tensor cores: a tile of C.

    stages of A and B on their way to shared memory
    for step along K:                            one barrier a step
        wait for its stage; start the copies of a later one into the stage before it
        for k of 32 bytes: fragments by ldmatrix, mma for every 16x8 of the warp's tile
    sums of warps that shared K are added; scale, round, pack, store: straight from registers

A in shared memory: rows of `depth` bytes, their 16-byte chunks exchanged so that the 8 rows of
which ldmatrix reads a chunk lie in different banks. B: packed by 8 filters x 16 bytes, the 128
bytes that ldmatrix reads at once.

Filters are dealt to the columns of fragments so that a thread, which has 2 of every 8 columns, ends
up with up to 16 neighbours: it stores them, and reads the residual, in one piece.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ...workload import NUMPY
from ._conv_copies import Copies
from ._conv_epilogue import ConvEpilogue
from ._conv_store import Stores
from ._ir import T, address, barrier, do, i32, launch, local, prim_func, tirx

__all__ = ["Builder"]

STATIC = 48 << 10  # bytes of shared memory that need no asking for


class Builder(Copies, Stores):
    """One PrimFunc for a workload and parameters."""

    # ---- function ----
    def function(self) -> Any:
        work, p, lay = self.work, self.p, self.lay
        with prim_func(self.name) as builder:
            batch = tirx.Var("batch", "int64") if work.batch is None else self.at(work.batch)
            ends = [self.at(v) for v in (*work.outputs, work.filters)]
            sizes = [self.at(v) for v in (*work.size, work.channels)]
            a = T.arg("a", T.buffer((batch, *sizes), "uint8"))
            self.w = T.arg("w", T.buffer((lay.nbytes,), "uint8"))
            r = None
            if work.residual:
                r = T.arg("r", T.buffer((batch, *ends), NUMPY[work.residual.dtype]))
            c = T.arg("c", T.buffer((batch, *ends), NUMPY[work.out]))
            total = batch * prod((*work.outputs, work.filters))
            self.rows = batch * self.shape.pixels
            tiles = tirx.floordiv(self.rows + (p.bm - 1), self.at(p.bm)) * lay.panels
            with launch((tiles, i32(work.groups)), (i32(p.threads),)) as (tile, group, thread):
                self.a = T.decl_buffer((batch * self.shape.image,), "uint8", data=a.data)
                self.c = T.decl_buffer((total,), c.dtype, data=c.data)
                self.r = None
                if r is not None:
                    self.r = T.decl_buffer((total,), r.dtype, data=r.data)
                self._block(tile, group, thread)
        return builder.get().with_attr("dcc.kernel", self.name)

    def _block(self, tile: Any, group: Any, thread: Any) -> None:
        p, lay = self.p, self.lay
        self.group, self.thread = group, thread
        self.panel = T.Bind(tirx.Cast("int32", tirx.floormod(tile, self.at(lay.panels))))
        self.first = T.Bind(tirx.floordiv(tile, self.at(lay.panels)) * p.bm)  # row of the tile
        left = self.rows - self.first
        self.left = T.Bind(tirx.Cast("int32", tirx.min(left, self.at(p.bm))))
        self.lane = T.Bind(tirx.floormod(thread, i32(32)))
        warp = T.Bind(tirx.floordiv(thread, i32(32)))
        self.warp_m = T.Bind(tirx.floormod(warp, i32(p.m)))
        self.warp_n = T.Bind(tirx.floormod(tirx.floordiv(warp, i32(p.m)), i32(p.n)))
        self.warp_k = T.Bind(tirx.floordiv(warp, i32(p.m * p.n)))
        self.end = ConvEpilogue(self.work, lay.constants, self.w)
        self.filling = self.work.padded and any(self.shape.padded)
        self.end.prepare(fill=self.filling)
        words = p.shared // 4
        if p.shared <= STATIC:
            self.memory = T.alloc_buffer((words,), "int32", scope="shared")
        else:
            self.memory = T.alloc_buffer((words,), "int32", scope="shared.dyn")
        self.prepare_copies()
        self._prepare_fragments()
        self.acc = local(p.wm * p.wn // 32, "int32")
        for i in range(p.wm * p.wn // 32):
            T.buffer_store(self.acc, i32(0), [i])
        ahead = p.stages - 1
        for step in range(min(ahead, self.steps)):
            self.copy(i32(step), i32(step))
        for _ in range(ahead - min(ahead, self.steps)):
            do("commit")
        with T.serial(0, i32(self.steps)) as step:
            do(f"wait{ahead - 1}")
            barrier()
            later = T.Bind(step + ahead)
            with T.If(later < self.steps):
                with T.Then():
                    self.copy(later, tirx.floormod(later, i32(p.stages)), commit=False)
            do("commit")
            self._multiply(T.Bind(tirx.floormod(step, i32(p.stages)) * (lay.stage // 4)))
        if p.k > 1:
            self._add_up()
            with T.If(tirx.EQ(self.warp_k, i32(0))), T.Then():
                self.store()
        else:
            self.store()

    # ---- tensor cores ----
    def _prepare_fragments(self) -> None:
        """Where a lane's addresses for ldmatrix are in a stage, in words."""
        p = self.p
        row = T.Bind(self.warp_m * p.wm + tirx.floormod(self.lane, i32(16)))
        half = T.Bind(tirx.floordiv(self.lane, i32(16)))
        self.a_at, self.b_at = [], []
        for k in range(p.each):
            chunk = T.Bind((self.warp_k * p.each + k) * 2 + half)
            self.a_at.append(T.Bind(row * (p.depth // 4) + self.swizzled(chunk, row) * 4))
            b = (self.warp_k * p.each + k) * (p.bn * 8) + self.warp_n * (p.wn * 8) + self.lane * 4
            self.b_at.append(T.Bind(p.bm * p.depth // 4 + b))

    def _multiply(self, stage: Any) -> None:
        """All k of a stage that are this warp's; fragments are loaded one k ahead."""
        p = self.p
        tiles_m, tiles_n = p.wm // 16, p.wn // 8
        held = [(local(4 * tiles_m, "uint32"), local(2 * tiles_n, "uint32")) for _ in range(2)]

        def load(k: int) -> None:
            a, b = held[k % 2]
            for i in range(tiles_m):
                place = stage + self.a_at[k] + i * 16 * p.depth // 4
                do("ldmatrix4", address(a, 4 * i), address(self.memory, place))
            for j in range(0, tiles_n, 2):
                do(
                    "ldmatrix4",
                    address(b, 2 * j),
                    address(self.memory, stage + self.b_at[k] + j * 64),
                )

        load(0)
        for k in range(p.each):
            if k + 1 < p.each:
                load(k + 1)
            a, b = held[k % 2]
            for i in range(tiles_m):
                for j in range(tiles_n):
                    place = address(self.acc, 4 * (i * tiles_n + j))
                    do("mma_u8s8", place, address(a, 4 * i), address(b, 2 * j))

    def _add_up(self) -> None:
        """The sums of warps that share a tile of C and had parts of K, to the first of them."""
        p = self.p
        count, tiles = p.wm * p.wn // 32, p.m * p.n
        own = T.Bind(self.warp_n * p.m + self.warp_m)
        do("wait0")
        barrier()

        def place(part: Any, i: int) -> Any:
            return ((part * tiles + own) * count + i) * 32 + self.lane

        with T.If(self.warp_k > 0), T.Then():
            for i in range(count):
                T.buffer_store(self.memory, self.acc[i], [place(self.warp_k - 1, i)])
        barrier()
        with T.If(tirx.EQ(self.warp_k, i32(0))), T.Then():
            for part in range(p.k - 1):
                for i in range(count):
                    T.buffer_store(self.acc, self.acc[i] + self.memory[place(i32(part), i)], [i])
