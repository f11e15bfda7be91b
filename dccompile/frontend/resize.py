"""Resize: every resized axis has a table of the places and weights that an output element takes.

An element is the sum over the product of its axes' entries: one of them for mode nearest, two for
linear, four for cubic. Tables of fixed sizes are computed here as ONNX Runtime computes them,
those of symbolic sizes when called.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import te, tirx

from dccompile.generic.elementwise import number, rounded

from .operator_tools import Converter, Node, constant, dtype_of
from .symbolic import literal
from .symbols import Dim, wide

_EXACT = 1024  # largest denominator of a scale of a symbolic dim: the product is exact
_F = np.float32
_HALF = 1e-6  # ONNX Runtime takes what is nearer to a half for a half
_SYMBOLIC = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")


@dataclass(frozen=True)
class _Axis:
    """One resized axis: from `old` to `new` elements; `roi` is the part taken by tf_crop."""

    at: int
    old: Dim
    new: Dim
    scale: float | None  # None: new / old, in float32
    roi: tuple[float, float]


@dataclass(frozen=True)
class _Mode:
    """The attributes that decide about places and weights."""

    kind: str
    coordinates: str
    nearest: str
    cubic: float
    inside: bool  # cubic weights of places outside count nothing


class Resize(Converter):
    """Also as `DccResize`: with the attribute layout "NHWC" the data are channels-last.

    The scales and sizes keep ONNX's order of dims, channels second.
    """

    sizes = (3,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        mode = _Mode(
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
        tables = [_table(node, axis, mode) for axis in axes]
        fill = node.attr.get("extrapolation_value", 0.0)
        beyond = float(fill) if mode.coordinates == "tf_crop_and_resize" else None
        given = [t for pair in tables for t in pair if t is not None]
        weighted = mode.kind != "nearest"

        def build(data: te.Tensor, *tensors: te.Tensor) -> te.Tensor:
            left = list(tensors)
            pairs = [(left.pop(0), left.pop(0) if weighted else None) for _ in axes]
            return _resized(data, axes, pairs, beyond)

        return node.compute(build, x, *given)


def _with_others(node: Node, x: Any, axes: list[_Axis]) -> list[_Axis]:
    """The spatial axes that stay as they are too: their weights take part in the rounding."""
    shape = node.symbols.shape(x)
    found = {axis.at: axis for axis in axes}
    for at, axis in enumerate(_order(node, len(shape))):
        if axis >= 2 or len(shape) < 4:
            found.setdefault(at, _Axis(at, shape[at], shape[at], 1.0, (0.0, 1.0)))
    return [found[at] for at in sorted(found)]


def _order(node: Node, rank: int) -> list[int]:
    """For each axis of the data its number in ONNX's order."""
    if node.text("layout", "NCHW") == "NHWC":
        return [0, *range(2, rank), 1]
    return list(range(rank))


def _axes(node: Node, x: Any) -> list[_Axis]:
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
                found.append(_Axis(at, shape[at], new, scale, parts[axis]))
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
            found.append(_Axis(at, shape[at], new, scale, parts[axis]))
    return found


def _fixed(*dims: Dim) -> bool:
    return all(isinstance(d, int) for d in dims)


def _scaled(node: Node, old: Dim, scale: float) -> Dim:
    if isinstance(old, int):
        return int(_F(scale) * _F(old))
    exact = Fraction(scale)
    if exact.denominator > _EXACT:
        raise node.refuse(f"scale {scale} of a symbolic dim", "fix the dim with --shape")
    return node.symbols.simple(
        tirx.floordiv(old * exact.numerator, wide(exact.denominator))
    )


def _kept(
    node: Node, shape: list[Dim], order: list[int], sizes: dict[int, Dim],
    parts: dict[int, tuple[float, float]], policy: str,
) -> list[_Axis]:  # fmt: skip
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
        new = int(_away(np.array(scale * _F(old), _F)))
        found.append(_Axis(places[axis], old, new, float(scale), parts[axis]))
    return sorted(found, key=lambda a: a.at)


def _resized(
    data: te.Tensor, axes: list[_Axis], tables: list[tuple[Any, Any]], beyond: float | None
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


# Tables


def _table(node: Node, axis: _Axis, mode: _Mode) -> tuple[Any, Any]:
    """Places int32 (new, taps), -1 where nothing is taken, and weights float32, or None."""
    if _fixed(axis.old, axis.new):
        places, weights = _numbers(axis, mode)
        return literal(places), None if weights is None else literal(weights)
    if mode.coordinates not in _SYMBOLIC or mode.kind == "cubic":
        found = f"mode {mode.kind}, {mode.coordinates}, of symbolic sizes"
        raise node.refuse(found, "fix the input shapes with --shape")
    scalars = [d for d in (axis.old, axis.new) if not isinstance(d, int)]
    weighted = mode.kind == "linear"

    def build(*given: Any) -> list[te.Tensor]:
        left = list(given)
        old, new = (wide(d) if isinstance(d, int) else left.pop(0) for d in (axis.old, axis.new))
        shape = (wide(axis.new), 2 if weighted else 1)

        def spot(i: Any) -> Any:
            return _coordinate(i, old, new, axis.scale, mode)

        if not weighted:
            return [te.compute(shape, lambda i, k: _nearest(spot(i), mode), name="places")]
        places = te.compute(shape, lambda i, k: _neighbour(spot(i), old, k), name="places")
        weights = te.compute(shape, lambda i, k: _share(spot(i), old, k), name="weights")
        return [places, weights]

    made = node.compute(build, *scalars)
    from tvm import relax

    if not weighted:
        return made, None
    return tuple(node.do(relax.TupleGetItem(made, i)) for i in range(2))  # type: ignore[return-value]


def _numbers(axis: _Axis, mode: _Mode) -> tuple[np.ndarray, np.ndarray | None]:
    old, new = int(axis.old), int(axis.new)
    at = _coordinates(axis, mode)
    outside = (at < 0) | (at > _F(old - 1)) if mode.coordinates == "tf_crop_and_resize" else None
    weights = None
    if mode.kind == "nearest":
        places = np.clip(_rounded(at, mode.nearest), 0, old - 1).reshape(new, 1)
    elif mode.kind == "linear":
        inside = np.maximum(_F(0), np.minimum(at, _F(old - 1)))
        low = np.minimum(inside.astype(np.int64), old - 1)
        high = np.minimum(low + 1, old - 1)
        places = np.stack([low, high], 1)
        gaps = np.abs(inside[:, None] - places.astype(_F))[:, ::-1]
        weights = np.where((low == high)[:, None], _F(0.5), gaps).astype(_F)
    else:
        floor = np.floor(at)
        places = floor.astype(np.int64)[:, None] + np.arange(-1, 3)
        weights = _cubic(at - floor, _F(mode.cubic))
        if mode.inside:
            weights = np.where((places < 0) | (places >= old), _F(0), weights)
            weights = weights / weights.sum(1, dtype=_F, keepdims=True)
        places = np.clip(places, 0, old - 1)
    if outside is not None:
        places = np.where(outside[:, None], -1, places)
    return places.astype(np.int32), weights


def _coordinates(axis: _Axis, mode: _Mode) -> np.ndarray:
    """Where in the input each output element lies, float32."""
    i = np.arange(int(axis.new)).astype(_F)
    scale, new, old = _F(axis.scale), _F(axis.new), _F(axis.old)
    kind = mode.coordinates
    if kind == "asymmetric" or scale == 1:
        return i / scale
    if kind == "align_corners":
        return i * (old - _F(1)) / (new - _F(1)) if new != 1 else i * _F(0)
    if kind == "tf_half_pixel_for_nn":
        return (i + _F(0.5)) / scale
    if kind == "tf_crop_and_resize":
        start, end = map(_F, axis.roi)
        if new > 1:
            return start * (old - _F(1)) + i * (end - start) * (old - _F(1)) / (new - _F(1))
        return np.full(1, 0.5 * float((start + end) * (old - _F(1))), _F)
    if kind == "half_pixel_symmetric":
        offset = old / _F(2) * (_F(1) - new / (scale * old))
        return (float(offset) + (i.astype(float) + 0.5) / float(scale) - 0.5).astype(_F)
    if kind == "pytorch_half_pixel" and new <= 1:
        return i * _F(0)
    return (i + _F(0.5)) / scale - _F(0.5)


def _away(at: np.ndarray) -> np.ndarray:
    """Rounded to the nearest integer, halves away from 0."""
    wider = at.astype(np.float64)
    return np.trunc(wider + np.copysign(0.5, wider))


def _rounded(at: np.ndarray, how: str) -> np.ndarray:
    if how == "floor":
        return np.floor(at).astype(np.int64)
    if how == "ceil":
        return np.ceil(at).astype(np.int64)
    floor = np.floor(at)
    half = np.abs(at - floor - _F(0.5)) < _F(_HALF)
    side = floor if how == "round_prefer_floor" else np.ceil(at)
    return np.where(half, side, _away(at)).astype(np.int64)


def _cubic(s: np.ndarray, a: np.float32) -> np.ndarray:
    """Keys' weights of the four neighbours of a place that lies `s` behind the second one."""
    one, two = _F(1), _F(2)

    def far(t: np.ndarray) -> np.ndarray:
        return ((a * t - _F(5) * a) * t + _F(8) * a) * t - _F(4) * a

    def near(t: np.ndarray) -> np.ndarray:
        return ((a + two) * t - (a + _F(3))) * t * t + one

    return np.stack([far(s + one), near(s), near(one - s), far(two - s)], 1).astype(_F)


# The same of symbolic sizes


def _coordinate(i: Any, old: Any, new: Any, scale: float | None, mode: _Mode) -> Any:
    """A place within 0 and old - 1."""

    def real(value: Any) -> Any:
        return tirx.Cast("float32", value)

    half, one = tirx.const(0.5, "float32"), tirx.const(1.0, "float32")
    by = tirx.const(scale, "float32") if scale is not None else real(new) / real(old)
    zero = tirx.const(0.0, "float32")
    if mode.coordinates == "asymmetric":
        at = real(i) / by
    elif mode.coordinates == "align_corners":
        under = tirx.max(real(new) - one, one)
        at = real(i) * (real(old) - one) / under
    else:
        at = (real(i) + half) / by - half
        if mode.coordinates == "pytorch_half_pixel":
            at = tirx.Select(new > 1, at, zero)
    at = tirx.Select(at > zero, at, zero)
    last = real(old) - one
    return tirx.Select(at < last, at, last)


def _nearest(at: Any, mode: _Mode) -> Any:
    floor = tirx.floor(at)
    gap = at - floor
    test = {
        "floor": None,
        "ceil": gap > 0,
        "round_prefer_floor": gap >= 0.5 + _HALF,
        "round_prefer_ceil": gap > 0.5 - _HALF,
    }[mode.nearest]
    low = tirx.Cast("int32", floor)
    return low if test is None else tirx.Select(test, low + 1, low)


def _neighbour(at: Any, old: Any, k: Any) -> Any:
    low = tirx.Cast("int32", at)
    return tirx.min(low + tirx.Cast("int32", k), tirx.Cast("int32", old - 1))


def _share(at: Any, old: Any, k: Any) -> Any:
    low = tirx.Cast("int32", at)
    gap = at - tirx.Cast("float32", low)
    half, one = tirx.const(0.5, "float32"), tirx.const(1.0, "float32")
    side = tirx.Select(tirx.EQ(k, 0), one - gap, gap)
    return tirx.Select(low >= tirx.Cast("int32", old - 1), half, side)


RESIZE = {"Resize": Resize, "DccResize": Resize}
