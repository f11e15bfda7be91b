"""Float GEMM with weights packed in panels, for vectors of any width; the named kernels say more.

    W: panel 0                    panel 1     ...   last panel     | bias, where there is one
       k 0: v0 .. v(nr-1)                           the vectors
       k 1: v0 .. v(nr-1) ...                       that are left        v: `lanes` columns

A tile of `height` x nr vectors of C stays in registers while k runs over all of K. A step loads
nr vectors of B (f16 is widened on the way) and broadcasts one element of each row of A, so a tile
asks its caches for 64 / height bytes of B in the cycle of one 512-bit FMA; the second-level cache
gives 32 and the third about 27. Blocking over K was measured and left out: at M 128, N 1024 a
panel of K 4096 fills the second-level cache and still runs at 95 % of peak.

Rows: blocks of one height, balanced (10 rows, mr 6: two of 5), the last one moved up so that it
ends with the matrix (11 rows: 0-5 and 5-10; the rows computed twice get the same values). A second
height for the tail would be exact, but LLVM 22 spills accumulators in the k-loop when tiles of two
heights share a loop: 86 against 117 Gop/s at M 128, N 1024, K 1024.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Gemm, GemmWeights
from ._epilogue import Epilogue
from ._ir import T, bits, i64, intrinsic, local, prim_func, ramp, splat, tirx

_PARALLEL_US = 20.0  # less is not worth sharing: a launch costs 1 to 3 us
_UNITS = 16  # parallel units to aim at, so that a few threads get nearly equal shares
_CHUNK_BYTES = 256 << 10  # rows of A that stay in L2 while panel after panel passes
_GOPS = 115.0  # of one thread
_WEIGHT_BYTES_PER_US = 95e3  # of one thread, from L3
_IN_FLIGHT = 8  # FMAs: latency 4, two a cycle
_STREAM = 24  # bytes of W a cycle that the second-level cache gives, with margin
_LATENCY = 200  # cycles to memory beyond it, other cores busy
_WINDOW = 320  # instructions in flight, among them the loads that hide this latency
_BATCHES = (1, 2, 4, 8, 16, 64)  # that a kernel for any m should do well on


def ceil_div(a: Any, b: Any) -> Any:
    return (a + (b - 1)) // b


@dataclass(frozen=True)
class Tile:
    """Parameters of the kernels."""

    mr: int = 6  # most rows of C kept in registers
    nr: int = 4  # vectors of columns of C kept in registers
    lanes: int = 16  # columns of a vector


@dataclass(frozen=True)
class Layout:
    """Where everything is in W. `columns` is N padded to whole vectors, offsets are in bytes."""

    lanes: int
    nr: int
    n: int
    k: int
    size: int  # of one weight
    biased: bool

    @property
    def vectors(self) -> int:
        return ceil_div(self.n, self.lanes)

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        return ceil_div(self.vectors, self.nr)

    @property
    def whole(self) -> int:
        """Leading panels of nr vectors without padding."""
        return self.n // self.lanes // self.nr

    @property
    def step(self) -> int:
        """Bytes of one vector of one k."""
        return self.lanes * self.size

    @property
    def bias(self) -> int:
        return ceil_div(self.columns * self.k * self.size, 64) * 64

    @property
    def nbytes(self) -> int:
        return self.bias + (ceil_div(self.columns * 4, 64) * 64 if self.biased else 0)


class FloatGemm(Kernel):
    """C = activation(A x B + bias) for f32 A and f32 or f16 B, f32 accumulation."""

    weights: ClassVar[str]  # f32 | f16
    Params: ClassVar[type] = Tile

    def refuses(self, workload: Gemm) -> str | None:
        if workload.a != "f32" or workload.b != self.weights:
            return f"operands are {workload.a} x {workload.b}, not f32 x {self.weights}"
        return None

    def registers(self, params: Tile) -> int:
        """C's tile, a row of B, a broadcast of A."""
        return params.mr * params.nr + params.nr + 1

    def layout(self, workload: Gemm, params: Tile) -> Layout:
        size = 2 if self.weights == "f16" else 4
        biased = workload.bias != "none"
        return Layout(params.lanes, params.nr, workload.n, workload.k, size, biased)

    def pack(self, workload: Gemm, weights: GemmWeights, params: Tile) -> np.ndarray:
        lay = self.layout(workload, params)
        dtype = np.float16 if self.weights == "f16" else np.float32
        b = np.zeros((lay.k, lay.columns), dtype)
        b[:, : lay.n] = weights.b
        out = np.zeros(lay.nbytes, np.uint8)
        at = 0
        for first in range(0, lay.columns, lay.nr * lay.lanes):
            panel = np.ascontiguousarray(b[:, first : first + lay.nr * lay.lanes])
            out[at : at + panel.nbytes] = panel.view(np.uint8).reshape(-1)
            at += panel.nbytes
        if lay.biased:
            assert weights.bias is not None
            bias = np.ascontiguousarray(weights.bias, np.float32)
            out[lay.bias : lay.bias + bias.nbytes] = bias.view(np.uint8)
        return out

    def default(self, workload: Gemm, machine: Machine) -> Tile:
        """The tile with the fewest estimated cycles; for any m, the least far from it overall."""
        choices = list(self.candidates(machine))
        far_off = [0.0] * len(choices)
        for m in _BATCHES if workload.m is None else (workload.m,):
            cycles = [self._cycles(workload, params, m, machine) for params in choices]
            far_off = [off + c / min(cycles) for off, c in zip(far_off, cycles, strict=True)]
        return choices[far_off.index(min(far_off))]

    def effect(self, workload: Gemm, params: Tile) -> Hashable:
        vectors = ceil_div(workload.n, params.lanes)
        rows = params.mr
        if workload.m is not None:
            rows = ceil_div(workload.m, ceil_div(workload.m, params.mr))
        return rows, min(params.nr, vectors), params.lanes

    def estimate(self, workload: Gemm, params: Tile, machine: Machine) -> float:
        sizes = _BATCHES if workload.m is None else (workload.m,)
        return sum(self._cycles(workload, params, m, machine) / m for m in sizes)

    def _cycles(self, workload: Gemm, params: Tile, m: int, machine: Machine) -> float:
        """Estimated cycles of all of C on one thread, and twice those of the busier of two.

        512-bit instructions are counted as two of 256 bits, of which two start in a cycle.
        """
        lay = self.layout(workload, params)
        blocks = ceil_div(m, params.mr)
        height = ceil_div(m, blocks)
        wide = lay.lanes // 8
        far = lay.nbytes > machine.l2 and height > 2  # faster streams are prefetched well

        def panel(nr: int) -> float:
            lines = nr * lay.step / 64
            instructions = height * nr + height + nr * (3 - lay.size // 2) + 2
            multiply = height * nr * wide / 2
            convert = nr * (2.0 if wide == 2 else 0.75) if lay.size == 2 else 0.0
            loads = (nr * wide + height) / 2
            step = 0.6 + max(
                multiply + convert / 4, convert, loads, instructions / 6, lines * 64 / _STREAM
            )
            if lines <= 1:
                step *= 1.06  # measured: panels of one cache line a row are 3 to 13 % slower
            fetch = lines * _LATENCY / min(48, _WINDOW / instructions * lines) if far else 0.0
            steps = max(step, fetch) + step * (blocks - 1)
            return lay.k * steps + blocks * (20 + 2 * multiply)

        rest = lay.vectors - lay.whole * lay.nr
        total = lay.whole * panel(lay.nr) + (panel(rest) if rest else 0.0)
        if lay.panels == 1 and m * lay.k * 4 > machine.l2 and height > 8:
            total *= 1 + (height - 8) / 16  # rows of A at once from memory: 25 % slower at 12
        if lay.lanes < machine.lanes:
            total *= 1.1  # half vectors only where they gain something
        units = lay.panels * blocks
        return total * (1 + ceil_div(units, 2) * 2 / units)

    def build(self, workload: Gemm, params: Tile, machine: Machine) -> Any:
        return Builder(self, workload, params).function()


class Builder:
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: FloatGemm, workload: Gemm, params: Tile) -> None:
        self.kernel, self.workload, self.params = kernel, workload, params
        self.lay = kernel.layout(workload, params)
        self.vector = f"float32x{self.lay.lanes}"

    def function(self) -> Any:
        work, lay = self.workload, self.lay
        with prim_func(self.kernel.name) as builder:
            m = tirx.Var("m", "int64") if work.m is None else i64(work.m)
            self.a = T.arg("a", T.buffer((m, work.k), "float32"))
            self.w = T.arg("w", T.buffer((lay.nbytes,), "uint8"))
            self.c = T.arg("c", T.buffer((m, work.n), "float32"))
            self.epilogue = Epilogue(work, lay.lanes, True, self.c)
            if work.m is None:
                self._dynamic(m)
            else:
                height = ceil_div(work.m, ceil_div(work.m, self.params.mr))
                self._units(work.m, height, self._us(work.m) >= _PARALLEL_US)
        return builder.get()

    def _us(self, m: int) -> float:
        work = self.workload
        compute = 2 * m * work.n * work.k / (_GOPS * 1e3)
        return max(compute, self.lay.nbytes / _WEIGHT_BYTES_PER_US)

    def _dynamic(self, m: Any) -> None:
        """A nest for every height that balanced blocks of at most mr rows can have."""
        mr = self.params.mr
        start = 1 if self._us(0) >= _PARALLEL_US else math.ceil(_PARALLEL_US / self._us(1))
        # by way of memory: as an expression it makes TVM's region analysis several times slower
        place = local(1, "int64")
        T.buffer_store(place, ceil_div(m, ceil_div(m, i64(mr))), [0])
        height = place[0]

        def nests(heights: range, parallel: bool) -> None:
            for h in heights:
                with T.If(tirx.EQ(height, i64(h))), T.Then():
                    self._units(m, h, parallel)

        if start == 1:
            nests(range(1, mr + 1), True)
            return
        with T.If(m < i64(start)):
            with T.Then():
                nests(range(1, min(mr, start - 1) + 1), False)
            with T.Else():
                if start >= 4 * mr:
                    self._units(m, mr, True)
                else:
                    nests(range(min(start, mr // 2 + 1), mr + 1), True)

    def _units(self, m: Any, height: int, parallel: bool) -> None:
        """All of C, in tiles of `height` rows. A unit is a panel times a chunk of row blocks."""
        lay = self.lay
        blocks = ceil_div(m, height)
        chunk = max(1, _CHUNK_BYTES // (height * lay.k * 4))
        if parallel:
            share = ceil_div(blocks, ceil_div(_UNITS, lay.panels))
            if isinstance(m, int):
                chunk = min(chunk, share)
            else:
                chunk = T.Bind(tirx.min(share, i64(chunk)))
        chunks = ceil_div(blocks, chunk)

        def unit(index: Any, panel: Any, columns: int) -> None:
            first = T.Bind(index * chunk)
            with T.serial(first, T.Bind(tirx.min(first + chunk, blocks))) as block:
                row = block * height
                if not isinstance(m, int) or m % height:
                    row = tirx.min(row, m - height)
                self._tile(T.Bind(row), height, panel, columns)

        full = lay.nr * lay.lanes
        rest = lay.n - lay.whole * full
        if parallel:
            with T.parallel(i64(0), i64(lay.panels) * chunks) as u:
                index, panel = T.Bind(u // lay.panels), T.Bind(u % lay.panels)
                if not rest or not lay.whole:
                    unit(index, panel, rest or full)
                else:
                    with T.If(panel < lay.whole):
                        with T.Then():
                            unit(index, panel, full)
                        with T.Else():
                            unit(index, i64(lay.whole), rest)
        else:
            with T.serial(i64(0), chunks) as index:
                if lay.whole:
                    with T.serial(i64(0), i64(lay.whole)) as panel:
                        unit(index, panel, full)
                if rest:
                    unit(index, i64(lay.whole), rest)

    def _tile(self, row: Any, height: int, panel: Any, columns: int) -> None:
        """C at `height` rows from `row` and the columns of a panel.

        Few accumulators would wait for each other: then every k % ways has its own.
        """
        lay, lanes, vector = self.lay, self.lay.lanes, self.vector
        nr = ceil_div(columns, lanes)
        ways = max(1, min(round(_IN_FLIGHT / (height * nr)), lay.k))
        acc = local(ways * height * nr * lanes, "float32")

        def at(way: int, i: int, j: int) -> Any:
            return ramp(((way * height + i) * nr + j) * lanes, lanes)

        def step(k: Any, way: int) -> None:
            base = (panel * (lay.nr * lay.k) + k * nr) * lay.step
            b = [T.Bind(self._weight(base + j * lay.step)) for j in range(nr)]
            for i in range(height):
                a = T.Bind(T.broadcast(self.a[row + i, k], lanes))
                for j in range(nr):
                    where = at(way, i, j)
                    T.buffer_store(acc, intrinsic(vector, "llvm.fma", a, b[j], acc[where]), [where])

        for x in range(ways * height * nr):
            T.buffer_store(acc, splat(0.0, "float32", lanes), [ramp(x * lanes, lanes)])
        with T.serial(i64(0), i64(lay.k // ways)) as k:
            for way in range(ways):
                step(k * ways + way, way)
        for k in range(lay.k // ways * ways, lay.k):
            step(i64(k), k % ways)

        first = panel * lay.nr  # vector of C
        bias = [T.Bind(self._bias(first + j)) for j in range(nr if lay.biased else 0)]
        rows = []
        for i in range(height):
            values = [acc[at(0, i, j)] for j in range(nr)]
            for way in range(1, ways):
                values = [v + acc[at(way, i, j)] for j, v in enumerate(values)]
            rows.append([v + b for v, b in zip(values, bias, strict=True)] if bias else values)
        self.epilogue.store_floats(rows, (row, first * lanes), columns)

    def _weight(self, offset: Any) -> Any:
        raw = self.w[ramp(offset, self.lay.step)]
        if self.lay.size == 4:
            return bits(self.vector, raw)
        return tirx.Cast(self.vector, bits(f"float16x{self.lay.lanes}", raw))

    def _bias(self, vector: Any) -> Any:
        lanes = self.lay.lanes
        return bits(self.vector, self.w[ramp(self.lay.bias + vector * (lanes * 4), lanes * 4)])
