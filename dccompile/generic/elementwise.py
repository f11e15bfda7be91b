"""Elementwise rules with ONNX Runtime's answers at NaN, and their tensor expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx


def is_float(x: Any) -> bool:
    return str(x.ty).startswith(("float", "bfloat"))


def number(value: float | int | bool, like: Any) -> Any:
    """A constant of the type of `like`."""
    return tirx.const(value, str(like.ty))


def greater(a: Any, b: Any) -> Any:
    """The larger value, NaN if either is."""
    if str(a.ty) == "bool":
        return tirx.Or(a, b)
    if not is_float(a):
        return tirx.Max(a, b)
    return tirx.Select(tirx.Or(a > b, tirx.isnan(a)), a, b)


def smaller(a: Any, b: Any) -> Any:
    """The smaller value, NaN if either is."""
    if str(a.ty) == "bool":
        return tirx.And(a, b)
    if not is_float(a):
        return tirx.Min(a, b)
    return tirx.Select(tirx.Or(a < b, tirx.isnan(a)), a, b)


def clamped(x: Any, low: Any, high: Any) -> Any:
    """x in low..high; NaN stays."""
    x = tirx.Select(x < low, low, x)
    return tirx.Select(x > high, high, x)


def relu(x: Any) -> Any:
    return tirx.Select(x < number(0, x), number(0, x), x)


def rounded(x: Any) -> Any:
    """A float that is rounded to its type before it is used.

    LLVM makes one multiply-add of a product and the sum that it goes into, also through float64.
    """
    return tirx.call_llvm_pure_intrin(str(x.ty), "llvm.arithmetic.fence", x)


def lowest(dtype: str) -> Any:
    """Below every number of a type: -inf where it has one."""
    if dtype.startswith("float"):
        return tirx.const(float("-inf"), dtype)
    return tirx.const(False, dtype) if dtype == "bool" else tirx.min_value(dtype)


def highest(dtype: str) -> Any:
    """Above every number of a type: inf where it has one."""
    if dtype.startswith("float"):
        return tirx.const(float("inf"), dtype)
    return tirx.const(True, dtype) if dtype == "bool" else tirx.max_value(dtype)


def one(extent: Any) -> bool:
    return (
        extent == 1
        if isinstance(extent, int)
        else (isinstance(extent, tirx.IntImm) and int(extent.value) == 1)
    )


def broadcast(shapes: list[list[Any]]) -> list[Any]:
    """The shape that numpy gives; of two unequal symbols the first is taken."""
    rank = max(map(len, shapes))
    result: list[Any] = [1] * rank
    for shape in shapes:
        for i, extent in enumerate(shape, rank - len(shape)):
            if one(result[i]) or (
                not isinstance(result[i], (int, tirx.IntImm)) and isinstance(extent, tirx.IntImm)
                and not one(extent)
            ):  # fmt: skip
                result[i] = extent
    return result


def element(t: te.Tensor, index: tuple[Any, ...]) -> Any:
    """The element of a tensor that numpy would broadcast to `index`."""
    own = index[len(index) - len(t.shape) :]
    return t(*(tirx.const(0, "int64") if one(e) else i for i, e in zip(own, t.shape, strict=True)))


def each(name: str, *tensors: te.Tensor, value: Callable[..., Any]) -> te.Tensor:
    """`value` of the elements of tensors that numpy would broadcast together."""
    shape = broadcast([list(t.shape) for t in tensors])
    return te.compute(shape, lambda *i: value(*(element(t, i) for t in tensors)), name=name)
