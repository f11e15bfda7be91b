"""Where a resized axis takes its elements from, and with what weights.

`numbers` computes the tables of fixed sizes as ONNX Runtime does, operation by operation in
float32; `table` makes a function that computes those of symbolic sizes in the call.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dccompile.generic.counted import attributes
from dccompile.generic.gpu_ir import items
from dccompile.generic.lanes import local, name

from .symbols import Dim, wide

_HALF = 1e-6  # ONNX Runtime takes what is nearer to a half for a half
_F = np.float32


@dataclass(frozen=True)
class Axis:
    """One resized axis: from `old` to `new` elements; `roi` is the part taken by tf_crop."""

    at: int
    old: Dim
    new: Dim
    scale: float | None  # None: new / old, in float32
    roi: tuple[float, float]


@dataclass(frozen=True)
class Mode:
    """The attributes that decide about places and weights."""

    kind: str
    coordinates: str
    nearest: str
    cubic: float
    inside: bool  # cubic weights of places outside count nothing


def numbers(axis: Axis, mode: Mode) -> tuple[np.ndarray, np.ndarray | None]:
    old, new = int(axis.old), int(axis.new)
    at = coordinates(axis, mode)
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


def coordinates(axis: Axis, mode: Mode) -> np.ndarray:
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


def away(at: np.ndarray) -> np.ndarray:
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
    return np.where(half, side, away(at)).astype(np.int64)


def _cubic(s: np.ndarray, a: np.float32) -> np.ndarray:
    """Keys' weights of the four neighbours of a place that lies `s` behind the second one."""
    one, two = _F(1), _F(2)

    def far(t: np.ndarray) -> np.ndarray:
        return ((a * t - _F(5) * a) * t + _F(8) * a) * t - _F(4) * a

    def near(t: np.ndarray) -> np.ndarray:
        return ((a + two) * t - (a + _F(3))) * t * t + one

    return np.stack([far(s + one), near(s), near(one - s), far(two - s)], 1).astype(_F)


# The same of symbolic sizes


def table(shape: list[Dim], dtype: str, axis: Axis, mode: Mode, gpu: bool = False) -> Any:
    """PrimFunc(x, places int32 (new, taps), weights float32 (new, 2) if linear).

    `shape` and `dtype` are of x, which only tells the sizes.
    """
    old, new = wide(axis.old), wide(axis.new)
    weighted = mode.kind == "linear"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("resize_table")
        T.arg("x", T.buffer(shape, dtype))
        places = T.arg("places", T.buffer([new, 2 if weighted else 1], "int32"))
        weights = T.arg("weights", T.buffer([new, 2], "float32")) if weighted else None
        with ExitStack() as scope:
            i = scope.enter_context(items(new)) if gpu else _serial(scope, new)
            at = name(_coordinate(i, old, new, axis.scale, mode))
            if weights is None:
                T.buffer_store(places, _nearest(at, mode), [i, 0])
            else:
                low = name(tirx.Cast("int32", at))
                last = name(tirx.Cast("int32", old - 1))
                gap = name(at - _real(low))
                half, one = tirx.const(0.5, "float32"), tirx.const(1.0, "float32")
                for k, (place, weight) in enumerate(
                    ((low, one - gap), (tirx.min(low + 1, last), gap))
                ):
                    T.buffer_store(places, place, [i, k])
                    T.buffer_store(weights, tirx.Select(low >= last, half, weight), [i, k])
    return builder.get()


def _serial(scope: ExitStack, extent: Any) -> Any:
    scope.enter_context(T.sblock("root"))
    return scope.enter_context(T.serial(tirx.const(0, "int64"), extent))


def _real(value: Any) -> Any:
    """An integer as float32, in a register: of a name, TVM would take a cast's range for ints."""
    buffer = local(1, "float32")
    T.buffer_store(buffer, tirx.Cast("float32", value), [0])
    return buffer[0]


def _coordinate(i: Any, old: Any, new: Any, scale: float | None, mode: Mode) -> Any:
    """A place within 0 and old - 1."""

    half, one = tirx.const(0.5, "float32"), tirx.const(1.0, "float32")
    by = tirx.const(scale, "float32") if scale is not None else _real(new) / _real(old)
    zero = tirx.const(0.0, "float32")
    if mode.coordinates == "asymmetric":
        at = _real(i) / by
    elif mode.coordinates == "align_corners":
        under = tirx.max(_real(new) - one, one)
        at = _real(i) * (_real(old) - one) / under
    else:
        at = (_real(i) + half) / by - half
        if mode.coordinates == "pytorch_half_pixel":
            at = tirx.Select(new > 1, at, zero)
    at = tirx.Select(at > zero, at, zero)
    last = _real(old) - one
    return tirx.Select(at < last, at, last)


def _nearest(at: Any, mode: Mode) -> Any:
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
