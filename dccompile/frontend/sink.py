"""Moves DequantizeLinear behind the operators that only move, repeat or choose values.

Both orders give the same bits as long as the whole tensor has one scale. Afterwards the moved
tensor is a quarter of the size, a multiplication behind it sees its quantized operand, and a
QuantizeLinear that undoes the dequantization can go.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .code_tables import dequantize, quantize
from .editor import Editor, attribute, is_op, operand
from .hoist import chooses, padding
from .quantized import INT8

# Of one tensor alone: codes that are all changed alike on the way in come out changed alike.
MOVES = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "GlobalMaxPool", "MaxPool", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip


def moves(node: NodeProto) -> bool:
    """Whether the node gives elements of its first input only."""
    if is_op(node, "MaxPool", "GlobalMaxPool"):
        return len(node.output) == 1
    return is_op(node, *MOVES) or (is_op(node, "Resize") and chooses(node))


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
        elif is_op(node, "QuantizeLinear"):
            if _undoes(editor, node, source):
                identity = editor.node("Identity", [source[0]], node, output=node.output[0])
                changes[node.name] = [identity]
        elif (inputs := _inputs(editor, node, sources)) is not None:
            changes[node.name] = _behind(editor, node, inputs, source, sources)
    editor.rewrite(changes)


def _inputs(editor: Editor, node: NodeProto, sources: dict[str, list[str]]) -> list[str] | None:
    """What a mover reads when it moves integers; None if it is none."""
    integers, *parameters = sources[node.input[0]]
    if moves(node):
        return [integers, *node.input[1:]]
    if is_op(node, "Concat"):
        parts = [sources.get(name) for name in node.input]
        if any(part is None or not _alike(editor, parts[0] or [], part) for part in parts):
            return None
        return [part[0] for part in parts if part]
    if is_op(node, "Pad"):
        code = _padding_code(editor, node, integers, parameters)
        return None if code is None else [integers, node.input[1], code, *node.input[3:]]
    return None


def _behind(
    editor: Editor,
    node: NodeProto,
    inputs: list[str],
    source: list[str],
    sources: dict[str, list[str]],
) -> list[NodeProto]:
    """The mover of integers, and what dequantizes each of its outputs."""
    move = NodeProto()
    move.CopyFrom(node)
    move.name = editor.fresh(f"{node.name}_quantized")
    move.input[:] = inputs
    editor.origin[move.name] = editor.origin[node.name]
    made = [move]
    for index, name in enumerate(node.output):
        move.output[index] = editor.fresh(f"{name}_quantized")
        editor.set_type(move.output[index], editor.dtype(source[0]), editor.shape(name))
        sources[name] = [move.output[index], *source[1:]]
        made.append(editor.node("DequantizeLinear", sources[name], node, output=name))
    return made


def _alike(editor: Editor, a: list[str], b: list[str]) -> bool:
    """Whether two dequantizations have the same constant parameters and type."""
    if len(a) != len(b) or editor.dtype(a[0]) != editor.dtype(b[0]):
        return False
    numbers = [[editor.scalar(name) if name else 0 for name in side[1:]] for side in (a, b)]
    return a[1:] == b[1:] or (None not in numbers[0] and numbers[0] == numbers[1])


def _padding_code(
    editor: Editor, node: NodeProto, integers: str, parameters: list[str]
) -> str | None:
    """A constant with the code of what a Pad puts around its input, if there is one."""
    value, scale = padding(editor, node), editor.scalar(parameters[0])
    zero = editor.scalar(parameters[1]) if len(parameters) > 1 and parameters[1] else np.uint8(0)
    if value is None or zero is None or not isinstance(scale, np.float32):
        return None
    if editor.dtype(integers) not in INT8:
        return None
    code = quantize(np.asarray(value), scale, zero)
    if dequantize(code, scale, zero) != value:
        return None
    return editor.add_constant(code, f"{node.name}_code")


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
