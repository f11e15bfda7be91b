"""Folds BatchNormalization into the convolution before it, or makes it a factor and a sum."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .editor import Editor, attribute, is_op, operand
from .quantized import constant_operand


def fold_batch_norms(editor: Editor) -> None:
    """Rewrites every BatchNormalization of constant numbers, in float32."""
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if not is_op(node, "BatchNormalization") or attribute(node, "training_mode", 0):
            continue
        parts = [_constant(editor, name) for name in node.input[1:5]]
        shape = editor.shape(node.input[0])
        if shape is None or any(p is None or p.dtype != np.float32 for p in parts):
            continue
        if any(node.output[1:]):
            continue
        gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parts)
        factor = gamma / np.sqrt(variance + np.float32(attribute(node, "epsilon", 1e-5)))
        offset = beta - mean * factor
        changes[node.name] = _into_conv(editor, node, factor, offset) or _apart(
            editor, node, factor, offset, len(shape)
        )
    editor.rewrite(changes)


def _constant(editor: Editor, name: str) -> np.ndarray | None:
    """Some tools quantize the factor."""
    found = constant_operand(editor, name)
    return None if found is None else found.dequantize()


def _into_conv(
    editor: Editor, node: NodeProto, factor: np.ndarray, offset: np.ndarray
) -> list[NodeProto] | None:
    """The convolution that makes the node's input, with other weights, in the node's place."""
    conv = editor.producer(node.input[0], "Conv")
    if conv is None or editor.only_user(node.input[0]) is None:
        return None
    weights = editor.constant(conv.input[1])
    bias = editor.constant(conv.input[2]) if operand(conv, 2) else np.zeros(factor.shape)
    if weights is None or bias is None or weights.dtype != np.float32:
        return None
    scaled = weights * factor.reshape(-1, *[1] * (weights.ndim - 1))
    new = NodeProto()
    new.CopyFrom(conv)
    new.name = editor.fresh(f"{conv.name}_folded")
    editor.origin[new.name] = (*editor.origin[conv.name], *editor.origin[node.name])
    new.input[:] = [
        conv.input[0],
        editor.add_constant(scaled.astype(np.float32), f"{conv.input[1]}_folded"),
        editor.add_constant((bias * factor + offset).astype(np.float32), f"{conv.name}_bias"),
    ]
    new.output[:] = [node.output[0]]
    return [new]


def _apart(
    editor: Editor, node: NodeProto, factor: np.ndarray, offset: np.ndarray, rank: int
) -> list[NodeProto]:
    """x * factor + offset, along the channels."""
    dims = (-1, *[1] * (rank - 2)) if rank > 1 else (-1,)
    names = [
        editor.add_constant(v.astype(np.float32).reshape(dims), f"{node.name}_{what}")
        for v, what in ((factor, "factor"), (offset, "offset"))
    ]
    scaled = editor.node("Mul", [node.input[0], names[0]], node)
    editor.set_type(scaled.output[0], editor.dtype(node.input[0]), editor.shape(node.input[0]))
    moved = editor.node("Add", [scaled.output[0], names[1]], node, output=node.output[0])
    return [scaled, moved]
