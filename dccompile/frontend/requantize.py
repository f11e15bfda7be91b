"""Makes a dequantization that is quantized again one step without a division.

QuantizeLinear(DequantizeLinear(q)) of 8-bit codes, or of sums of them, has few possible inputs.
Where rint((q - zero) * factor) + output_zero gives for each of them what the two operators give,
bit by bit, they become a DccRequantize (attributes of these names, and `to`, its type). A division
takes as long as all the rest. QuantizeLinear moves in front of a Concat of dequantized tensors for
this.
"""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from dccompile.workload import INT8_LIMITS

from .editor import Editor, attribute, is_op, operand
from .quantized import INT8

DOMAIN, OP = "dccompile", "DccRequantize"
_MOST = 1 << 16  # possible sums


def requantize(editor: Editor) -> None:
    """Rewrites the graph."""
    _before_concats(editor)
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        back = _dequantized(editor, node)
        if back is None:
            continue
        source = back.input[0]
        low, high = _range(editor, source)
        if high < low:
            continue
        scale, output_scale = (editor.scalar(n.input[1]) for n in (back, node))
        zero, output_zero = (_zero(editor, n) for n in (back, node))
        codes = np.arange(low, high + 1, dtype=np.int64) - zero
        with np.errstate(all="ignore"):
            wanted = np.rint(codes.astype(np.float32) * scale / output_scale)
            factor = np.float32(scale / output_scale)
            got = np.rint(codes.astype(np.float32) * factor)
        limits = INT8_LIMITS[INT8[editor.dtype(node.output[0])]]
        same = [np.clip(v + output_zero, *limits) for v in (wanted, got)]
        if np.isfinite(factor) and np.array_equal(*same):
            changes[node.name] = [
                editor.node(
                    OP,
                    [source],
                    node,
                    output=node.output[0],
                    domain=DOMAIN,
                    factor=float(factor),
                    zero=zero,
                    output_zero=output_zero,
                    to=editor.dtype(node.output[0]),
                )
            ]
    editor.rewrite(changes)


def _before_concats(editor: Editor) -> None:
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        join = editor.producer(node.input[0], "Concat") if is_op(node, "QuantizeLinear") else None
        if join is None or editor.only_user(join.output[0]) is None or not _scalar(editor, node):
            continue
        if not all(_source(editor, name) is not None for name in join.input):
            continue
        parts = []
        for name in join.input:
            part = editor.node("QuantizeLinear", [name, *node.input[1:]], node)
            editor.set_type(part.output[0], editor.dtype(node.output[0]), editor.shape(name))
            parts.append(part)
        axis = attribute(join, "axis", 0)
        names = [part.output[0] for part in parts]
        joined = editor.node("Concat", names, join, output=node.output[0], axis=axis)
        changes[node.name] = [*parts, joined]
    editor.rewrite(changes)


def _dequantized(editor: Editor, node: NodeProto) -> NodeProto | None:
    """The DequantizeLinear before a QuantizeLinear, both to 8 bits with one scale."""
    if not is_op(node, "QuantizeLinear") or not _scalar(editor, node):
        return None
    return _source(editor, node.input[0])


def _source(editor: Editor, name: str) -> NodeProto | None:
    back = editor.producer(name, "DequantizeLinear")
    return back if back is not None and _scalar(editor, back) else None


def _scalar(editor: Editor, node: NodeProto) -> bool:
    """Whether scale and zero point are constant scalars and the output 8-bit or f32."""
    scale = editor.scalar(node.input[1])
    zero = editor.scalar(node.input[2]) if operand(node, 2) else 0
    kind = editor.dtype(node.output[0])
    fits = kind in INT8 if node.op_type == "QuantizeLinear" else kind == TensorProto.FLOAT
    plain = not attribute(node, "block_size", 0) and not attribute(node, "precision", 0)
    return fits and plain and isinstance(scale, np.float32) and zero is not None


def _zero(editor: Editor, node: NodeProto) -> int:
    return int(editor.scalar(node.input[2])) if operand(node, 2) else 0


def _range(editor: Editor, name: str) -> tuple[int, int]:
    """Least and most that an integer tensor can hold; nothing where that is too much to try."""
    kind = editor.dtype(name)
    if kind in INT8:
        return INT8_LIMITS[INT8[kind]]
    pool = editor.producer_of(name, DOMAIN, "DccPool")
    if pool is None or attribute(pool, "kind") != b"Sum":
        return 0, -1
    count = prod(attribute(pool, "kernel"))
    low, high = INT8_LIMITS[INT8[editor.dtype(pool.input[0])]]
    return (count * low, count * high) if count * 256 <= _MOST else (0, -1)
