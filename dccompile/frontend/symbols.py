"""Dims as expressions of the model's symbols: arithmetic, equality, and what callers must keep.

A symbol stands for every number in its range. What cannot be proven for all of them, such as that
a reshape of [N, 6] to [N//2, 12] has room for all elements, becomes a requirement: compiled code
checks it when called and raises a data error (DC2112).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, tirx

from dccompile.generic.lanes import walk

from .external import MAX_DIM

Dim = Any  # int, or an int64 expression of symbols


@dataclass(frozen=True)
class Requirement:
    """A condition on the symbols, and the message of the error where it does not hold."""

    condition: Any
    message: str


@dataclass(frozen=True)
class Computed:
    """A symbol whose value the program computes: from 0 to `bound`, read from the tensor `count`.

    `count` is a value of the Relax module, int64 (1,), made by the call that makes the tensor.
    """

    symbol: Any
    bound: Dim
    count: Any


class Symbols:
    """The symbols of one model, their ranges, and the requirements collected on the way.

    `gpu` tells that functions written by hand are for a GPU.
    """

    def __init__(
        self, ranges: Mapping[str, tuple[int, int | None]] | None = None, gpu: bool = False
    ) -> None:
        self.gpu = gpu
        self.ranges = dict(ranges or {})
        self.analyzer = tvm.sym.Analyzer()
        self.bound: list[Any] = []
        self.requirements: list[Requirement] = []
        self.computed: list[Computed] = []
        self.fresh: list[Any] = []  # the symbols of `new`

    def new(self, name: str, bound: Dim) -> Any:
        """A symbol for a number that the program computes, 0 to `bound`; see `Computed`."""
        name = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
        name = name if name and not name[0].isdigit() else f"d{name}"
        taken = {*self.ranges, *(v.name for v in self.bound)}
        fresh, number = name, 1
        while fresh in taken:
            number += 1
            fresh = f"{name}_{number}"
        most = self.analyzer.const_int_bound(wide(bound)).max_value
        self.ranges[fresh] = (0, int(most) if most <= MAX_DIM else None)
        symbol = tirx.Var(fresh, "int64")
        self.bind([symbol])
        self.fresh.append(symbol)
        return symbol

    def bind(self, dims: Sequence[Dim]) -> None:
        """Learns the ranges of the symbols among the dims of a tensor."""
        for dim in dims:
            if isinstance(dim, tirx.Var) and not any(dim.same_as(v) for v in self.bound):
                low, high = self.ranges.get(dim.name, (1, None))
                extent = _const((MAX_DIM if high is None else high) - low + 1)
                self.analyzer.bind(dim, ir.Range.from_min_extent(_const(low), extent))
                self.bound.append(dim)

    def simple(self, dim: Dim) -> Dim:
        """The shortest known form; an int where it is constant."""
        if isinstance(dim, (int, bool)):
            return int(dim)
        dim = self.analyzer.simplify(dim)
        return int(dim) if isinstance(dim, tirx.IntImm) else dim

    def shape(self, value: Any) -> list[Dim]:
        """Dims of a tensor. Raises ValueError where even the rank is not known."""
        if value.ty.shape is None:
            raise ValueError("the rank of an input is not known")
        dims = list(value.ty.shape.values)
        self.bind(dims)
        return [self.simple(d) for d in dims]

    def product(self, dims: Sequence[Dim]) -> Dim:
        total: Any = 1
        for dim in dims:
            total = dim if isinstance(total, int) and total == 1 else total * dim
        return self.simple(total)

    def quotient(self, dims: Sequence[Dim], by: Sequence[Dim]) -> Dim:
        """The product of `dims` over that of `by`, or over 1 where that is 0, rounded down."""
        above, below = self.reduced(dims, by)
        if self.holds(wide(below) >= 1) is not True:
            below = self.simple(tirx.max(wide(below), _const(1)))
        if isinstance(below, int):
            if isinstance(above, int):
                return above // below
            return self.simple(tirx.floordiv(above, _const(below)))
        return self.simple(tirx.floordiv(wide(above), below))

    def reduced(self, a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, Dim]:
        """The products of two shapes, each at least 1, without the factors that they share."""
        one, other = self._factors(a), []
        for factor in self._factors(b):
            at = next((i for i, f in enumerate(one) if self.same(f, factor)), None)
            if at is None:
                other.append(factor)
            else:
                one.pop(at)
        numbers = [math.prod(f for f in fs if isinstance(f, int)) for fs in (one, other)]
        shared = math.gcd(*numbers)
        if shared == 0:
            return self.product(a), self.product(b)
        rest = [[f for f in fs if not isinstance(f, int)] for fs in (one, other)]
        left, right = (
            self.product([n // shared, *r]) for n, r in zip(numbers, rest, strict=True)
        )  # fmt: skip
        return left, right

    def _factors(self, dims: Sequence[Dim]) -> list[Dim]:
        found: list[Dim] = []
        for dim in dims:
            if isinstance(dim, tirx.Mul):
                found += self._factors([dim.a, dim.b])
            else:
                found.append(self.simple(dim))
        return [f for f in found if not (isinstance(f, int) and f == 1)]

    def holds(self, condition: Any) -> bool | None:
        """Whether a condition holds for all numbers, for none (False), or for some (None)."""
        if isinstance(condition, bool):
            return condition
        if self.analyzer.can_prove(condition):
            return True
        return False if self.analyzer.can_prove(tirx.Not(condition)) else None

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether two dims are equal for all numbers."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self.analyzer.can_prove_equal(wide(a), wide(b)))

    def differ(self, a: Dim, b: Dim) -> bool:
        """Whether two dims are unequal for all numbers."""
        return self.holds(tirx.NE(wide(a), wide(b))) is True

    def require_equal(self, a: Dim, b: Dim, message: str) -> None:
        """`message` names the place and rule; both sides are added where they can differ."""
        if not self.same(a, b):
            rule = f"{spell(a)} = {spell(b)}"
            for side, other in ((a, b), (b, a)):
                if isinstance(other, tirx.Min):
                    left = [d for d in (other.a, other.b) if not self.same(d, side)]
                    if len(left) == 1:
                        rule = f"{spell(side)} <= {spell(left[0])}"
            self._require(tirx.EQ(wide(a), wide(b)), f"{message}: {rule}")

    def may_vanish(self, dim: Dim) -> bool:
        """Whether a computed symbol is part of a dim, which may then be 0."""
        if isinstance(dim, int):
            return False
        return any(n.same_as(v) for n in walk(dim) for v in self.fresh)

    def require_least(self, dims: Sequence[Dim], low: int, message: str) -> None:
        """That dims are at least `low`; `message` names the place."""
        for dim in dims:
            if self.holds(wide(dim) >= low) is not True:
                self._require(tirx.GE(wide(dim), _const(low)), f"{message}: {spell(dim)} >= {low}")

    def _require(self, condition: Any, text: str) -> None:
        data = any(n.same_as(v) for n in walk(condition) for v in self.fresh)
        source = "sizes that the data give" if data else "input shapes"
        text = f"DC2112: {text} is required of the {source}"
        if all(r.message != text for r in self.requirements):
            self.requirements.append(Requirement(condition, text))


def wide(value: Dim) -> Any:
    """An int64 expression."""
    return _const(value) if isinstance(value, int) else value


def _const(value: int) -> Any:
    return tirx.const(value, "int64")


_SIGNS = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%"}


def spell(dim: Dim) -> str:
    """``N*4`` for people."""
    if isinstance(dim, tirx.Var):
        return str(dim.name)
    if isinstance(dim, tirx.IntImm):
        return str(int(dim))
    kind = type(dim).__name__
    if kind in ("Min", "Max"):
        return f"{kind.lower()}({spell(dim.a)}, {spell(dim.b)})"
    if kind not in _SIGNS:
        return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(dim))
    sides = [spell(side) for side in (dim.a, dim.b)]
    if kind not in ("Add", "Sub"):
        sides = [f"({s})" if re.search(r"[+ -]", s) else s for s in sides]
    elif kind == "Sub" and re.search(r"[+ -]", sides[1]):
        sides[1] = f"({sides[1]})"
    return f"{sides[0]}{_SIGNS[kind]}{sides[1]}"
