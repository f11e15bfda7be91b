"""Moves QuantizeLinear in front of the operators that only move, repeat or choose values.

Codes are made of numbers one by one, so both orders give the same codes; a maximum may be taken of
either because codes grow with the numbers. Afterwards the operator moves bytes, what made the
numbers is followed by its quantization and can be computed together with it, and a
DequantizeLinear of the same scale in front of a Concat goes. The other direction is `sink`.

Float operators that kernels run together, as a Concat behind an interaction of embeddings, stay as
they are: only what is computed of 8-bit tensors, at most one layer ago, is quantized earlier.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .code_tables import ELEMENTWISE, parameters, quantize, scalar_pair
from .editor import Editor, attribute, is_op, operand
from .forms import set_attribute

# Slice, Split and Gather are not here: all of the input would be quantized for a part of it.
_MOVES = (
    "Concat", "DepthToSpace", "Expand", "Flatten", "MaxPool", "Pad", "Reshape", "Resize",
    "SpaceToDepth", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_PARTS = ("Gather", "Slice", "Split")
_MEANS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMean")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def hoist_quantize(editor: Editor) -> None:
    """Rewrites every chain of such operators, each read by the next alone, and a QuantizeLinear."""
    _keep_dims(editor)
    changed = True
    while changed:
        changes: dict[str, list[NodeProto]] = {}
        near = _near(editor)
        for node in editor.nodes:
            if is_op(node, "QuantizeLinear") and scalar_pair(editor, node):
                move = editor.producer(node.input[0], *_MOVES)
                alone = move is not None and editor.only_user(move.output[0]) is node
                if move is not None and alone and len(move.output) == 1 and node.input[0] in near:
                    new = _swapped(editor, move, node)
                    if new:
                        changes[node.name] = new
        editor.rewrite(changes)
        changed = bool(changes)


def _keep_dims(editor: Editor) -> None:
    """Means of the pixels of dequantized images that keep their dims, and a Flatten to move over.

    Such means are computed of integers, see `layout_windows`.
    """
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if not is_op(node, "ReduceMean") or attribute(node, "keepdims", 1):
            continue
        shape = editor.shape(node.input[0])
        if shape is None or editor.producer(node.input[0], "DequantizeLinear") is None:
            continue
        given = editor.constant(operand(node, 1)) if operand(node, 1) else attribute(node, "axes")
        axes = [] if given is None else sorted(int(a) % len(shape) for a in given)
        if axes and axes == [*range(2, len(shape))]:
            kept = NodeProto()
            kept.CopyFrom(node)
            kept.output[0] = editor.fresh(f"{node.output[0]}_kept")
            set_attribute(kept, "keepdims", 1)
            dims = (*shape[:2], *[1] * (len(shape) - 2))
            editor.set_type(kept.output[0], editor.dtype(node.output[0]), dims)
            flat = editor.node("Flatten", [kept.output[0]], node, output=node.output[0], axis=1)
            changes[node.name] = [kept, flat]
    editor.rewrite(changes)


def _near(editor: Editor) -> set[str]:
    """Float values computed of 8-bit tensors, with one layer of multiplications at most."""
    near: set[str] = set()
    direct: set[str] = set()  # without any
    for node in editor.nodes:
        if is_op(node, "DequantizeLinear"):
            direct.update(node.output)
        elif is_op(node, *_LAYERS):
            if node.input[0] in direct:
                near.update(node.output)
        elif is_op(node, *_MOVES, *_PARTS, *_MEANS, *ELEMENTWISE):
            read = node.input if is_op(node, "Concat", *ELEMENTWISE) else node.input[:1]
            read = [name for name in read if name and editor.constant(name) is None]
            for found in (near, direct):
                if read and all(name in found or name in direct for name in read):
                    found.update(node.output)
    return near | direct


def _swapped(editor: Editor, move: NodeProto, node: NodeProto) -> list[NodeProto]:
    """The quantization of what `move` reads, then `move`; nothing where that is not the same."""
    kind = editor.dtype(node.output[0])
    values = list(move.input) if move.op_type == "Concat" else [move.input[0]]
    inputs = list(move.input)
    if is_op(move, "Resize") and not chooses(move):
        return []
    if is_op(move, "Pad"):
        found = padding(editor, move)
        if found is None:
            return []
        code = quantize(np.asarray(found), *parameters(editor, node))
        inputs[2:3] = [editor.add_constant(code, f"{move.name}_code")]
    parts = []
    for index, value in enumerate(values):
        part = editor.node("QuantizeLinear", [value, *node.input[1:]], node)
        editor.set_type(part.output[0], kind, editor.shape(value))
        inputs[index] = part.output[0]
        parts.append(part)
    moved = NodeProto()
    moved.CopyFrom(move)
    moved.name = editor.fresh(f"{move.name}_quantized")
    moved.input[:], moved.output[:] = inputs, node.output[:1]
    editor.origin[moved.name] = editor.origin[move.name]
    return [*parts, moved]


def chooses(node: NodeProto) -> bool:
    """Whether every element of a Resize's output is one of its input's."""
    outside = attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    return attribute(node, "mode", b"nearest") == b"nearest" and not outside


def padding(editor: Editor, node: NodeProto) -> np.float32 | None:
    """What a Pad puts around its input; None where it is not a constant input, or not one."""
    if attribute(node, "mode", b"constant") != b"constant" or len(node.input) < 2:
        return None
    value = editor.scalar(operand(node, 2)) if operand(node, 2) else np.float32(0)
    return value if isinstance(value, np.float32) else None
