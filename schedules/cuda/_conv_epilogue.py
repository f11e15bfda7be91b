"""The end of an integer convolution: its constants in W, and from one s32 sum to a number of C.

Behind the weights W holds, each part 16-byte aligned: one value per filter, in the kernel's own
order, of: start s32 (the s32 bias less what A's zero point adds) · scale f32 · bias f32; then the
numbers that equal layers do not share, 4 bytes each (see `NUMBERS`). What a workload does without
is not read, and of the values per filter not there.

Codes are rounded by adding 1.5 * 2**23, which leaves the integer, half to even, in the low bits of
the sum: that and the limits before it are plain f32 instructions, of which a multiprocessor starts
64 to 128 a cycle, against 16 conversions. The limits are whole numbers below 2**22, so that
rounding after them is the same as before; a maximum of a NaN and a number is the number.

Instructions per code with a residual of inner quantization: 1 conversion of the sum, 11 others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...workload import INT8_LIMITS, Conv, ConvWeights
from ._epilogue import activated, scaled, word
from ._ir import T, address, call, ceil_div, i32, local, tirx
from ._math import f32, fma

__all__ = ["NUMBERS", "Constants", "ConvEpilogue", "Filter", "starts"]

# The numbers behind the values per filter: a, b and c of the residual sum; limits of its inner
# codes less their shift, and 1.5 * 2**23 less the shift; limits of C's codes less the zero point,
# and that, an s32; four bytes of A's zero point.
NUMBERS = ("a", "b", "c", "inner_low", "inner_high", "inner_round", "low", "high", "zero", "fill")
_ROUND = 12582912.0  # 1.5 * 2**23


def starts(workload: Conv, weights: ConvWeights) -> np.ndarray:
    """Where accumulators start if taps outside of A meet its zero point: s32 (filters,)."""
    base = -weights.a_zero * weights.b.sum(axis=(0, 1, 2, 3), dtype=np.int64)
    if workload.bias == "s32":
        assert weights.bias is not None
        base = base + weights.bias
    return base.astype(np.int32)


class Constants:
    """Where everything behind the weights is in W: byte offsets.

    `slots` is the number of values per filter, a multiple of 4, padding included; `first` where
    the weights end.
    """

    def __init__(self, workload: Conv, slots: int, first: int) -> None:
        assert slots % 4 == 0
        self.workload, self.slots = workload, slots
        self.start = ceil_div(first, 64) * 64
        self.scale = self.start + 4 * slots
        self.bias = self.scale + (4 * slots if workload.out != "s32" else 0)
        end = self.bias + (4 * slots if workload.bias == "f32" else 0)
        self.numbers = ceil_div(end, 16) * 16
        self.nbytes = ceil_div(self.numbers + 4 * len(NUMBERS), 64) * 64

    def pack(
        self, out: np.ndarray, weights: ConvWeights, slots: np.ndarray, start: np.ndarray
    ) -> None:
        """Writes the constants into W; `slots` (filters,) says in which one each filter is."""
        work = self.workload

        def put(offset: int, values: Any, dtype: str) -> None:
            row = np.zeros(self.slots, dtype)
            row[slots] = values
            out[offset : offset + row.nbytes] = row.view(np.uint8)

        put(self.start, start, "int32")
        if work.out != "s32":
            put(self.scale, weights.scale, "float32")
        if work.bias == "f32":
            put(self.bias, weights.bias, "float32")
        for name, value in self._values(weights).items():
            at = self.numbers + 4 * NUMBERS.index(name)
            out[at : at + 4] = np.array([value]).view(np.uint8)

    def _values(self, weights: ConvWeights) -> dict[str, np.generic]:
        """By name, as they are stored."""
        work = self.workload
        values: dict[str, np.generic] = {"fill": np.uint32(weights.a_zero * 0x01010101)}
        if work.out in INT8_LIMITS:
            low, high = INT8_LIMITS[work.out]
            if weights.clamp is not None:
                low, high = max(low, weights.clamp[0]), min(high, weights.clamp[1])
            zero = weights.zero_point
            values |= {"low": np.float32(low - zero), "high": np.float32(high - zero)}
            values["zero"] = np.int32(zero)
        if work.residual is not None:
            r = weights.residual
            assert r is not None
            values |= {"a": np.float32(r.a), "b": np.float32(r.b), "c": np.float32(r.c)}
            values["inner_low"] = np.float32(r.low - r.shift)
            values["inner_high"] = np.float32(r.high - r.shift)
            values["inner_round"] = np.float32(_ROUND - r.shift)
        return values


@dataclass(frozen=True)
class Filter:
    """Values of one filter that a thread holds; scale and bias are None where not used."""

    start: Any
    scale: Any
    bias: Any


class ConvEpilogue:
    """What follows the sums, as scalar code of one thread, within an open builder.

    `w` is W as bytes. The numbers are loaded where they are first asked for: ask once, by
    `prepare`, before any branch or loop.
    """

    def __init__(self, workload: Conv, constants: Constants, w: Any) -> None:
        self.workload, self.constants, self.w = workload, constants, w
        self._numbers: dict[str, Any] = {}

    def prepare(self, fill: bool = False) -> None:
        """Loads all numbers but, unless `fill`, A's zero point."""
        work = self.workload
        names = ["fill"] if fill else []
        if work.residual is not None:
            names += ["b", "c"]
            if work.residual.inner:
                names += ["a", "inner_low", "inner_high", "inner_round"]
        if work.out in INT8_LIMITS and (work.shifted or work.clamped):
            names += ["low", "high"]
        if work.shifted and work.out in INT8_LIMITS:
            names.append("zero")
        for name in names:
            self.number(name)

    def number(self, name: str) -> Any:
        """One of `NUMBERS`: f32, `zero` an int32 and `fill` an uint32."""
        if name not in self._numbers:
            place = self.constants.numbers + 4 * NUMBERS.index(name)
            value = call("uint32", "load4", address(self.w, place))
            if name == "zero":
                value = tirx.Cast("int32", value)
            elif name != "fill":
                value = call("float32", "as_float", value)
            self._numbers[name] = T.Bind(value)
        return self._numbers[name]

    def filters(self, slot: Any, count: int) -> list[Filter]:
        """`count` neighbours from `slot` on, a multiple of `count`, which is 1, 2, 4, 8, ..."""
        work, parts = self.workload, self.constants
        start = [tirx.Cast("int32", v) for v in self._row(parts.start, slot, count)]
        scale, bias = [None] * count, [None] * count
        if work.out != "s32":
            scale = [self._float(v) for v in self._row(parts.scale, slot, count)]
        if work.bias == "f32":
            bias = [self._float(v) for v in self._row(parts.bias, slot, count)]
        return [Filter(*values) for values in zip(start, scale, bias, strict=True)]

    def residual(self, r: Any, lane: int) -> Any:
        """A number of R as f32: byte `lane` of the uint32 `r`, by way of the mantissa of 2**23."""
        assert self.workload.residual is not None
        signed = self.workload.residual.dtype == "s8"
        if signed:
            r = r ^ tirx.const(0x80808080, "uint32")
        upper, order = (tirx.const(v, "uint32") for v in (0x4B000000, 0x7540 + lane))
        value = call("float32", "as_float", call("uint32", "permute", r, upper, order))
        return T.Bind(value - f32(8388608.0 + (128.0 if signed else 0.0)))

    def value(self, acc: Any, own: Filter, r: Any = None) -> Any:
        """A number of C: s32, f32, or an int32 whose low byte is the code of an u8 or s8 output.

        `acc` is the sum of products alone, `r` the residual as f32.
        """
        work = self.workload
        total = T.Bind(acc + own.start)
        if work.out == "s32":
            return total
        y = scaled(total, own.scale, own.bias)
        if work.out == "f32":
            return activated(work, y)
        if work.residual is not None:
            y = self._added(y, r)
        low, high = self._limits
        y = tirx.min(tirx.max(y, low), high)
        code = tirx.Cast("int32", call("uint32", "as_uint", y + f32(_ROUND)))
        return T.Bind(code + self.number("zero") if work.shifted else code)

    def words(self, codes: Sequence[Any]) -> list[Any]:
        """Codes of `value`, a multiple of 4 of them, as uint32."""
        return [word(codes[i : i + 4]) for i in range(0, len(codes), 4)]

    @cached_property
    def _limits(self) -> tuple[Any, Any]:
        work = self.workload
        if work.shifted or work.clamped:
            return self.number("low"), self.number("high")
        low, high = INT8_LIMITS[work.out]
        return f32(low), f32(high)

    def _added(self, y: Any, r: Any) -> Any:
        """The residual sum of y and R."""
        residual = self.workload.residual
        assert residual is not None
        b, c = self.number("b"), self.number("c")
        if not residual.inner:
            return T.Bind(y + fma(r, b, c))
        y = tirx.min(tirx.max(y, self.number("inner_low")), self.number("inner_high"))
        whole = T.Bind(y + f32(_ROUND))
        q = T.Bind(whole - self.number("inner_round"))
        terms = [(q, self.number("a")), (r, b)]
        if residual.first:
            terms.reverse()
        return T.Bind(fma(*terms[0], fma(*terms[1], c)))

    def _row(self, offset: int, slot: Any, count: int) -> list[Any]:
        """`count` values of 4 bytes as uint32, in the widest loads."""
        place = T.Bind(i32(offset) + slot * 4)
        if count == 1:
            return [T.Bind(call("uint32", "load4", address(self.w, place)))]
        width = min(count, 4)
        words = local(count, "uint32")
        for i in range(0, count, width):
            load = call(
                "void", f"load{4 * width}", address(words, i), address(self.w, place + 4 * i)
            )
            T.evaluate(load)
        return [words[i] for i in range(count)]

    def _float(self, value: Any) -> Any:
        return T.Bind(call("float32", "as_float", value))
