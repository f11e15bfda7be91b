"""The program of a compiled model, and where its tensors lie in memory.

Blocks of the workspace whose live ranges do not overlap share bytes. With every open dim bounded
the plan is made for the largest sizes, first fit, largest block first; without a bound blocks
share slots whose offsets are expressions of the dims.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from .generic.lanes import walk
from .runtime.params import Stream

ALIGN = 64


@dataclass(eq=False)
class Storage:
    """One piece of memory: an input, an output, a constant, or a block of the workspace."""

    kind: str  # input | output | const | work
    index: int = -1  # of the input or output
    data: np.ndarray | Stream | None = None  # of a constant
    size: Any = 0  # bytes: int, or an expression of symbolic dims
    first: int = 0  # live from this step
    last: int = 0  # to this step
    offset: Any = 0  # in params or workspace


@dataclass(frozen=True)
class Tensor:
    """A view of a storage: shape entries are ints or expressions."""

    storage: Storage
    shape: tuple[Any, ...]
    dtype: str


@dataclass
class Step:
    """One kernel call: packed function `name` over tensors, then scalars; outputs come last.

    After it the value of each symbol in `binds` is read from its tensor, one of the outputs.
    """

    name: str
    args: list[Tensor | Any]
    outputs: list[Tensor]
    binds: list[tuple[Any, Tensor]] = field(default_factory=list)


@dataclass
class Program:
    """The linear form of a Relax function, memory planned."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    steps: list[Step]
    symbols: list[Any]  # tirx.Var of the inputs, in the order of `plan`
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (source, output)
    workspace: Any = 0
    constants: list[Storage] = field(default_factory=list)
    requirements: list[tuple[Any, str]] = field(default_factory=list)  # (condition, message)
    peak: int | None = None  # largest live set of intermediates, bytes; None: unbounded dims
    computed: dict[Any, Any] = field(default_factory=dict)  # symbols of steps: largest value

    def told(self) -> dict[Any, Any]:
        """Computed symbols in shapes of outputs, and the most that each can be."""
        nodes = [
            n for t in self.outputs for d in t.shape if not isinstance(d, int) for n in walk(d)
        ]
        told = [v for v in self.computed if any(v.same_as(n) for n in nodes)]
        return {v: highest(v, self.computed) for v in told}


_ANALYZER = tvm.sym.Analyzer()


def simple(dim: Any) -> Any:
    """An int where the expression is constant."""
    if isinstance(dim, int):
        return dim
    dim = _ANALYZER.simplify(dim)
    return int(dim) if isinstance(dim, tirx.IntImm) else dim


def nbytes(shape: tuple[Any, ...], dtype: str) -> Any:
    itemsize = 1 if dtype == "bool" else np.dtype(dtype).itemsize
    size: Any = itemsize
    for dim in shape:
        size = size * dim
    return _round_up(size)


def highest(dim: Any, computed: dict[Any, Any]) -> Any:
    """The least expression of the input symbols that no value of computed ones exceeds.

    Raises ValueError where none is found.
    """
    if isinstance(dim, int) or not any(node in computed for node in walk(dim)):
        return dim
    return simple(_edge(dim, computed, True))


def _edge(dim: Any, computed: dict[Any, Any], top: bool) -> Any:
    """The upper or lower end of what an expression can be."""

    def end(part: Any, up: bool = True) -> Any:
        return _edge(part, computed, top == up)

    kind = type(dim).__name__
    if not any(node in computed for node in walk(dim)):
        return dim
    if isinstance(dim, tirx.Var):
        return _edge(wide(computed[dim]), computed, True) if top else wide(0)
    if kind == "Sub":
        return end(dim.a) - end(dim.b, False)
    if kind in ("Add", "Max", "Min"):
        return _JOIN[kind](end(dim.a), end(dim.b))
    if kind == "Mul" and isinstance(dim.b, tirx.IntImm):
        return end(dim.a, int(dim.b) >= 0) * dim.b
    if kind == "Mul" and _natural(dim.a) and _natural(dim.b):
        return end(dim.a) * end(dim.b)
    if kind == "FloorDiv" and isinstance(dim.b, tirx.IntImm) and int(dim.b) > 0:
        return tirx.floordiv(end(dim.a), dim.b)
    if kind == "Select":
        pick = tirx.max if top else tirx.min
        return pick(end(dim.true_value), end(dim.false_value))
    if kind == "FloorMod" and isinstance(dim.b, tirx.IntImm):
        return dim.b - 1 if top else wide(0)
    raise ValueError(f"the largest value of {dim} cannot be told")


_JOIN = {"Add": operator.add, "Max": tirx.max, "Min": tirx.min}


def _natural(expr: Any) -> bool:
    """Whether an expression is at least 0 whatever its symbols are."""
    analyzer = tvm.sym.Analyzer()
    for node in walk(expr):
        if isinstance(node, tirx.Var):
            extent = tirx.const(_NO_BOUND, "int64")
            analyzer.bind(node, tvm.ir.Range.from_min_extent(wide(0), extent))
    return bool(analyzer.can_prove(expr >= 0))


def wide(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _round_up(size: Any) -> Any:
    if isinstance(size, int):
        return -(-size // ALIGN) * ALIGN
    return tirx.floordiv(size + (ALIGN - 1), tirx.const(ALIGN, "int64")) * ALIGN


def _at(size: Any, limits: dict[Any, int | None], default: int) -> int:
    """An expression's value with every dim at its bound."""
    if isinstance(size, int):
        return size
    analyzer = tvm.sym.Analyzer()
    for symbol, limit in limits.items():
        analyzer.bind(symbol, tirx.const(limit or default, "int64"))
    return int(analyzer.simplify(size))


def _most(size: Any, limits: dict[Any, int | None]) -> int | None:
    """The largest value of an expression over dims from 1 to their bounds; None: no bound."""
    if isinstance(size, int):
        return size
    analyzer = tvm.sym.Analyzer()
    for symbol, limit in limits.items():
        if limit is None:
            return None
        extent = tirx.const(limit, "int64")
        analyzer.bind(symbol, tvm.ir.Range.from_min_extent(tirx.const(1, "int64"), extent))
    most = int(analyzer.const_int_bound(analyzer.simplify(size)).max_value)
    return _round_up(max(0, most)) if most < _NO_BOUND else None


_NO_BOUND = 1 << 46  # bytes: more than an address space; the analysis found no useful bound


def plan(program: Program, limits: dict[Any, int | None]) -> None:
    """Gives every workspace storage its live range and offset."""
    blocks: list[Storage] = []
    for index, step in enumerate(program.steps):
        for tensor in [*step.args, *step.outputs]:
            if isinstance(tensor, Tensor) and tensor.storage.kind == "work":
                if tensor.storage not in blocks:
                    tensor.storage.first = index
                    blocks.append(tensor.storage)
                tensor.storage.last = index
    for block in blocks:
        block.size = highest(block.size, program.computed)
    sizes = [_most(block.size, limits) for block in blocks]
    if None not in sizes:
        for block, size in zip(blocks, sizes, strict=True):
            block.size = size
        program.workspace = _first_fit(blocks)
        program.peak = max(
            (
                sum(b.size for b in blocks if b.first <= i <= b.last)
                for i in range(len(program.steps))
            ),
            default=0,
        )
    else:
        program.workspace = _slots(blocks, limits)


def _first_fit(blocks: list[Storage]) -> int:
    """Largest block first, at the lowest offset free over its live range; returns the height."""
    placed: list[Storage] = []
    for block in sorted(blocks, key=lambda b: (-b.size, b.first)):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.last < block.first or block.last < other.first:
                continue
            if offset + block.size <= other.offset:
                break
            offset = max(offset, other.offset + other.size)
        block.offset = offset
        placed.append(block)
    return max((b.offset + b.size for b in blocks), default=0)


def _slots(blocks: list[Storage], limits: dict[Any, int | None]) -> Any:
    """Where a dim has no bound: blocks share slots whose size is the largest of their tenants."""
    slots: list[tuple[list[Storage], int]] = []  # tenants, step after which it is free
    for block in sorted(blocks, key=lambda b: b.first):
        free = [s for s in slots if s[1] < block.first]
        size = _at(block.size, limits, 256)
        best = min(free, key=lambda s: abs(_at(s[0][0].size, limits, 256) - size), default=None)
        if best is not None:
            slots[slots.index(best)] = ([*best[0], block], block.last)
        else:
            slots.append(([block], block.last))
    total: Any = 0
    for tenants, _ in slots:
        height = tenants[0].size
        for tenant in tenants[1:]:
            height = simple(tirx.max(height, tenant.size)) if height is not tenant.size else height
        for tenant in tenants:
            tenant.offset = total
        total = simple(total + height)
    return total
