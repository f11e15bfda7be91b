"""From one s32 accumulator of a thread to its number of C: scale, activate, round, saturate.

All of it is scalar code of one thread; kernels unroll it over the numbers that a thread holds and
put four codes into a word to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...workload import INT8_LIMITS, NUMPY, Conv, Gemm
from . import _math
from ._ir import T, call, i32, tirx
from ._math import f32, fma

__all__ = ["Epilogue", "activated", "code", "code_limits", "narrow", "scaled", "word"]


def scaled(acc: Any, scale: Any, bias: Any = None) -> Any:
    """y of an s32 accumulator; scale and bias are f32, each operation rounds once."""
    y = tirx.Cast("float32", acc)
    return T.Bind(y * scale if bias is None else fma(y, scale, bias))


def activated(workload: Gemm | Conv, y: Any) -> Any:
    """The activation of an f32 output; a NaN stays one."""
    if workload.activation == "relu":
        return _math.limit(y, 0.0, None)
    if workload.activation == "clip":
        assert workload.clip is not None
        low, high = workload.clip
        return _math.limit(_math.limit(y, low, None), None, high)
    if workload.activation == "sigmoid":
        return _math.sigmoid(y)
    return _math.tanh(y) if workload.activation == "tanh" else y


def code_limits(out: str, zero: int, clamp: tuple[int, int] | None) -> tuple[int, int]:
    """Least and largest rint(y) that count: codes less their zero point."""
    low, high = INT8_LIMITS[out]
    if clamp is not None:
        low, high = max(low, clamp[0]), min(high, clamp[1])
    return low - zero, high - zero


def code(y: Any, low: Any, high: Any, zero: Any) -> Any:
    """min(max(rint(y), low), high) + zero as int32; a NaN gives low + zero.

    `low` is f32, `high` and `zero` are int32, as numbers or as expressions. Limited before the
    zero point is added: nothing overflows. The maximum comes before rint, which changes no number
    and catches a NaN.
    """
    low = f32(low) if isinstance(low, (int, float)) else low
    high = i32(high) if isinstance(high, int) else high
    y = T.Bind(y)
    whole = T.Bind(call("int32", "rint", tirx.Select(tirx.GT(y, low), y, low)))
    limited = tirx.min(whole, high)
    if isinstance(zero, int) and zero == 0:
        return T.Bind(limited)
    return T.Bind(limited + (i32(zero) if isinstance(zero, int) else zero))


def narrow(value: Any, out: str) -> Any:
    """A code as one element of C."""
    return tirx.Cast(NUMPY[out], value) if out in INT8_LIMITS else value


def word(codes: Sequence[Any]) -> Any:
    """The low bytes of 4 int32 as uint32, the first lowest."""
    a, b, c, d = (tirx.Cast("uint32", value) for value in codes)

    def permute(x: Any, y: Any, order: int) -> Any:
        return T.Bind(call("uint32", "permute", x, y, tirx.const(order, "uint32")))

    return permute(permute(a, b, 0x0040), permute(c, d, 0x0040), 0x5410)


class Epilogue:
    """The end of an integer Gemm."""

    def __init__(self, workload: Gemm) -> None:
        self.workload = workload

    def value(self, acc: Any, scale: Any = None, bias: Any = None) -> Any:
        """An element of C: s32, f32, or an s32 with the code of an u8 or s8 output.

        `scale` (unless the output is s32) and `bias` (if it is f32) are those of the column, with
        `runtime` the scale already times that of A.
        """
        work = self.workload
        if work.out == "s32":
            return acc
        y = scaled(acc, scale, bias)
        if work.out == "f32":
            return activated(work, y)
        low, high = code_limits(work.out, work.zero_point, work.clamp)
        return code(y, low, high, work.zero_point)
