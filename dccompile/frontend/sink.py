"""Moves DequantizeLinear behind the operators that only move, or choose, values.

Both orders give the same bits as long as the whole tensor has one scale. Afterwards the moved
tensor is a quarter of the size, a multiplication behind it sees its quantized operand, and a
QuantizeLinear that undoes the dequantization can go.
"""

from __future__ import annotations

from onnx import NodeProto

from .editor import Editor, attribute, is_op, operand
from .quantized import INT8

MOVES = (
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "MaxPool",
)  # fmt: skip


def sink_dequantize(editor: Editor) -> None:
    """Rewrites every chain DequantizeLinear - mover - ... [- QuantizeLinear] of the graph."""
    sources: dict[str, list[str]] = {}  # dequantized value -> integers, scale, zero point
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        source = sources.get(node.input[0]) if node.input else None
        if is_op(node, "DequantizeLinear"):
            if editor.is_scalar(node.input[1]) and not attribute(node, "block_size", 0):
                sources[node.output[0]] = list(node.input)
        elif source is None:
            continue
        elif is_op(node, *MOVES) and len(node.output) == 1:
            integers, *parameters = source
            move = NodeProto()
            move.CopyFrom(node)
            move.name = editor.fresh(f"{node.name}_quantized")
            move.input[0], move.output[0] = integers, editor.fresh(f"{node.output[0]}_quantized")
            editor.origin[move.name] = editor.origin[node.name]
            editor.set_type(move.output[0], editor.dtype(integers), editor.shape(node.output[0]))
            inputs = [move.output[0], *parameters]
            back = editor.node("DequantizeLinear", inputs, node, output=node.output[0])
            changes[node.name] = [move, back]
            sources[node.output[0]] = inputs
        elif is_op(node, "QuantizeLinear") and _undoes(editor, node, source):
            identity = editor.node("Identity", [source[0]], node, output=node.output[0])
            changes[node.name] = [identity]
    editor.rewrite(changes)


def _undoes(editor: Editor, node: NodeProto, source: list[str]) -> bool:
    """Whether a QuantizeLinear gives back the integers: same type, scale and zero point."""
    integers, scale = source[:2]
    if editor.dtype(integers) != editor.dtype(node.output[0]) or (
        editor.dtype(integers) not in INT8
    ):
        return False
    first, second = editor.scalar(scale), editor.scalar(node.input[1])
    # A scale near the smallest numbers would round the products to others.
    if first is None or first != second or not first >= 1e-30:
        return False
    zeros = [editor.scalar(name) if name else 0 for name in (operand(node, 2), (*source, "")[2])]
    return zeros[0] is not None and zeros[0] == zeros[1]
