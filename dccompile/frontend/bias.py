"""Folds the sum of a convolution and a constant per channel into the convolution's bias."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .editor import Editor, is_op, operand


def fold_biases(editor: Editor) -> None:
    """Rewrites every Conv - Add of float32 constants; some exporters write each bias so."""
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if is_op(node, "Add"):
            for name, other in (node.input, node.input[::-1]):
                new = _folded(editor, node, name, other)
                if new is not None:
                    changes[node.name] = [new]
                    break
    editor.rewrite(changes)


def _folded(editor: Editor, node: NodeProto, name: str, other: str) -> NodeProto | None:
    """The convolution that makes `name`, `other` in its bias, in the place of their sum."""
    conv, constant = editor.producer(name, "Conv"), editor.constant(other)
    if conv is None or constant is None or editor.only_user(name) is None:
        return None
    shape, filters = editor.shape(name), (editor.shape(conv.input[1]) or (None,))[0]
    if shape is None or not isinstance(filters, int) or constant.dtype != np.float32:
        return None
    dims = (1,) * (len(shape) - constant.ndim) + constant.shape
    if len(dims) != len(shape) or any(d != 1 for i, d in enumerate(dims) if i != 1):
        return None
    bias = editor.constant(conv.input[2]) if operand(conv, 2) else np.zeros(filters, np.float32)
    if bias is None or bias.dtype != np.float32 or constant.size not in (1, filters):
        return None
    new = NodeProto()
    new.CopyFrom(conv)
    new.name = editor.fresh(f"{conv.name}_biased")
    editor.origin[new.name] = (*editor.origin[conv.name], *editor.origin[node.name])
    total = (bias + constant.reshape(-1)).astype(np.float32)
    new.input[:] = [*conv.input[:2], editor.add_constant(total, f"{conv.name}_bias")]
    new.output[:] = [node.output[0]]
    return new
