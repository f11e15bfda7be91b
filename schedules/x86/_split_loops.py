"""The loops of the GEMM with 16-bit sums: those of `_gemm_loops` around other tiles.

A block of rows is up to `group` tiles. Where there are outliers, A is turned before all blocks:
of a k-step of a block the 4 bytes of every row, a tile's rows being the lanes of a vector.

A block, per vector of columns:

    sums = 0                                         per tile: columns x lanes of rows, in L1
    for run of the vector:                           outliers
        t  = turned A[step 0] x 4 weights            vpmaddubsw
        t += turned A[step 1] x 4 weights ..         vpmaddubsw, vpaddw
        sums[column] += halves of t                  vpmaddwd, vpaddd; all for each tile
    for tile:
        C = start + transposed sums                  in registers
        for window:
            for row:  t  = A[row, step 0] x W[step 0]    vpmaddubsw
                      t += A[row, step 1] x W[step 1] .. vpmaddubsw, vpaddw
                      C[row] += halves of (t + offsets)  vpaddw, vpmaddwd, vpaddd
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...machine import Machine
from ...outliers import RUN
from ...workload import Gemm
from ._dot import _MADD, _MADDUBS
from ._gemm_loops import _UNROLL, Builder, ceil_div
from ._ir import T, bits, intrinsic, local, ramp, splat, tirx

if TYPE_CHECKING:
    from ._gemm_split import Params, SplitGemm, SplitLayout

_STACKED = 1024  # bytes up to which TVM puts a buffer on the stack, aligned to 16 bytes only


class SplitBuilder(Builder):
    lay: SplitLayout

    def __init__(self, kernel: SplitGemm, workload: Gemm, params: Params, machine: Machine) -> None:
        super().__init__(kernel, workload, params, machine)
        self.tile_rows = params.mr
        self.group = kernel.group(workload) if self.lay.runs else 1
        self.params = replace(params, mr=self.tile_rows * self.group)  # rows of a block

    def _tiles(self, rows: int) -> tuple[int, int]:
        """Number of tiles of a block, and their rows: the last may overlap the one before."""
        count = ceil_div(rows, self.tile_rows)
        return count, ceil_div(rows, count)

    # ---- A with its rows as lanes ----
    def _static(self, m: int) -> None:
        if self.lay.runs:
            self._turn(m)
        super()._static(m)

    def _turn(self, m: int) -> None:
        """Makes `turned` of A: u8 (blocks, k x rows of a block)."""
        lanes, k = self.lay.lanes, self.workload.k
        blocks = ceil_div(m, self.params.mr)
        self.low, self.high = m // blocks, ceil_div(m, blocks)
        self.tall = m - self.low * blocks  # blocks of `high` rows, which come first
        self.turned = T.alloc_buffer((blocks, k * self.group * lanes), "uint8", scope="global")
        loop = T.parallel if self.threads_from is not None else T.serial
        with loop(self.const(0), blocks) as block:
            start = T.Bind(block * self.low + tirx.min(block, self.tall))
            for tile in range(self._tiles(self.high)[0]):
                first, other = (
                    min(tile * size, rows - size)
                    for rows in (self.high, self.low)
                    for _, size in [self._tiles(rows)]
                )
                if other != first:
                    first = tirx.Select(block < self.tall, first, other)
                at = T.Bind(start + first)
                rows = [T.Bind(tirx.min(at + i, m - 1)) for i in range(lanes)]
                self._turn_tile(block, tile * lanes, rows)

    def _turn_tile(self, block: Any, lane: int, rows: list[Any]) -> None:
        lanes, k = self.lay.lanes, self.workload.k
        flips = self.kernel.flips(self.workload)
        width, size = self.group * lanes, 4 * lanes
        bytes_order = [
            part + 4 * row + t for part in range(0, size, 16) for t in range(4) for row in range(4)
        ]
        words_order = [4 * part + t for t in range(4) for part in range(lanes // 4)]

        def square(first: Any) -> None:
            """4 * lanes k of the tile's rows."""
            wide = [T.Bind(bits(f"int32x{lanes}", self.a[row, ramp(first, size)])) for row in rows]
            for step, words in enumerate(transposed(wide, lanes)):
                if flips:
                    words = words ^ splat(-0x7F7F7F80, "int32", lanes)
                parts = T.Shuffle([bits(f"uint8x{size}", words)], bytes_order)
                words = T.Bind(T.Shuffle([bits(f"int32x{lanes}", parts)], words_order))
                for t in range(4):
                    quarter = range(t * lanes // 4, (t + 1) * lanes // 4)
                    value = bits(f"uint8x{lanes}", T.Shuffle([words], list(quarter)))
                    where = ramp((first + (4 * step + t)) * width + lane, lanes)
                    T.buffer_store(self.turned, value, [block, where])

        if k >= size:
            with T.serial(self.const(0), k // size) as c:
                square(c * size)
            if k % size:  # overlaps the one before
                square(k - size)
            return
        with T.serial(self.const(0), k) as at:
            for i, row in enumerate(rows):
                value = bits("uint8", self.a[row, at])
                value = value ^ tirx.const(0x80, "uint8") if flips else value
                T.buffer_store(self.turned, value, [block, at * width + (lane + i)])

    # ---- a block of rows ----
    def _units(self, blocks: Any, chunk: int | None, block: Any, parallel: bool) -> None:
        self.shared = not parallel
        if self.lay.runs and self.shared:
            self._allocate()
        super()._units(blocks, chunk, block, parallel)

    def _panel(self, panel: Any, run: Any) -> None:
        if self.lay.runs and not self.shared:
            self._allocate()
        super()._panel(panel, run)

    def _allocate(self) -> None:
        """Makes `sums`, larger than what goes on the stack: stores across cache lines are slow."""
        size = max(self.group * self.lay.lanes**2, _STACKED // 4 + 1)
        self.sums = T.alloc_buffer((size,), "int32", scope="global")

    def _tile(self, row: Any, rows: int, offset: Any, vector: Any, nr: int, valid: int) -> None:
        if not self.lay.runs:
            self._tile_of_block(row, rows, offset, vector, nr, valid, None)
            return
        if rows == self.high:
            block = row // self.high
        else:
            block = (row - self.tall) // self.low
        count, size = self._tiles(rows)
        self._add_outliers(T.Bind(block), vector, count)
        with T.serial(0, count) as tile:  # unrolled, it would be compiled longer
            first = T.Bind(row + tirx.min(tile * size, rows - size))
            self._tile_of_block(first, size, offset, vector, nr, valid, tile)

    def _tile_of_block(
        self, row: Any, rows: int, offset: Any, vector: Any, nr: int, valid: int, tile: Any
    ) -> None:
        """One tile; `tile` is its number in a block with outliers, else None."""
        work, lay = self.workload, self.lay
        lanes = lay.lanes
        acc = local(rows * nr * lanes, "int32")
        for j in range(nr):
            start = T.Bind(self._start(vector + j))
            added = None if tile is None else self._added(tile)
            for i in range(rows):
                value = start if added is None else start + added[i]
                T.buffer_store(acc, value, [ramp((i * nr + j) * lanes, lanes)])
        whole, steps = work.k // 4, -(-work.k // 4)
        windows = whole // lay.period
        looped = windows if windows * lay.period * rows * nr > _UNROLL else 0
        if looped:
            with T.serial(0, looped) as w:
                self._window(acc, row, rows, nr, offset, w, lay.period)
        for w in range(looped, lay.steps):
            self._window(acc, row, rows, nr, offset, w, min(lay.period, steps - w * lay.period))
        self._finish(acc, row, rows, vector, nr, valid)

    def _window(
        self, acc: Any, row: Any, rows: int, nr: int, offset: Any, window: Any, count: int
    ) -> None:
        """Adds `count` k-steps to the tile."""
        lay, lanes = self.lay, self.lay.lanes
        b, offsets, step = [], [], 4 * lanes
        for j in range(nr):
            at = offset + window * (nr * lay.step_bytes) + j * lay.step_bytes
            b.append([self._operand(at + t * step) for t in range(count)])
            if lay.offsets:
                words = self.w[ramp(at + lay.period * step, step)]
                offsets.append(T.Bind(bits(f"int16x{2 * lanes}", words)))
        for i in range(rows):
            a = [self._operands(row + i, window * lay.period + t)[0] for t in range(count)]
            for j in range(nr):
                where = ramp((i * nr + j) * lanes, lanes)
                pairs = self._pairs(a, b[j], offsets[j] if lay.offsets else None)
                T.buffer_store(acc, acc[where] + self._halves(pairs), [where])

    def _operand(self, at: Any) -> Any:
        return self.kernel.b_operands(self.w, at, self.lay.lanes, self.params)[0]

    def _pairs(self, a: list[Any], b: list[Any], total: Any) -> Any:
        """total, if any, + the sums of pairs of products, in 16 bits."""
        lanes = self.lay.lanes
        for x, y in zip(a, b, strict=True):
            pairs = intrinsic(f"int16x{2 * lanes}", _MADDUBS[lanes], x, y)
            total = pairs if total is None else total + pairs
        return total

    def _halves(self, pairs: Any) -> Any:
        """The sums of the halves, in 32 bits."""
        lanes = self.lay.lanes
        ones = splat(1, "int16", 2 * lanes)
        return intrinsic(f"int32x{lanes}", _MADD[lanes], pairs, ones)

    # ---- outliers ----
    def _add_outliers(self, block: Any, vector: Any, tiles: int) -> None:
        """What the outliers of a vector's columns add to a block: `sums` (tile, column, row)."""
        lay, lanes, sums = self.lay, self.lay.lanes, self.sums
        width = 2 * lanes  # products of 16 bits
        for at in range(0, tiles * lanes**2, lanes):
            T.buffer_store(sums, splat(0, "int32", lanes), [ramp(at, lanes)])
        first = T.Bind(self._word(lay.ends + vector * 4))
        last = T.Bind(self._word(lay.ends + vector * 4 + 4))
        with T.serial(0, last - first) as r:
            at = T.Bind(lay.first + (first + r) * (8 * RUN))
            heads = [T.Bind(self._word(at + 8 * t)) for t in range(RUN)]
            lane = T.Bind(heads[0] & (lanes - 1))
            places = [heads[0] - lane, *heads[1:]]
            weights = [
                T.Bind(bits(f"int16x{width}", T.broadcast(self._word(at + 8 * t + 4), lanes)))
                for t in range(RUN)
            ]
            for pair in range(0, tiles, 2):
                total = None
                for place, weight in zip(places, weights, strict=True):
                    rows = self.turned[block, ramp(place + pair * lanes, width)]
                    product = tirx.Cast(f"int16x{width}", rows) * weight
                    total = product if total is None else total + product
                total = T.Bind(total)
                for tile in range(min(2, tiles - pair)):
                    half = T.Shuffle([total], list(range(tile * lanes, (tile + 1) * lanes)))
                    where = ramp(lane * lanes + (pair + tile) * lanes**2, lanes)
                    more = tirx.Cast(f"int32x{lanes}", half)
                    T.buffer_store(sums, sums[where] + more, [where])

    def _added(self, tile: Any) -> list[Any]:
        """`sums` of a tile as vectors of columns."""
        lanes = self.lay.lanes
        places = [ramp(tile * lanes**2 + c * lanes, lanes) for c in range(lanes)]
        return transposed([T.Bind(self.sums[p]) for p in places], lanes)

    def _word(self, at: Any) -> Any:
        return bits("int32", self.w[ramp(at, 4)])

    # ---- the end of a tile ----
    def _finish(self, acc: Any, row: Any, rows: int, vector: Any, nr: int, valid: int) -> None:
        """From the accumulators to C."""
        work, lay, lanes = self.workload, self.lay, self.lay.lanes
        if work.b_zero:
            for i in range(rows):
                for j in range(nr):
                    where = ramp((i * nr + j) * lanes, lanes)
                    zero = self._constants(lay.b_zero, "int32", vector + j)
                    value = acc[where] - T.broadcast(self.row_sums[row + i], lanes) * zero
                    T.buffer_store(acc, value, [where])
        scale = [T.Bind(self._scale(vector + j)) for j in range(nr)] if work.out != "s32" else []
        bias = [
            T.Bind(self._constants(lay.bias, "float32", vector + j))
            for j in range(nr if work.bias == "f32" else 0)
        ]
        registers = [
            [acc[ramp((i * nr + j) * lanes, lanes)] for j in range(nr)] for i in range(rows)
        ]
        self.epilogue.store(registers, scale, bias, (row, vector * lanes), valid)


def transposed(vectors: list[Any], lanes: int) -> list[Any]:
    """`lanes` vectors of as many 32-bit lanes, rows for columns, in vpunpck and 128-bit moves."""

    def pick(a: Any, b: Any, order: list[int]) -> Any:
        return T.Bind(T.Shuffle([a, b], order))

    parts = range(0, lanes, 4)  # of 128 bits
    low = [p + s for p in parts for s in (0, lanes, 1, lanes + 1)]
    high = [p + s for p in parts for s in (2, lanes + 2, 3, lanes + 3)]
    low2 = [p + s for p in parts for s in (0, 1, lanes, lanes + 1)]
    high2 = [p + s for p in parts for s in (2, 3, lanes + 2, lanes + 3)]
    groups = []  # of 4 rows: column 4 * part + q is in part number `part` of vector q
    for g in range(0, lanes, 4):
        v = vectors[g : g + 4]
        t = [pick(v[i], v[i + 1], o) for o in (low, high) for i in (0, 2)]
        groups.append([pick(t[h], t[h + 1], o) for h in (0, 2) for o in (low2, high2)])

    def halves(a: Any, b: Any) -> list[Any]:
        """Even and odd 128-bit parts of both, a's first."""
        blocks = [[*range(p, p + 4)] for p in range(0, 2 * lanes, 4)]
        return [pick(a, b, [*chain(*blocks[odd::2])]) for odd in (0, 1)]

    out: list[Any] = [None] * lanes
    for q in range(4):
        columns = [g[q] for g in groups]
        if lanes == 8:
            out[q], out[4 + q] = halves(*columns)
            continue
        a, b = halves(*columns[:2]), halves(*columns[2:])  # parts 0, 2 of both; parts 1, 3
        for odd in (0, 1):
            out[4 * odd + q], out[4 * (odd + 2) + q] = halves(a[odd], b[odd])
    return out
