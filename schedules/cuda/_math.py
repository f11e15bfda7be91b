"""exp, sigmoid and tanh of one f32 of each thread, within an open builder.

The same polynomial as on x86, and the same numbers on every machine: no approximate instruction is
used. x = n*ln 2 + r, |r| <= ln(2)/2, and e**r - 1 from one polynomial (Cephes' expf coefficients),
so that tanh keeps its relative accuracy near 0. NaN gives NaN; infinities give the limits. Largest
relative error: exp 0.9e-7 and sigmoid 1.5e-7 where the result is a normal number (below that
sigmoid may give 0), tanh 1.8e-7.
"""

from __future__ import annotations

from typing import Any

from ._ir import T, call, i32, tirx

__all__ = ["exp", "f32", "fma", "limit", "sigmoid", "tanh"]

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_POLYNOMIAL = (  # of (e**r - 1 - r) / r**2, highest power first
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the rounded integer in the low mantissa bits
_ROUNDER_BITS = 0x4B400000


def f32(value: float) -> Any:
    return tirx.const(value, "float32")


def fma(a: Any, b: Any, c: Any) -> Any:
    """a*b + c, rounded once; code is compiled without any contraction but this."""
    return call("float32", "fma", a, b, c)


def limit(x: Any, low: float | None, high: float | None) -> Any:
    """x within [low, high]; a NaN stays one."""
    if high is not None:
        x = T.Bind(x)
        x = tirx.Select(tirx.GT(x, f32(high)), f32(high), x)
    if low is not None:
        x = T.Bind(x)
        x = tirx.Select(tirx.LT(x, f32(low)), f32(low), x)
    return T.Bind(x)


def _reduce(x: Any) -> tuple[Any, Any]:
    """(e**r - 1, n) of x = n*ln 2 + r, for |x| < 2**20; a NaN stays in the first."""
    shifted = T.Bind(fma(x, f32(_LOG2E), f32(_ROUNDER)))
    n = T.Bind(tirx.Cast("int32", call("uint32", "as_uint", shifted)) - i32(_ROUNDER_BITS))
    whole = T.Bind(shifted - f32(_ROUNDER))
    r = T.Bind(fma(whole, f32(-_LN2_HIGH), x))
    r = T.Bind(fma(whole, f32(-_LN2_LOW), r))
    p = f32(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = T.Bind(fma(p, r, f32(coefficient)))
    return T.Bind(fma(p * r, r, r)), n


def _power_of_two(n: Any) -> Any:
    """2**n for -127 < n < 128."""
    return call("float32", "as_float", tirx.Cast("uint32", (n + i32(127)) << i32(23)))


def exp(x: Any) -> Any:
    """e**x, with subnormal results and overflow to infinity as IEEE has them."""
    p, n = _reduce(limit(x, -104.0, 89.0))
    half = T.Bind(n >> i32(1))
    return T.Bind((p + f32(1.0)) * _power_of_two(half) * _power_of_two(n - half))


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return T.Bind(f32(1.0) / (f32(1.0) + exp(f32(0.0) - x)))


def tanh(x: Any) -> Any:
    """(e**2x - 1) / (e**2x + 1), from |x| so that both signs are accurate."""
    x = T.Bind(x)
    sign = T.Bind(call("uint32", "as_uint", x) & tirx.const(0x80000000, "uint32"))
    magnitude = T.Bind(tirx.Select(tirx.LT(x, f32(0.0)), f32(0.0) - x, x))
    p, n = _reduce(limit(magnitude + magnitude, None, 40.0))
    power = T.Bind(_power_of_two(n))
    less_one = T.Bind(fma(p, power, power - f32(1.0)))
    ratio = T.Bind(less_one / (less_one + f32(2.0)))
    return call("float32", "as_float", call("uint32", "as_uint", ratio) | sign)
