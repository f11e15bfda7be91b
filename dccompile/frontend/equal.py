"""Dims that operators force to be equal: symbols are merged or fixed accordingly.

``x[N, 8] + y[M, 8]`` needs N = M, and ``x[N, K]`` times a weight of 8 rows needs K = 8. Code
compiled with the symbols apart would read outside a buffer when a caller breaks the rule, so the
signature itself states it. Where broadcasting would also allow a dim of 1, the equal dim is
chosen: a model that is meant to broadcast declares the 1, or gets it from `shapes`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx

from dccompile.errors import Problem

from .infer import Dims, dims_of, types_of
from .shapes import Range, substitute
from .structure import where

Dim = int | str | None
Pair = tuple[Dim, Dim]

_BROADCAST = frozenset(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max "
    "Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor".split()
)


def _aligned(shapes: list[Dims]) -> Iterator[Pair]:
    """Pairs of dims that broadcasting lines up and that are not 1."""
    for axis in range(1, 1 + max(map(len, shapes), default=0)):
        dims = [s[-axis] for s in shapes if len(s) >= axis and s[-axis] != 1]
        yield from itertools.pairwise(dims)


def _products(a: Dims, b: Dims) -> Iterator[Pair]:
    if a and b:
        yield a[-1], b[-2] if len(b) > 1 else b[-1]
        yield from _aligned([a[:-2], b[:-2]])


def _gemm(node: onnx.NodeProto, a: Dims, b: Dims) -> Iterator[Pair]:
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if len(a) == len(b) == 2:
        yield a[0 if flags.get("transA") else 1], b[1 if flags.get("transB") else 0]


def pairs(
    node: onnx.NodeProto,
    shape: Callable[[int], Dims | None],
    constant: Callable[[int], np.ndarray | None],
) -> Iterator[Pair]:
    """Dims that must be equal; `shape` and `constant` give those of an input, where known.

    A dim may also be an expression that is neither a number nor a name.
    """
    kind, count = node.op_type, len(node.input)
    known = [s for s in map(shape, range(count)) if s is not None]
    first = shape(0)
    if kind in _BROADCAST or kind in ("QLinearAdd", "QLinearMul"):
        operands = [shape(0), shape(3)] if kind.startswith("QLinear") else known
        yield from _aligned([s for s in operands if s is not None])
    elif kind in _PRODUCTS:
        a, b = (shape(i) for i in _PRODUCTS[kind])
        if a is not None and b is not None:
            yield from _gemm(node, a, b) if "Gemm" in kind else _products(a, b)
    elif kind == "Concat" and known:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        for other in known[1:]:
            if len(other) == len(known[0]) and -len(other) <= axis < len(other):
                rest = set(range(len(other))) - {axis % len(other)}
                yield from ((known[0][i], other[i]) for i in rest)
    elif kind == "Reshape" and first is not None:
        yield from _reshape(first, constant(1))
    elif kind == "Expand" and first is not None:
        target = constant(1)
        if target is not None:
            yield from _aligned([first, [int(d) for d in target.reshape(-1)]])
    elif kind in _CHANNELS and first is not None and len(first) > 1:
        yield from _channels(node, first, shape(_CHANNELS[kind]))
    elif kind in ("QuantizeLinear", "DequantizeLinear") and first is not None:
        scale = shape(1)
        flags = {a.name: a.i for a in node.attribute}
        axis = flags.get("axis", 1)
        if scale is not None and len(scale) == 1 and scale[0] != 1 and axis < len(first):
            yield first[axis], scale[0]
    elif kind in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        yield from _aligned(known[:3])


_PRODUCTS = {
    "DynamicQuantizeMatMul": (0, 1),
    "FusedGemm": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QGemm": (0, 3),
    "QLinearMatMul": (0, 3),
}
_CHANNELS = {  # operator: input that says how many channels the data have
    "BatchNormalization": 1,
    "Conv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "FusedConv": 1,
    "InstanceNormalization": 1,
    "QLinearConv": 3,
}


def _channels(node: onnx.NodeProto, data: Dims, other: Dims | None) -> Iterator[Pair]:
    if not other:
        return
    if len(other) == 1 or node.op_type == "ConvTranspose":
        yield data[1], other[0]
    elif isinstance(other[1], int):
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        yield data[1], other[1] * group


def _reshape(first: Dims, target: np.ndarray | None) -> Iterator[Pair]:
    """A fixed target with one open dim in the input fixes that dim."""
    fixed = [d for d in first if isinstance(d, int)]
    if target is None or (target <= 0).any() or len(fixed) != len(first) - 1:
        return
    total, rest = math.prod(int(d) for d in target.reshape(-1)), math.prod(fixed)
    if rest and total % rest == 0:
        yield next(d for d in first if not isinstance(d, int)), total // rest


def unify(
    model: onnx.ModelProto, symbols: dict[str, Range], constants: Mapping[str, np.ndarray]
) -> tuple[bool, list[Problem]]:
    """Merges and fixes `symbols` in place, and in the model's inputs; True if any changed."""
    types = types_of(model.graph)
    problems: list[Problem] = []
    merged: dict[str, int | str] = {}
    rank = {symbol: index for index, symbol in enumerate(symbols)}  # the first name survives

    def root(dim: Dim) -> Dim:
        while isinstance(dim, str) and dim in merged:
            dim = merged[dim]
        return dim

    for node in model.graph.node:

        def shape(index: int, node: onnx.NodeProto = node) -> Dims | None:
            name = node.input[index] if index < len(node.input) else ""
            return dims_of(types[name]) if name in types else None

        def constant(index: int, node: onnx.NodeProto = node) -> np.ndarray | None:
            name = node.input[index] if index < len(node.input) else ""
            return constants.get(name)

        for a, b in pairs(node, shape, constant):
            a, b = root(a), root(b)
            if a == b or a is None or b is None or 1 in (a, b):
                continue
            if isinstance(a, int) or (isinstance(b, str) and rank.get(b, 0) > rank.get(a, 0)):
                a, b = b, a
            if not isinstance(a, str) or a not in symbols:
                continue
            if isinstance(b, str) and b not in symbols:
                continue
            low, high = symbols[a]
            other_low, other_high = (b, b) if isinstance(b, int) else symbols[b]
            low = max(low, other_low)
            high = min((h for h in (high, other_high) if h is not None), default=None)
            if high is not None and low > high:
                found = f"dims {a!r} and {b!r} must be equal here; the shapes asked for exclude it"
                fix = f"choose a shape in which {a!r} equals {b!r}"
                problems.append(Problem("DC3014", where(node), found, fix))
                continue
            merged[a] = b
            if isinstance(b, str):
                symbols[b] = (low, high)
    final = {symbol: root(symbol) for symbol in merged}
    substitute(model.graph, {symbol: dim for symbol, dim in final.items() if dim is not None})
    for symbol in merged:
        del symbols[symbol]
    return bool(merged), problems
