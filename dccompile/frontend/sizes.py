"""Converters whose sizes may be expressions of the model's symbols.

An input named in `sizes` arrives as a `Known` where it follows from shapes; where it is computed
from data instead, the node is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from tvm import relax, te, tirx
from tvm.tirx import if_then_else

from dccompile.generic.elementwise import one

from .operator_tools import Converter, Node, constant, dtype_of
from .symbolic import literal
from .symbols import Dim, spell, wide

_END = 2**31 - 1  # as the end of a slice: to the end


def _listed(dims: Sequence[Dim]) -> str:
    return "[" + ", ".join(spell(d) for d in dims) + "]"


def broadcast(node: Node, x: Any, wanted: Sequence[Dim]) -> Any:
    """ONNX's Expand: a 1 on either side takes the other side's extent."""
    symbols, shape = node.symbols, node.symbols.shape(x)
    rank = max(len(shape), len(wanted))
    result: list[Dim] = []
    have = [1] * (rank - len(shape)) + shape
    for a, b in zip(have, [1] * (rank - len(wanted)) + list(wanted), strict=True):
        if not one(a) and not one(b):
            _must_equal(node, a, b, f"{_listed(shape)} does not expand to {_listed(wanted)}")
        result.append(b if one(a) else a)
    if len(result) == len(shape) and all(map(symbols.same, shape, result)):
        return x
    return relax.op.broadcast_to(x, relax.ShapeExpr([wide(d) for d in result]))


def _must_equal(node: Node, a: Dim, b: Dim, found: str) -> None:
    """An error now where two dims are never equal, else at the calls where they are not."""
    if node.symbols.differ(a, b):
        raise node.wrong(found, "correct the shapes")
    node.symbols.require_equal(a, b, f"{node.where}: {found}")


class Expand(Converter):
    sizes = (1,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        dims = node.dims(1)
        node.least(dims, 0, "a dim of its shape")
        return broadcast(node, node.get(0), dims)


class ConstantOfShape(Converter):
    sizes = (0,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        dims = node.dims(0)
        node.least(dims, 0, "a dim of its shape")
        value = node.attr.get("value")
        fill = np.zeros((), "float32")
        if value is not None:
            fill = np.asarray(onnx.numpy_helper.to_array(value)).reshape(-1)[0]
        fill = np.asarray(fill)
        if all(isinstance(d, int) for d in dims) and np.prod(dims, dtype=np.float64) <= 4096:
            return literal(np.full(dims, fill, fill.dtype))
        shape = relax.ShapeExpr([wide(d) for d in dims])
        return relax.op.full(shape, literal(fill), str(fill.dtype))


class Reshape(Converter):
    sizes = (1,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, wanted, symbols = node.get(0), node.dims(1), node.symbols
        shape = symbols.shape(x)
        if not node.attr.get("allowzero", 0):
            wanted = [shape[i] if d == 0 and one_int(d) else d for i, d in enumerate(wanted)]
        for dim in wanted:
            if not one_int(dim):
                node.least([dim], 0 if symbols.may_vanish(dim) else 1, "a dim of its shape")
        open_at = [i for i, d in enumerate(wanted) if one_int(d) and d == -1]
        if len(open_at) == 1:
            rest = [d for i, d in enumerate(wanted) if i != open_at[0]]
            if any(one_int(d) and d == 0 for d in rest):
                raise node.wrong("its -1 has no value beside a 0", "give the dim")
            wanted[open_at[0]] = symbols.quotient(shape, rest)
        if len(open_at) > 1 or any(one_int(d) and d < 0 for d in wanted):
            raise node.wrong(f"the shape is {_listed(wanted)}", "give one -1 at most")
        sides = symbols.reduced(shape, wanted)
        _must_equal(node, *sides, f"{_listed(shape)} does not fill {_listed(wanted)}")
        known = constant(x)
        if known is not None and all(map(one_int, wanted)):
            return literal(known.reshape(wanted))
        if len(shape) == len(wanted) and all(map(symbols.same, shape, wanted)):
            return x
        return relax.op.reshape(x, relax.ShapeExpr([wide(d) for d in wanted]))


def one_int(dim: Dim) -> bool:
    return isinstance(dim, int)


class Slice(Converter):
    sizes = (1, 2, 3, 4)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, symbols = node.get(0), node.symbols
        shape = symbols.shape(x)
        starts, ends = node.dims(1), node.dims(2)
        axes = node.dims(3) if node.has(3) else list(range(len(starts)))
        steps = node.dims(4) if node.has(4) else [1] * len(starts)
        if not all(map(one_int, [*axes, *steps])):
            raise node.refuse("its axes or steps are symbolic", "make them constants")
        begin: dict[int, tuple[Dim, int]] = {}
        result = list(shape)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            axis %= len(shape)
            first, count = _range(node, start, end, step, shape[axis])
            if step != 1 or not symbols.same(count, shape[axis]):
                begin[axis], result[axis] = (first, step), count
        if not begin:
            return x
        known = constant(x)
        if known is not None and all(one_int(d) for a in begin for d in (begin[a][0], result[a])):
            for axis, (first, step) in begin.items():
                places = first + step * np.arange(result[axis])
                known = np.take(known, places, axis)
            return literal(np.ascontiguousarray(known))

        def build(data: te.Tensor, *offsets: Any) -> te.Tensor:
            left = list(offsets)
            first = {a: s if one_int(s) else left.pop(0) for a, (s, _) in begin.items()}

            def value(*index: Any) -> Any:
                place = list(index)
                for axis, (_, step) in begin.items():
                    place[axis] = index[axis] * step + first[axis]
                return data(*place)

            return te.compute([wide(d) for d in result], value, name="slice")

        return node.compute(build, x, *(s for s, _ in begin.values() if not one_int(s)))


def _range(node: Node, start: Dim, end: Dim, step: int, extent: Dim) -> tuple[Dim, Dim]:
    """First element and number of elements of a slice of one axis, as ONNX clamps them."""
    low, high = (0, extent) if step > 0 else (-1, extent - 1)
    first = _clamped(node, start, extent, 0, high)
    last = _clamped(node, end, extent, low, high)
    span = last - first + step - 1 if step > 0 else first - last - step - 1
    count = tirx.floordiv(wide(span), wide(abs(step)))
    return first, node.symbols.simple(tirx.max(count, wide(0)))


def _clamped(node: Node, place: Dim, extent: Dim, low: int, high: Dim) -> Dim:
    """A place counted from the front or the end, within low..high."""
    symbols = node.symbols
    if one_int(place):
        if place >= _END:
            return symbols.simple(high)
        if place < -_END:
            return low
        negative: bool | None = place < 0
    else:
        negative = symbols.holds(place < 0)
    if negative is None:
        place = tirx.Select(place < 0, place + extent, place)
    elif negative:
        place = place + extent
    return symbols.simple(tirx.max(tirx.min(wide(place), wide(high)), wide(low)))


class Tile(Converter):
    sizes = (1,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, times, symbols = node.get(0), node.dims(1), node.symbols
        shape = symbols.shape(x)
        node.least(times, 0, "a repeat")
        result = [symbols.product(pair) for pair in zip(shape, times, strict=True)]
        if all(one(d) or one(t) for d, t in zip(shape, times, strict=True)):
            if all(map(symbols.same, shape, result)):
                return x
            return relax.op.broadcast_to(x, relax.ShapeExpr([wide(d) for d in result]))

        def build(data: te.Tensor) -> te.Tensor:
            def value(*index: Any) -> Any:
                rows = zip(index, data.shape, times, strict=True)
                return data(*(i if one(t) else tirx.floormod(i, d) for i, d, t in rows))

            return te.compute([wide(d) for d in result], value, name="tile")

        return node.compute(build, x)


class Range(Converter):
    sizes = (0, 1, 2)

    @classmethod
    def convert(cls, node: Node) -> Any:
        (start, limit, delta), kind = (node.dims(i)[0] for i in range(3)), node.kind(0)
        symbols = node.symbols
        if not one_int(delta) or delta == 0:
            raise node.refuse("its step is symbolic or 0", "make the step a constant")
        span = limit - start + delta - 1 if delta > 0 else start - limit - delta - 1
        count = tirx.floordiv(wide(span), wide(abs(delta)))
        count = symbols.simple(tirx.max(count, wide(0)))
        if one_int(count) and one_int(start):
            steps = np.arange(count).astype(kind) * np.array(delta, kind)
            return literal(steps + np.array(start, kind))

        def build(*first: Any) -> te.Tensor:
            begin = first[0] if first else wide(start)
            return te.compute(
                (wide(count),), lambda i: tirx.Cast(str(kind), i * delta + begin), name="range"
            )

        return node.compute(build, *([] if one_int(start) else [start]))


class Split(Converter):
    """By sizes, or into as many equal parts as there are outputs, the last one possibly less."""

    sizes = (1,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, symbols = node.get(0), node.symbols
        shape = symbols.shape(x)
        axis = int(node.attr.get("axis", 0)) % len(shape)
        extent = shape[axis]
        if node.opset < 13 and "split" in node.attr:
            parts: list[Dim] = [int(p) for p in node.attr["split"]]
        elif node.has(1):
            parts = node.dims(1)
        else:
            part = symbols.quotient([symbols.simple(extent + node.outputs - 1)], [node.outputs])
            last = symbols.simple(extent - part * (node.outputs - 1))
            parts = [part] * (node.outputs - 1) + [last]
        node.least(parts, 0, "a part")
        total = symbols.simple(sum(parts[1:], parts[0]))
        if not symbols.same(total, extent):
            found = f"the parts add up to {spell(total)} of {spell(extent)}"
            _must_equal(node, total, extent, found)
        results, begin = [], 0
        for part in parts:
            results.append(node.do(_part(node, x, shape, axis, begin, part)))
            begin = symbols.simple(begin + part)
        return relax.Tuple(results) if len(results) > 1 else results[0]


def _part(node: Node, x: Any, shape: list[Dim], axis: int, begin: Dim, size: Dim) -> Any:
    def build(data: te.Tensor, *offset: Any) -> te.Tensor:
        first = offset[0] if offset else wide(begin)
        dims = [wide(size if a == axis else d) for a, d in enumerate(shape)]
        return te.compute(
            dims, lambda *i: data(*i[:axis], i[axis] + first, *i[axis + 1 :]), name="split"
        )

    return node.compute(build, x, *([] if one_int(begin) else [begin]))


class Pad(Converter):
    """Padding by a constant where a pad is symbolic; everything else is TVM's."""

    sizes = (1, 3)

    @classmethod
    def convert(cls, node: Node) -> Any:
        pads = node.dims(1) if node.has(1) else []
        if all(map(one_int, pads)):
            return node.plain()
        x, symbols = node.get(0), node.symbols
        shape = symbols.shape(x)
        axes = node.dims(3) if node.has(3) else list(range(len(shape)))
        fill = constant(node.get(2)) if node.has(2) else np.zeros((), dtype_of(x))
        if node.text("mode", "constant") != "constant" or fill is None:
            raise node.refuse("its pads are symbolic", "pad by constants, or by a constant value")
        before = dict(zip((int(a) % len(shape) for a in axes), pads, strict=False))
        after = dict(zip(before, pads[len(before) :], strict=True))
        result = [symbols.simple(d + before.get(a, 0) + after.get(a, 0))
                  for a, d in enumerate(shape)]  # fmt: skip
        node.least(result, 0, "a dim of its result")
        number = tirx.const(fill.reshape(-1)[0].item(), dtype_of(x))

        def build(data: te.Tensor, *offsets: Any) -> te.Tensor:
            left = list(offsets)
            first = {a: wide(p) if one_int(p) else left.pop(0) for a, p in before.items()}

            def value(*index: Any) -> Any:
                place = [i - first[a] if a in first else i for a, i in enumerate(index)]
                tests = [tirx.And(place[a] >= 0, place[a] < data.shape[a]) for a in first]
                return if_then_else(tirx.all(*tests), data(*place), number)

            return te.compute([wide(d) for d in result], value, name="pad")

        return node.compute(build, x, *(p for p in before.values() if not one_int(p)))


SIZES = {c.__name__: c for c in (Expand, ConstantOfShape, Reshape, Slice, Tile, Range, Split, Pad)}
