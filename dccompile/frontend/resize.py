"""Resize: every resized axis has a table of the places and weights that an output element takes.

An element is the sum over the product of its axes' entries: one of them for mode nearest, two for
linear, four for cubic. Tables of fixed sizes are constants, those of
symbolic sizes are computed in the call.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from dccompile.generic.elementwise import number, rounded

from .operator_tools import Converter, Node, constant, dtype_of
from .resize_tables import Axis, Mode, away, numbers, table
from .symbolic import literal
from .symbols import Dim, wide

_EXACT = 1024  # largest denominator of a scale of a symbolic dim: the product is exact
_F = np.float32
_SYMBOLIC = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")


class Resize(Converter):
    """Also as `DccResize`: with the attribute layout "NHWC" the data are channels-last.

    The scales and sizes keep ONNX's order of dims, channels second.
    """

    sizes = (3,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        mode = Mode(
            node.text("mode", "nearest"),
            node.text("coordinate_transformation_mode", "half_pixel"),
            node.text("nearest_mode", "round_prefer_floor"),
            float(node.attr.get("cubic_coeff_a", -0.75)),
            int(node.attr.get("exclude_outside", 0)) == 1,
        )
        if int(node.attr.get("antialias", 0)):
            raise node.refuse("antialias is not supported", "resize outside the model")
        axes = _axes(node, x)
        if not axes:
            return x
        if mode.kind == "linear" and not dtype_of(x).startswith("float"):
            axes = _with_others(node, x, axes)
        tables = [_table(node, x, axis, mode) for axis in axes]
        fill = node.attr.get("extrapolation_value", 0.0)
        beyond = float(fill) if mode.coordinates == "tf_crop_and_resize" else None
        given = [t for pair in tables for t in pair if t is not None]
        weighted = mode.kind != "nearest"

        def build(data: te.Tensor, *tensors: te.Tensor) -> te.Tensor:
            left = list(tensors)
            pairs = [(left.pop(0), left.pop(0) if weighted else None) for _ in axes]
            return _resized(data, axes, pairs, beyond)

        return node.compute(build, x, *given)


def _with_others(node: Node, x: Any, axes: list[Axis]) -> list[Axis]:
    """The spatial axes that stay as they are too: their weights take part in the rounding."""
    shape = node.symbols.shape(x)
    found = {axis.at: axis for axis in axes}
    for at, axis in enumerate(_order(node, len(shape))):
        if axis >= 2 or len(shape) < 4:
            found.setdefault(at, Axis(at, shape[at], shape[at], 1.0, (0.0, 1.0)))
    return [found[at] for at in sorted(found)]


def _order(node: Node, rank: int) -> list[int]:
    """For each axis of the data its number in ONNX's order."""
    if node.text("layout", "NCHW") == "NHWC":
        return [0, *range(2, rank), 1]
    return list(range(rank))


def _axes(node: Node, x: Any) -> list[Axis]:
    order = _order(node, len(node.symbols.shape(x)))
    shape = node.symbols.shape(x)
    rank = len(shape)
    given = [int(a) % rank for a in node.attr.get("axes", range(rank))]
    roi = constant(node.get(1)) if node.has(1) else None
    crop = np.zeros(0, _F) if roi is None else roi.astype(_F).reshape(-1)
    parts = {a: (0.0, 1.0) for a in range(rank)}
    if crop.size == 2 * len(given):
        parts.update({a: (crop[i], crop[i + len(given)]) for i, a in enumerate(given)})
    scales = constant(node.get(2)) if node.has(2) else None
    found = []
    if scales is not None and scales.size:
        asked = dict(zip(given, scales.astype(_F).reshape(-1).tolist(), strict=True))
        for at, axis in enumerate(order):
            scale = asked.get(axis, 1.0)
            if not scale > 0:
                raise node.wrong(f"scale {scale}", "choose one above 0")
            if scale != 1.0:
                new = _scaled(node, shape[at], scale)
                found.append(Axis(at, shape[at], new, scale, parts[axis]))
        return found
    if not node.has(3):
        raise node.refuse("its scales are computed from data", "make them constants")
    sizes = dict(zip(given, node.dims(3), strict=True))
    node.least(list(sizes.values()), 1, "a size")
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        return _kept(node, shape, order, sizes, parts, policy)
    for at, axis in enumerate(order):
        new = sizes.get(axis, shape[at])
        if not node.symbols.same(new, shape[at]):
            scale = float(_F(new) / _F(shape[at])) if _fixed(new, shape[at]) else None
            found.append(Axis(at, shape[at], new, scale, parts[axis]))
    return found


def _fixed(*dims: Dim) -> bool:
    return all(isinstance(d, int) for d in dims)


def _scaled(node: Node, old: Dim, scale: float) -> Dim:
    if isinstance(old, int):
        return int(_F(scale) * _F(old))
    exact = Fraction(scale)
    if exact.denominator > _EXACT:
        raise node.refuse(f"scale {scale} of a symbolic dim", "fix the dim with --shape")
    return node.symbols.simple(tirx.floordiv(old * exact.numerator, wide(exact.denominator)))


def _kept(
    node: Node, shape: list[Dim], order: list[int], sizes: dict[int, Dim],
    parts: dict[int, tuple[float, float]], policy: str,
) -> list[Axis]:  # fmt: skip
    """One scale for all axes: the least or the largest of those that the sizes ask for."""
    places = {axis: at for at, axis in enumerate(order)}
    if not _fixed(*sizes.values(), *(shape[places[a]] for a in sizes)):
        raise node.refuse(f"{policy} with symbolic sizes", "fix the input shapes with --shape")
    asked = [_F(new) / _F(shape[places[a]]) for a, new in sizes.items()]
    scale = min(asked) if policy == "not_larger" else max(asked)
    if scale == 1:
        return []
    found = []
    for axis in sizes:
        old = shape[places[axis]]
        new = int(away(np.array(scale * _F(old), _F)))
        found.append(Axis(places[axis], old, new, float(scale), parts[axis]))
    return sorted(found, key=lambda a: a.at)


def _resized(
    data: te.Tensor, axes: list[Axis], tables: list[tuple[Any, Any]], beyond: float | None
) -> te.Tensor:
    kind = str(data.dtype)
    real = kind if kind.startswith("float") else "float32"
    shape = list(data.shape)
    for axis in axes:
        shape[axis.at] = wide(axis.new)

    def place(table: te.Tensor, i: Any, k: int) -> Any:
        return tirx.max(table(i, tirx.const(k, "int64")), tirx.const(0, "int32"))

    def terms(index: list[Any], rest: int, weight: Any) -> list[Any]:
        """The parts of an element, from axis number `rest` on; `weight` is of the axes before."""
        if rest == len(axes):
            if weight is None:
                return [data(*index)]
            part = tirx.Cast(real, data(*index))
            return [rounded(weight * part) if real != kind else weight * part]
        at = axes[rest].at
        places, weights = tables[rest]
        found, own = [], index[at]
        for k in range(int(places.shape[1])):
            factor = weight
            if weights is not None:
                w = tirx.Cast(real, weights(own, tirx.const(k, "int64")))
                factor = w if weight is None else weight * w
            moved = [*index[:at], place(places, own, k), *index[at + 1 :]]
            found += terms(moved, rest + 1, factor)
        return found

    def element(*index: Any) -> Any:
        parts = terms(list(index), 0, None)
        result = sum(parts[1:], parts[0])
        result = result if str(result.ty) == kind else _narrowed(result, kind)
        if beyond is None:
            return result
        zero = tirx.const(0, "int64")
        outside = [tables[i][0](index[a.at], zero) < 0 for i, a in enumerate(axes)]
        return tirx.Select(tirx.any(*outside), number(beyond, result), result)

    return te.compute(shape, element, name="resize")


def _narrowed(value: Any, kind: str) -> Any:
    return tirx.Cast(kind, tirx.Cast("int32", value))


def _table(node: Node, x: Any, axis: Axis, mode: Mode) -> tuple[Any, Any]:
    """Places int32 (new, taps), -1 where nothing is taken, and weights float32, or None."""
    if _fixed(axis.old, axis.new):
        places, weights = numbers(axis, mode)
        return literal(places), None if weights is None else literal(weights)
    if mode.coordinates not in _SYMBOLIC or mode.kind == "cubic":
        found = f"mode {mode.kind}, {mode.coordinates}, of symbolic sizes"
        raise node.refuse(found, "fix the input shapes with --shape")
    weighted = mode.kind == "linear"
    func = table(node.symbols.shape(x), dtype_of(x), axis, mode, node.symbols.gpu)
    shape = [wide(axis.new), 2 if weighted else 1]
    places = relax.TensorType(shape, "int32")
    if not weighted:
        return node.call(func, "resize_table", [x], places), None
    both = node.call(func, "resize_table", [x], [places, relax.TensorType(shape, "float32")])
    return node.do(relax.TupleGetItem(both, 0)), node.do(relax.TupleGetItem(both, 1))


RESIZE = {"Resize": Resize, "DccResize": Resize}
