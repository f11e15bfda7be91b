"""Converters of elementwise operators, with ONNX Runtime's answers at NaN and infinity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import tirx

from dccompile.generic.elementwise import clamped, greater, is_float, number, relu, smaller

from .operator_tools import Converter, Node, constant, dtype_of, shape_of


class Relu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(relu, node.get(0))


class Clip(Converter):
    """Bounds as attributes (opset 6) or inputs: absent ones are the type's own, NaN is none."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        kind = dtype_of(x)
        if node.opset < 11:
            bounds = [node.attr.get("min"), node.attr.get("max")]
            low, high = (None if v is None else np.array(v, kind) for v in bounds)
        else:
            low, high = (_bound(node, i) for i in (1, 2))
        low = np.array(tirx.min_value(kind).value, kind) if low is None else low
        high = np.array(tirx.max_value(kind).value, kind) if high is None else high

        def rule(v: Any, *others: Any) -> Any:
            left = list(others)
            for bound, side in ((low, "low"), (high, "high")):
                if isinstance(bound, np.ndarray):
                    if bound.dtype.kind == "f" and np.isnan(bound):
                        continue
                    edge = number(bound.item(), v)
                else:
                    edge = left.pop(0)
                over = v < edge if side == "low" else v > edge
                v = tirx.Select(over, edge, v)
            return v

        tensors = [b for b in (low, high) if not isinstance(b, np.ndarray)]
        return node.emit(rule, x, *tensors)


def _bound(node: Node, index: int) -> Any:
    value = node.get(index)
    known = None if value is None else constant(value)
    return value if known is None else known.reshape(())


class Max(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return _fold(node, greater)


class Min(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return _fold(node, smaller)


def _fold(node: Node, rule: Any) -> Any:
    def value(first: Any, *others: Any) -> Any:
        for other in others:
            first = rule(first, other)
        return first

    return node.emit(value, *node.all())


class IsInf(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        positive = bool(node.attr.get("detect_positive", 1))
        negative = bool(node.attr.get("detect_negative", 1))

        def rule(x: Any) -> Any:
            tests = []
            if positive:
                tests.append(x == number(math.inf, x))
            if negative:
                tests.append(x == number(-math.inf, x))
            if not tests:
                return tirx.const(False, "bool")
            return tests[0] if len(tests) == 1 else tirx.Or(*tests)

        return node.emit(rule, node.get(0))


class Sign(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        def rule(x: Any) -> Any:
            zero = number(0, x)
            if dtype_of(x).startswith("uint"):
                return tirx.Select(x > zero, number(1, x), zero)
            negative = tirx.Select(x < zero, number(-1, x), x)
            return tirx.Select(x > zero, number(1, x), negative)

        return node.emit(rule, node.get(0))


class BitShift(Converter):
    """A shift by the width or more gives 0."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        left = node.text("direction", "LEFT") == "LEFT"

        def rule(x: Any, by: Any) -> Any:
            width = number(int(x.ty.dtype.bits), by)
            inside = by < width
            safe = tirx.Select(inside, by, number(0, by))
            return tirx.Select(inside, x << safe if left else x >> safe, number(0, x))

        return node.emit(rule, node.get(0), node.get(1))


class Pow(Converter):
    """The base's type; small constant exponents become products and roots."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, y = node.get(0), node.get(1)
        known = constant(y)
        if known is not None and known.size == 1 and len(shape_of(y)) <= len(shape_of(x)):
            exponent = float(known.reshape(-1)[0])
            if exponent in (1.0, 2.0, 3.0):
                return node.emit(lambda v: math.prod([v] * int(exponent)), x)
            if exponent == 0.5 and dtype_of(x).startswith("float"):
                return node.emit(_root, x)

        def rule(a: Any, b: Any) -> Any:
            if is_float(a):
                return tirx.pow(a, tirx.Cast(str(a.ty), b))
            whole = tirx.pow(tirx.Cast("float64", a), tirx.Cast("float64", b))
            return tirx.Cast(str(a.ty), whole)

        return node.emit(rule, x, y)


def _root(x: Any) -> Any:
    """x ** 0.5: pow(-inf, 0.5) is inf, and -0.0 gives 0."""
    root = tirx.sqrt(x + number(0, x))
    return tirx.Select(x == number(-math.inf, x), number(math.inf, x), root)


class Celu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 1.0))

        def rule(x: Any) -> Any:
            a = number(alpha, x)
            return tirx.Select(x < number(0, x), a * (tirx.exp(x / a) - number(1, x)), x)

        return node.emit(rule, node.get(0))


class Swish(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 1.0))
        return node.emit(lambda x: x * tirx.sigmoid(number(alpha, x) * x), node.get(0))


class HardSigmoid(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 0.2))
        beta = float(node.attr.get("beta", 0.5))
        return node.emit(lambda x: _hard(x, alpha, beta), node.get(0))


class HardSwish(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(lambda x: x * _hard(x, 1 / 6, 0.5), node.get(0))


def _hard(x: Any, alpha: float, beta: float) -> Any:
    return clamped(x * number(alpha, x) + number(beta, x), number(0, x), number(1, x))


class LeakyRelu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 0.01))

        def rule(x: Any) -> Any:
            return tirx.Select(x < number(0, x), x * number(alpha, x), x)

        return node.emit(rule, node.get(0))


class Elu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 1.0))

        def rule(x: Any) -> Any:
            low = number(alpha, x) * (tirx.exp(x) - number(1, x))
            return tirx.Select(x < number(0, x), low, x)

        return node.emit(rule, node.get(0))


class Selu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 1.67326319217681884765625))
        gamma = float(node.attr.get("gamma", 1.05070102214813232421875))

        def rule(x: Any) -> Any:
            low = number(alpha, x) * (tirx.exp(x) - number(1, x))
            return number(gamma, x) * tirx.Select(x < number(0, x), low, x)

        return node.emit(rule, node.get(0))


class ThresholdedRelu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 1.0))

        def rule(x: Any) -> Any:
            return tirx.Select(x > number(alpha, x), x, number(0, x))

        return node.emit(rule, node.get(0))


class PRelu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        def rule(x: Any, slope: Any) -> Any:
            return tirx.Select(x < number(0, x), x * slope, x)

        return node.emit(rule, node.get(0), node.get(1))


def softplus(x: Any) -> Any:
    """log(1 + exp(x)) without overflow."""
    zero = number(0, x)
    magnitude = tirx.abs(x)
    rest = tirx.log(number(1, x) + tirx.exp(zero - magnitude))
    return tirx.Select(x > zero, x, tirx.Select(tirx.isnan(x), x, zero)) + rest


class Softplus(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(softplus, node.get(0))


class Mish(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(lambda x: x * tirx.tanh(softplus(x)), node.get(0))


class Gelu(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        fast = node.text("approximate", "none") == "tanh"

        return node.emit(_fast_gelu if fast else _gelu, node.get(0))


def _gelu(x: Any) -> Any:
    return number(0.5, x) * x * (number(1, x) + tirx.erf(x * number(math.sqrt(0.5), x)))


def _fast_gelu(x: Any) -> Any:
    inner = x + number(0.044715, x) * (x * x * x)
    return (
        number(0.5, x) * x * (number(1, x) + tirx.tanh(number(math.sqrt(2 / math.pi), x) * inner))
    )


class FastGelu(Converter):
    """Of com.microsoft: the tanh form, after an optional bias."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(lambda x, *b: _fast_gelu(x + b[0] if b else x), *node.all())


class BiasGelu(Converter):
    """Of com.microsoft: the exact form after a bias."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(lambda x, b: _gelu(x + b), node.get(0), node.get(1))


class QuickGelu(Converter):
    """Of com.microsoft: x * sigmoid(alpha * x)."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        alpha = float(node.attr.get("alpha", 1.702))
        return node.emit(lambda x: x * tirx.sigmoid(number(alpha, x) * x), node.get(0))


class Equal(Converter):
    """Of a value with itself it asks for NaN, while TVM takes it for true."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        a, b = node.get(0), node.get(1)
        if not a.same_as(b) or not dtype_of(a).startswith("float"):
            return node.plain()
        return node.emit(lambda x: _not(tirx.isnan(x)), a)


def _not(x: Any) -> Any:
    return tirx.EQ(tirx.Cast("int32", x), tirx.const(0, "int32"))


class Not(Converter):
    """By arithmetic: TVM makes ``a >= b`` of ``not a < b``, which is another thing for NaN."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(_not, node.get(0))


class Where(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.emit(tirx.Select, node.get(0), node.get(1), node.get(2))


POINTWISE = {
    c.__name__: c
    for c in (
        Relu, Clip, Max, Min, IsInf, Sign, BitShift, Pow, Celu, Swish, HardSigmoid, HardSwish,
        LeakyRelu, Elu, Selu, ThresholdedRelu, PRelu, Softplus, Mish, Gelu, FastGelu, BiasGelu,
        QuickGelu, Equal, Not, Where,
    )
}  # fmt: skip
