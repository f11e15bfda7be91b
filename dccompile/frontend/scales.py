"""Quantization parameters: scales, zero points and axes that a quantized tensor can have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .infer import type_name
from .operands import Node

EXPORT = "export the model again, or correct the value"
Finding = tuple[str, str]  # what was found and is allowed, and the fix

# Per operator: inputs that are scale, zero point and quantized data (None: the output).
_PER_TENSOR = [(1, 2, 0), (3, 4, None)]
_PAIR = [(1, 2, 0), (4, 5, 3), (6, 7, None)]
_QUANTIZED: dict[str, list[tuple[int, int, int | None]]] = {
    "QuantizeLinear": [(1, 2, None)],
    "DequantizeLinear": [(1, 2, 0)],
    "QLinearMatMul": _PAIR,
    "QLinearConv": _PAIR,
    "QLinearAdd": _PAIR,
    "QLinearMul": _PAIR,
    "QGemm": [(1, 2, 0), (4, 5, 3), (7, 8, None)],
    "QLinearSigmoid": _PER_TENSOR,
    "QLinearLeakyRelu": _PER_TENSOR,
    "QLinearSoftmax": _PER_TENSOR,
    "QLinearAveragePool": _PER_TENSOR,
    "QLinearGlobalAveragePool": _PER_TENSOR,
    "MatMulIntegerToFloat": [(2, 4, 0), (3, 5, 1)],
    "DynamicQuantizeMatMul": [(2, 3, 1)],
}


def check(node: Node) -> Iterator[Finding]:
    kind = node.node.op_type
    triples = _QUANTIZED.get(kind, [])
    if kind == "QLinearConcat":
        parts = range(2, len(node.node.input), 3)
        triples = [(0, 1, None), *((i + 1, i + 2, i) for i in parts)]
    for scale_index, zero_index, data_index in triples:
        yield from _scale(node, scale_index)
        yield from _zero_point(node, scale_index, zero_index, data_index)
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        yield from _axis(node)


def _scale(node: Node, index: int) -> Iterator[Finding]:
    scale = node.constant(index)
    if scale is None or scale.dtype.kind in "OSU":
        return
    numbers = np.asarray(scale, np.float32).reshape(-1)
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0)))
    if bad.size:
        at = f" at index {bad[0]}" if numbers.size > 1 else ""
        name = node.node.input[index]
        found = f"scale {name!r} is {numbers[bad[0]]}{at}; a finite number above 0 is allowed"
        yield found, "calibrate again: a constant or empty activation gives such a scale"


def _zero_point(node: Node, scale: int, zero: int, data: int | None) -> Iterator[Finding]:
    if not node.has(zero):
        return
    have, name = node.elem_type(zero), node.node.input[zero]
    want = node.elem_type(data) if data is not None else node.attribute("output_dtype", 0)
    if have and want and have != want:
        found = f"zero point {name!r} is {type_name(have)}; {type_name(want)}, "
        yield found + "the type of the quantized tensor, is allowed", EXPORT
    dims, other = node.dims(zero), node.dims(scale)
    if dims is not None and other is not None and not _fits(dims, other):
        found = f"zero point {name!r} has shape {dims}; the scale's shape {other} is allowed"
        yield found, EXPORT


def _fits(a: list[int | None], b: list[int | None]) -> bool:
    if all(d == 1 for d in a) and all(d == 1 for d in b):
        return True
    return len(a) == len(b) and all(p == q or None in (p, q) for p, q in zip(a, b, strict=True))


def _axis(node: Node) -> Iterator[Finding]:
    data, scale = node.dims(0), node.dims(1)
    axis, block = node.attribute("axis", 1), node.attribute("block_size", 0)
    if data is None or scale is None or (all(d == 1 for d in scale) and len(scale) < 2):
        return
    if block < 0:
        yield f"block_size {block}; 0 or more is allowed", EXPORT
    elif not block and len(scale) != 1:
        yield f"scale has shape {scale}; a scalar or one dim is allowed", EXPORT
    elif not -len(data) <= axis < len(data):
        found = f"axis {axis} of data with {len(data)} dims; {-len(data)} to {len(data) - 1} "
        yield found + "are allowed", EXPORT
    elif not block and None not in (scale[0], data[axis]) and scale[0] != data[axis]:
        found = f"{scale[0]} scales for axis {axis}, which has {data[axis]} entries; "
        yield found + "one scale per entry is allowed", EXPORT
    elif block:
        want = list(data)
        want[axis] = None if data[axis] is None else -(-data[axis] // block)
        if not _fits(scale, want):
            found = f"scale has shape {scale}; {want} is allowed for blocks of {block}"
            yield found, EXPORT
