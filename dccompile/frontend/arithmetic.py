"""Arithmetic of sizes: ints, int64 expressions of symbols, and quotients of these by constants.

A rule takes the symbols and the operands and gives the result, or None where it cannot be told.
Integers are thought of as unbounded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import tirx

from .symbols import Symbols, wide

_LARGEST_DIVISOR = 1024


@dataclass(frozen=True)
class Ratio:
    """`top / under`, a symbolic number of a float type; exact for dims below 2**22."""

    top: Any
    under: int


def plain(entry: Any) -> Any:
    """An int, an expression, a Ratio, or the exact fraction that a float is."""
    if isinstance(entry, (bool, int, np.integer, np.bool_)):
        return int(entry)
    if isinstance(entry, (float, np.floating)):
        fraction = Fraction(float(entry))
        return fraction.numerator if fraction.denominator == 1 else fraction
    return entry


def _parts(entry: Any) -> tuple[Any, int]:
    """Numerator and denominator."""
    if isinstance(entry, Ratio):
        return entry.top, entry.under
    if isinstance(entry, Fraction):
        return entry.numerator, entry.denominator
    return entry, 1


def _made(symbols: Symbols, top: Any, under: int) -> Any:
    """`top / under` in lowest form; None where the divisor is too large to be exact."""
    top = symbols.simple(top)
    if isinstance(top, int):
        fraction = Fraction(top, under)
        return fraction.numerator if fraction.denominator == 1 else fraction
    if symbols.same(tirx.floormod(top, wide(under)), 0):
        return symbols.simple(tirx.floordiv(top, wide(under)))
    return Ratio(top, under) if under <= _LARGEST_DIVISOR else None


def _linear(sign: int) -> Callable[..., Any]:
    def rule(symbols: Symbols, a: Any, b: Any) -> Any:
        (p, q), (r, s) = _parts(a), _parts(b)
        return _made(symbols, p * s + sign * (r * q), q * s)

    return rule


def _times(symbols: Symbols, a: Any, b: Any) -> Any:
    (p, q), (r, s) = _parts(a), _parts(b)
    return _made(symbols, p * r, q * s)


def ratio_over(symbols: Symbols, a: Any, b: Any) -> Any:
    """Division of floats by a positive constant, or of equals."""
    (p, q), (r, s) = _parts(a), _parts(b)
    if isinstance(r, int):
        return _made(symbols, p * s, q * r) if r > 0 else None
    if q == s == 1 and symbols.same(tirx.floormod(wide(p), r), 0):
        return symbols.quotient([p], [r])
    return None


def _over(symbols: Symbols, a: Any, b: Any) -> Any:
    """Integer division, which ONNX rounds towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)
    if not _positive(symbols, b):
        return None
    if symbols.holds(wide(a) >= 0) is True:
        return symbols.quotient([a], [b])
    if symbols.holds(wide(a) <= 0) is True:
        return symbols.simple(0 - symbols.quotient([symbols.simple(0 - a)], [b]))
    return None


def _positive(symbols: Symbols, entry: Any) -> bool:
    return entry > 0 if isinstance(entry, int) else symbols.holds(entry > 0) is True


def _remainder(symbols: Symbols, a: Any, b: Any) -> Any:
    """ONNX's Mod of integers, which has the sign of the divisor."""
    return symbols.simple(tirx.floormod(wide(a), wide(b))) if _positive(symbols, b) else None


def _rounded(up: bool) -> Callable[..., Any]:
    def rule(symbols: Symbols, a: Any) -> Any:
        top, under = _parts(a)
        return symbols.simple(tirx.floordiv(wide(top) + (under - 1 if up else 0), wide(under)))

    return rule


def whole(symbols: Symbols, a: Any) -> Any:
    """A cast to integers: towards zero."""
    top, under = _parts(a)
    if under == 1:
        return top
    return _rounded(False)(symbols, a) if symbols.holds(wide(top) >= 0) is True else None


def as_float(symbols: Symbols, a: Any) -> Any:
    return a


def _chosen(pick: Callable[[Any, Any], Any], compare: Callable[[Any, Any], Any]) -> Any:
    def rule(symbols: Symbols, a: Any, *others: Any) -> Any:
        for b in others:
            if isinstance(a, (Ratio, Fraction)) or isinstance(b, (Ratio, Fraction)):
                return None
            a = symbols.simple(pick(wide(a), wide(b)))
        return a

    return rule


def _compared(test: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule(symbols: Symbols, a: Any, b: Any) -> Any:
        (p, q), (r, s) = _parts(a), _parts(b)
        return symbols.holds(test(wide(p * s), wide(r * q)))

    return rule


COMPARE = {
    "Equal": _compared(tirx.EQ),
    "Greater": _compared(operator.gt),
    "GreaterOrEqual": _compared(operator.ge),
    "Less": _compared(operator.lt),
    "LessOrEqual": _compared(operator.le),
}
RULES: dict[str, Callable[..., Any]] = {
    "Abs": lambda s, a: a if s.holds(wide(_parts(a)[0]) >= 0) is True else None,
    "Add": _linear(1),
    "Sub": _linear(-1),
    "Mul": _times,
    "Div": _over,
    "Mod": _remainder,
    "Neg": lambda s, a: _times(s, a, -1),
    "Min": _chosen(tirx.min, operator.lt),
    "Max": _chosen(tirx.max, operator.gt),
    "Floor": _rounded(False),
    "Ceil": _rounded(True),
    "Cast": as_float,
    **COMPARE,
}
