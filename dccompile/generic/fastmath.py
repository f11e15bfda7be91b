"""float32 elementary functions as TIR expressions on any number of lanes.

TVM calls the scalar C library once per lane for these. The forms here are branch-free, right at
NaN and infinities and within 1e-6 relative of the exact value (tests hold it).
`bind` names a value so that it is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

Bind = Callable[[Any], Any]


def lanes(expr: Any) -> int:
    return int(expr.ty.dtype.lanes)


def const(value: float, like: Any, dtype: str | None = None) -> Any:
    """A constant with the lanes of `like` and its element type unless `dtype` is given."""
    scalar = tirx.const(value, dtype or str(like.ty.dtype.with_lanes(1)))
    return tirx.Broadcast(scalar, lanes(like)) if lanes(like) > 1 else scalar


def cast(value: Any, dtype: str) -> Any:
    """Converts each lane."""
    n = lanes(value)
    return tirx.Cast(f"{dtype}x{n}" if n > 1 else dtype, value)


def bits(value: Any, dtype: str) -> Any:
    """The bits of each lane as another type of the same width."""
    n = lanes(value)
    return tirx.reinterpret(f"{dtype}x{n}" if n > 1 else dtype, value)


def unary(name: str, value: Any) -> Any:
    return tirx.call_intrin(str(value.ty.dtype), name, value)


def polynomial(bind: Bind, x: Any, *coefficients: float) -> Any:
    """Horner's rule, highest power first.

    Every step is named: TVM's analyzer takes time exponential in the depth of an expression.
    """
    result = const(coefficients[0], x)
    for c in coefficients[1:]:
        result = bind(result * x + const(c, x))
    return result


def exp(x: Any, bind: Bind) -> Any:
    """2**n * exp(r) with |r| <= ln(2)/2, n added to the exponent's bits.

    Results below the least normal number become 0.
    """
    x = bind(x)
    n = bind(unary("tirx.nearbyint", x * const(1.4426950408889634, x)))
    r = bind((x - n * const(0.693359375, x)) - n * const(-2.12194440e-4, x))
    p = polynomial(bind, r, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                   1.6666665459e-1, 5.0000001201e-1)  # fmt: skip
    p = bind(p * (r * r) + r + const(1.0, r))
    code = bits(p, "int32")
    result = bind(bits(code + (cast(n, "int32") << const(23, code)), "float32"))
    result = tirx.Select(x > const(88.72283, x), const(float("inf"), x), result)
    return bind(tirx.Select(x < const(-87.33654, x), const(0.0, x), result))


def sigmoid(x: Any, bind: Bind) -> Any:
    one = const(1.0, x)
    return one / (one + exp(const(0.0, x) - x, bind))


def tanh(x: Any, bind: Bind) -> Any:
    """An odd polynomial near zero, 1 - 2 / (exp(2|x|) + 1) elsewhere."""
    a = bind(unary("tirx.fabs", x))
    z = bind(x * x)
    small = bind(polynomial(bind, z, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2,
                       1.33314422036e-1, -3.33332819422e-1) * z * x + x)  # fmt: skip
    large = bind(const(1.0, x) - const(2.0, x) / (exp(a + a, bind) + const(1.0, x)))
    large = tirx.Select(x < const(0.0, x), const(0.0, x) - large, large)
    return tirx.Select(a < const(0.625, x), small, large)


def erf(x: Any, bind: Bind) -> Any:
    """x * P(x*x) below 0.92, 1 - exp(-Q(|x|)) above; 1 from 3.925 on."""
    a = bind(unary("tirx.fabs", x))
    z = bind(x * x)
    small = bind(polynomial(bind, z, -5.99104969e-4, 4.99339588e-3, -2.67667342e-2, 1.12818025e-1,
                       -3.76124859e-1, 1.28379151e-1) * x + x)  # fmt: skip
    top = bind(tirx.Select(a > const(3.925, x), const(3.925, x), a))
    q = bind(polynomial(bind, top, 1.72948930e-5, -3.83208680e-4, 3.88393435e-3, -2.42545605e-2,
                   1.06777847e-1, 6.34846687e-1, 1.28717512e-1) * top + top)  # fmt: skip
    large = bind(const(1.0, x) - exp(const(0.0, x) - q, bind))
    large = tirx.Select(x < const(0.0, x), const(0.0, x) - large, large)
    return tirx.Select(a < const(0.921875, x), small, large)


def log(x: Any, bind: Bind) -> Any:
    """log of the mantissa in sqrt(1/2)..sqrt(2) by polynomial, plus the exponent times ln(2)."""
    tiny = bind(x < const(1.17549435e-38, x))
    y = bind(tirx.Select(tiny, x * const(8388608.0, x), x))
    u = bind(bits(y, "int32"))
    e = (u >> const(23, u)) - const(126, u) - tirx.Select(tiny, const(23, u), const(0, u))
    m = bind(bits((u & const(0x007FFFFF, u)) | const(0x3F000000, u), "float32"))
    low = bind(m < const(0.707106781186547524, m))
    n = bind(cast(e - tirx.Select(low, const(1, u), const(0, u)), "float32"))
    f = bind(tirx.Select(low, m + m, m) - const(1.0, m))
    z = bind(f * f)
    p = bind(polynomial(bind, f, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1,
                   -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
                   2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1) * f * z)  # fmt: skip
    result = (p + n * const(-2.12194440e-4, m) - z * const(0.5, m)) + f + n * const(0.693359375, m)
    inf, nan = const(float("inf"), x), const(float("nan"), x)
    result = tirx.Select(x == const(0.0, x), const(float("-inf"), x), result)
    result = tirx.Select(x == inf, inf, result)
    return tirx.Select(x >= const(0.0, x), result, nan)


FAST = {
    "exp": exp,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "erf": erf,
    "log": log,
}
