"""Dot products of all pairs of a sample's vectors: what the kernels of both widths share.

A sample's vectors X (vectors, dim) are transposed into a scratch of one thread, XT (dim, columns),
in blocks of lanes x lanes: log2(lanes) rounds that interleave row r with row r + lanes/2. Then row
i of the triangle is

    p[i, j .. j + lanes] = sum_k X[i, k] * XT[k, j .. j + lanes]

several rows i at a time, so that their accumulators fill the registers and hide the latency of a
multiply-add; the operand X[i, k] is a broadcast from memory. Of 27 x 27 products the lower
triangle needs 351; they are in 56 vectors of 8, or in 36 of 16. Everything lies in the first-level
cache: a sample of 27 x 64 is 7 kB, its transpose 8 kB.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Interaction
from ._ir import T, i64, intrinsic, masked_store, prim_func, ramp, shared, splat, tirx

_PARALLEL_US = 50.0  # work below this is not worth waking other threads, which takes about 5 us
_UNITS = 16  # parallel units to aim at
_GFLOPS = 60.0  # of one thread, of products that are wanted
_SCRATCH = 64 << 10  # bytes of a thread's stack
_LEAST = 8  # of the vectors' length
_MOST = 128  # vectors: the rows of the triangle are unrolled


@dataclass(frozen=True)
class Tile:
    accumulators: int = 24  # vectors of sums kept in registers
    lanes: int = 8  # columns of a vector


def columns(workload: Interaction, lanes: int) -> int:
    """Columns of XT; rows of the upper triangle are read past the last vector."""
    whole = -(-workload.vectors // lanes) * lanes
    return whole + (lanes if workload.order == "upper" else 0)


def usable(workload: Interaction, lanes: int) -> int:
    """Columns of a vector where rows may be shorter."""
    return min(lanes, workload.dim // _LEAST * _LEAST)


def tiles(workload: Interaction, accumulators: int, lanes: int) -> list[range]:
    """Rows of the triangle, in order, grouped so that their sums fit the registers."""
    width = [-(-len(workload.row(i)) // lanes) for i in range(workload.vectors)]
    out: list[range] = []
    first = next(i for i in range(workload.vectors) if width[i])
    last = max(i for i in range(workload.vectors) if width[i]) + 1
    while first < last:
        end = first + 1
        room = accumulators - width[first]
        while end < last and width[end] <= room and width[end] == width[first]:
            room -= width[end]
            end += 1
        out.append(range(first, end))
        first = end
    return out


class InteractionKernel(Kernel[Interaction, None]):
    """out = dense, then the triangle of x times its transpose."""

    Params: ClassVar[type] = Tile

    def refuses(self, workload: Interaction) -> str | None:
        if workload.dim < _LEAST:
            return f"vectors of {workload.dim}, shorter than {_LEAST}"
        if workload.vectors > _MOST:
            return f"{workload.vectors} vectors, more than {_MOST}"
        if workload.dim * columns(workload, 16) * 4 > _SCRATCH:
            return f"{workload.vectors} vectors of {workload.dim} do not fit {_SCRATCH} bytes"
        return None

    def registers(self, params: Tile) -> int:
        """The sums, vectors of XT and a broadcast."""
        return params.accumulators + params.accumulators // 6 + 2

    def effect(self, workload: Interaction, params: Tile) -> Hashable:
        lanes = usable(workload, params.lanes)
        return tuple(tiles(workload, params.accumulators, lanes)), lanes

    def pack(self, workload: Interaction, weights: None, params: Tile) -> np.ndarray:
        return np.zeros(0, np.uint8)

    def build(self, workload: Interaction, params: Tile, machine: Machine) -> Any:
        return _Builder(self, workload, params).function()


class _Builder:
    def __init__(self, kernel: InteractionKernel, work: Interaction, params: Tile) -> None:
        self.kernel, self.work, self.params = kernel, work, params
        self.lanes = usable(work, params.lanes)
        self.columns = columns(work, self.lanes)
        self.vector = f"float32x{self.lanes}"

    def function(self) -> Any:
        work = self.work
        with prim_func(self.kernel.name) as builder:
            bags = tirx.Var("bags", "int64") if work.bags is None else i64(work.bags)
            self.dense = T.arg("dense", T.buffer((bags, work.dim), "float32"))
            shape = (bags, work.vectors - 1, work.dim)
            self.rows = T.arg("rows", T.buffer(shape, "float32"))
            self.out = T.arg("out", T.buffer((bags, work.dim + work.pairs), "float32"))
            least = max(2, round(_PARALLEL_US / (2e-3 * work.pairs * work.dim / _GFLOPS)))
            if work.bags is not None:
                self._share(bags, work.bags >= least)
            else:
                with T.If(bags >= i64(least)):
                    with T.Then():
                        self._share(bags, True)
                    with T.Else():
                        self._share(bags, False)
        return builder.get()

    def _share(self, bags: Any, parallel: bool) -> None:
        """All samples, in one loop or shared among threads."""
        if not parallel:
            self._samples(i64(0), bags)
            return
        shared(bags, _UNITS, self._samples)

    def _samples(self, first: Any, last: Any) -> None:
        xt = T.alloc_buffer((self.work.dim * self.columns,), "float32", scope="local")
        with T.serial(first, last) as bag:
            self._transpose(bag, xt)
            at = self.work.dim
            for tile in tiles(self.work, self.params.accumulators, self.lanes):
                self._tile(bag, xt, tile, at)
                at += sum(len(self.work.row(i)) for i in tile)

    def _x(self, bag: Any, i: int, k: Any) -> Any:
        """Vector i of a sample, at k."""
        return self.dense[bag, k] if i == 0 else self.rows[bag, i - 1, k]

    def _transpose(self, bag: Any, xt: Any) -> None:
        """XT of a sample; on the way its dense vector is copied to the output."""
        work, lanes = self.work, self.lanes
        blocks = -(-work.dim // lanes)
        with T.serial(i64(0), i64(blocks)) as block:
            k = T.Bind(tirx.min(block * lanes, i64(work.dim - lanes)))
            for first in range(0, work.vectors, lanes):
                names = [min(first + r, work.vectors - 1) for r in range(lanes)]
                rows = {i: T.Bind(self._x(bag, i, ramp(k, lanes))) for i in dict.fromkeys(names)}
                if first == 0:
                    T.buffer_store(self.out, rows[0], [bag, ramp(k, lanes)])
                for r, column in enumerate(_transposed([rows[i] for i in names], lanes)):
                    at = (k + r) * self.columns + first
                    T.buffer_store(xt, column, [ramp(at, lanes)])

    def _tile(self, bag: Any, xt: Any, tile: range, at: int) -> None:
        """Rows `tile` of the triangle; the first of them is at element `at` of the output."""
        work, lanes = self.work, self.lanes
        places = [(i, j) for i in tile for j in range(0, len(work.row(i)), lanes)]
        acc = T.alloc_buffer((len(places) * lanes,), "float32", scope="local")
        for p in range(len(places)):
            T.buffer_store(acc, splat(0.0, "float32", lanes), [ramp(p * lanes, lanes)])
        with T.serial(i64(0), i64(work.dim)) as k:
            base = k * self.columns
            starts = dict.fromkeys(work.row(i).start + j for i, j in places)
            xs = {s: T.Bind(xt[ramp(base + s, lanes)]) for s in starts}
            factors = {i: T.Bind(T.broadcast(self._x(bag, i, k), lanes)) for i in tile}
            for p, (i, j) in enumerate(places):
                where = ramp(p * lanes, lanes)
                total = intrinsic(
                    self.vector, "llvm.fma", factors[i], xs[work.row(i).start + j], acc[where]
                )
                T.buffer_store(acc, total, [where])
        begins = {}
        for i in tile:
            begins[i] = at
            at += len(work.row(i))
        for p, (i, j) in enumerate(places):
            value, valid = acc[ramp(p * lanes, lanes)], len(work.row(i)) - j
            if valid >= lanes:
                T.buffer_store(self.out, value, [bag, ramp(i64(begins[i] + j), lanes)])
            else:
                masked_store(self.out, [bag, i64(begins[i] + j)], value, lanes, valid)


def _transposed(rows: list[Any], lanes: int) -> list[Any]:
    """Transposes lanes vectors of as many lanes."""
    half = lanes // 2
    low = [x for i in range(half) for x in (i, lanes + i)]
    high = [x for i in range(half, lanes) for x in (i, lanes + i)]
    for _ in range(lanes.bit_length() - 1):
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [T.Bind(T.Shuffle([a, b], order)) for a, b in pairs for order in (low, high)]
    return rows
