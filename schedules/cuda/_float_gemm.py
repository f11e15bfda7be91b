"""Float products A (m, k) x B (k, n): tiles for many rows, a pass over the weights for few.

All read the same W (`_float_layout`), so a kernel for any m has a pass for 1, 4 and 8 rows, tiles
for more and tall tiles for many; it launches the one that fits m, the others over empty grids.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Gemm, GemmWeights
from ._float_cost import rows_us, tile_us
from ._float_layout import Layout, pack
from ._float_loops import Output, pragmas
from ._float_rows import Rows
from ._float_tile import Block, Source, tile
from ._ir import T, address, ceil_div, i64, launch, prim_func, tirx

__all__ = ["PRODUCTS", "FloatGemm", "FloatProduct", "Matrix", "Operands", "ProductTile", "Shape"]

_BATCHES = (1, 4, 16, 64, 256, 1024)  # that a kernel for any m should do well on
_FEW = (1, 4, 8)  # rows of the passes over the weights that a kernel for any m has
_TALL = 192  # rows beyond which a kernel for any m takes tall blocks
_IN_L2 = 8 << 20  # bytes of W that every block may as well read again


@dataclass(frozen=True)
class ProductTile(Block):
    """Parameters of the kernels: a block of many rows, and of few."""

    few: int = 8  # rows up to which the weights just pass
    columns: int = 32  # of C that a block of few rows has


PRODUCTS: dict[str, tuple[int, ...]] = {  # the space of `ProductTile`
    "wm": (1, 2, 4),
    "wn": (1, 2),
    "tm": (4, 8),
    "tn": (4, 8),
    "bk": (16, 32),
    "slices": (1, 2, 4),
    "few": (8, 16),
    "columns": (8, 16, 32, 64),
}


@dataclass(frozen=True)
class Shape:
    """Of a product; m None: `per` times a number that is known when called."""

    m: int | None
    n: int  # of a group
    k: int
    per: int = 1
    groups: int = 1
    matrix: bool = True  # A is one, nothing is gathered

    @property
    def sizes(self) -> tuple[int, ...]:
        """The m that count in a choice of parameters."""
        if self.m is not None:
            return (max(self.m, 1),)
        return tuple(size * self.per for size in _BATCHES)

    def few(self, params: Any) -> tuple[int, ...]:
        """Rows of the passes over the weights that a kernel has; () where m is too many."""
        if not self.matrix or self.groups > 1:
            return ()
        if self.m is None:
            return tuple(count for count in _FEW if self.per <= count <= params.few)
        return (self.m,) if 0 < self.m <= params.few else ()


@dataclass(frozen=True)
class Operands:
    """What a kernel reads and writes, within its function."""

    m: Any
    load: Callable[[Any, Any], Any]  # an element of A by row and k
    source: Callable[[Any], Source]  # A of a group, in tiles
    out: Callable[[Any], Output]  # C of a group


class FloatProduct(Kernel):
    """C = activation(A x B (* scale) + bias (+ residual)), sums of f32."""

    weights: ClassVar[str]  # f32 | f16 | s8
    Params: ClassVar[type] = ProductTile

    @abstractmethod
    def shape(self, workload: Any) -> Shape:
        """The product that the workload is."""

    @abstractmethod
    def operands(self, workload: Any, lay: Layout) -> Operands:
        """Declares the function's parameters."""

    def registers(self, params: Any) -> int:
        return params.registers

    def layout(self, workload: Any, params: Any) -> Layout:
        shape = self.shape(workload)
        only_few = shape.m is not None and shape.few(params)
        bn = params.columns if only_few else params.bn
        scaled, biased = self.weights == "s8", workload.bias != "none"
        return Layout(self.weights, shape.n, shape.k, bn, params.bk, shape.groups, scaled, biased)

    def candidates(self, machine: Machine, workload: Any = None) -> Iterator[Any]:
        """Of the base class, those whose blocks fit a multiprocessor."""
        return (p for p in super().candidates(machine, workload) if self.fits(p))

    def fits(self, params: Any) -> bool:
        """Whether a multiprocessor has the registers and the shared memory for a block."""
        return params.fits and params.bn % params.columns == 0

    def default(self, workload: Any, machine: Machine) -> Any:
        """The block with the least estimated time; for any m, the least far from it overall."""
        found = {self.effect(workload, p): p for p in reversed(list(self.candidates(machine)))}
        choices = list(found.values())
        far = [0.0] * len(choices)
        for m in self.shape(workload).sizes:
            times = [self._us(workload, p, m, machine) for p in choices]
            far = [f + t / min(times) for f, t in zip(far, times, strict=True)]
        return choices[far.index(min(far))]

    def effect(self, workload: Any, params: Any) -> Hashable:
        shape = self.shape(workload)
        if not shape.few(params):
            return replace(params, columns=0, few=0)
        if shape.m is None:
            return replace(params, few=min(params.few, _FEW[-1]))
        return params.columns, params.bk

    def estimate(self, workload: Any, params: Any, machine: Machine) -> float:
        if not self.fits(params):
            return inf
        sizes = self.shape(workload).sizes
        return sum(self._us(workload, params, m, machine) / m for m in sizes)

    def _us(self, workload: Any, params: Any, m: int, machine: Any) -> float:
        lay, shape = self.layout(workload, params), self.shape(workload)
        counts = [c for c in shape.few(params) if c >= m]
        if counts:
            return rows_us(Rows(counts[0], params.columns, lay), machine)
        if shape.m is None and m > _TALL:
            params = params.tall
        return self._tile_us(params, m, lay, machine)

    def _tile_us(self, params: Any, m: int, lay: Layout, machine: Any) -> float:
        return tile_us(params, m, lay, machine)

    def build(self, workload: Any, params: Any, machine: Machine) -> Any:
        lay, shape = self.layout(workload, params), self.shape(workload)
        with prim_func(self.name) as builder:
            T.func_attr({"dcc.kernel": self.name})
            given = self.operands(workload, lay)
            least = 0  # rows that an earlier launch has
            for count in shape.few(params):
                rows = Rows(count, params.columns, lay)
                blocks = _between(given.m, least, count, rows.blocks)
                with launch((blocks,), (256,)) as (block, thread), pragmas():
                    rows.run(given.load, given.out(0), block, thread, given.m)
                least = count
            tall = params.tall if shape.m is None else params
            if tall != params:
                if least < _TALL:
                    self._many(params, lay, given, shape, (least, _TALL))
                self._many(tall, lay, given, shape, (max(least, _TALL), None))
            elif shape.m is None or not least:
                self._many(params, lay, given, shape, (least, None))
        return builder.get()

    def _many(
        self,
        params: Any,
        lay: Layout,
        given: Operands,
        shape: Shape,
        between: tuple[int, int | None],
    ) -> None:
        """Blocks in the order that has the larger of A and W read from memory once."""
        m, wide = given.m, lay.tiles
        tall = _blocks(m, params.bm)
        grid = _between(m, *between, tall * (wide * lay.groups))
        along_n = lay.group <= _IN_L2 or (shape.m is not None and shape.m > lay.n)
        with launch((grid,), (params.threads,)) as (block, thread), pragmas():
            inner = T.Bind(block % (tall * wide)) if lay.groups > 1 else block
            group = T.Bind(block // (tall * wide)) if lay.groups > 1 else 0
            if along_n:
                at = group, T.Bind(inner // wide), T.Bind(inner % wide)
            else:
                at = group, T.Bind(inner % tall), T.Bind(inner // tall)
            self._tile(params, lay, given.source(group), given.out(group), at, thread, m)

    def _tile(
        self,
        params: Any,
        lay: Layout,
        source: Source,
        out: Output,
        at: tuple[Any, Any, Any],
        thread: Any,
        m: Any,
    ) -> None:
        tile(params, lay, source, out, at, thread, m)


@dataclass
class Matrix:
    """A (m, k) f32 as the rows that a block copies from."""

    a: Any
    rows: Any
    k: int

    @property
    def width(self) -> int:
        return 4 if self.k % 4 == 0 else 1

    def prepare(self, passes: int, row: Callable[[Any], Any]) -> None:
        """Nothing: a row's number is all."""

    def piece(self, index: Any, row: Any, k: Any) -> tuple[Any, Any]:
        inside = tirx.And(row < self.rows, k < self.k)
        place = address(self.a, tirx.min(row, self.rows - 1), tirx.min(k, self.k - self.width))
        return place, tirx.Select(inside, 4 * self.width, 0)


class FloatGemm(FloatProduct):
    """Of Gemm workloads."""

    def refuses(self, workload: Gemm) -> str | None:
        if workload.a != "f32" or workload.b != self.weights:
            return f"operands are {workload.a} x {workload.b}, not f32 x {self.weights}"
        return None

    def shape(self, workload: Gemm) -> Shape:
        return Shape(workload.m, workload.n, workload.k)

    def pack(self, workload: Gemm, weights: GemmWeights, params: Any) -> np.ndarray:
        lay = self.layout(workload, params)
        return pack(lay, weights.b[None], weights.scale, weights.bias)

    def operands(self, workload: Gemm, lay: Layout) -> Operands:
        n, k = workload.n, workload.k
        m = tirx.Var("m", "int64") if workload.m is None else i64(workload.m)
        a = T.arg("a", T.buffer((m, k), "float32"))
        w = T.arg("w", T.buffer((lay.nbytes,), "uint8"))
        c = T.arg("c", T.buffer((m, n), "float32"))
        out = Output(workload, w, lay.scale, lay.bias, c, None, n, n)
        return Operands(m, lambda row, at: a[row, at], lambda _: Matrix(a, m, k), lambda _: out)


def _blocks(m: Any, height: int) -> Any:
    fixed = isinstance(m, tirx.IntImm)
    return i64(ceil_div(int(m), height)) if fixed else (m + (height - 1)) // height


def _between(m: Any, least: int, most: int | None, blocks: Any) -> Any:
    """`blocks` if least < m <= most, else 0: a launch over no blocks is none."""
    blocks = i64(blocks) if isinstance(blocks, int) else blocks
    if isinstance(m, tirx.IntImm) or (not least and most is None):
        return blocks
    wanted = m > least
    if most is not None:
        wanted = tirx.And(wanted, m <= most)
    return tirx.Select(wanted, blocks, i64(0))
