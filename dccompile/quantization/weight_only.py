"""Weights of matrix multiplications in 8 bits, activations in float.

For layers that are bound by reading their weights: a step of a recurrent cell, a fully connected
layer at small batch (Park et al. 2018, section 3.2.1). The model says it in standard operators, a
DequantizeLinear between the codes and the layer, which the compiler keeps. ONNX Runtime makes
MatMulNBits of it, and with its defaults quantizes the activations as well: 40 dB away on Gaussian
data; the session option session.qdq_matmulnbits_accuracy_level 1 keeps them in float.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from dccompile.columns import Columns, quantize_columns
from dccompile.errors import ModelError, Problem, UsageError
from dccompile.frontend.editor import Editor, attribute, is_op, operand


def weight_only(model: onnx.ModelProto, layers: Iterable[str], bits: int = 8) -> onnx.ModelProto:
    """The model with the weights of `layers`, Gemm or MatMul nodes by name, as codes.

    `model` is a prepared one, see `prepare`: opset 13 at least. Weights W (k, n), or (n, k), become
    `W_quantized` s8 of `bits` bits, 2 to 8, with `W_scale` f32 for every column n, of least squared
    error. Layers that share weights go on sharing them.

    Raises ModelError listing every layer whose weights cannot be quantized.
    """
    if not 2 <= bits <= 8:
        raise UsageError(f"bits {bits}: allowed are 2 to 8. Fix: name one of these", "DC2058")
    editor = Editor(model)
    values: dict[tuple[str, int], str] = {}
    changes: dict[str, list[NodeProto]] = {}
    for node in constant_layers(editor, layers):
        name, turned = node.input[1], is_turned(node)
        key = (name, 0 if turned else 1)
        changes[node.name] = [node]
        if key not in values:
            found = quantize_layer(editor, node, bits)
            codes = np.ascontiguousarray(found.codes.T) if turned else found.codes
            inputs = [
                editor.add_constant(codes, f"{name}_quantized"),
                editor.add_constant(found.scale, f"{name}_scale"),
                editor.add_constant(np.zeros(found.scale.shape, np.int8), f"{name}_zero_point"),
            ]
            values[key] = editor.fresh(f"{name}_dequantized")
            wide = editor.node("DequantizeLinear", inputs, node, values[key], axis=key[1])
            editor.set_type(values[key], TensorProto.FLOAT, editor.shape(name))
            changes[node.name] = [wide, node]
        node.input[1] = values[key]
    editor.rewrite(changes)
    return editor.finish()


def constant_layers(editor: Editor, layers: Iterable[str]) -> list[NodeProto]:
    """The nodes of these names, in the graph's order.

    Raises ModelError unless all are Gemm or MatMul of float32 and a constant, finite matrix.
    """
    wanted = dict.fromkeys(layers)
    nodes = [node for node in editor.nodes if node.name in wanted]
    found = {node.name: reason for node in nodes if (reason := _unfit(editor, node))}
    known = {node.name for node in nodes}
    found.update({name: "the model has no such node" for name in wanted if name not in known})
    if found:
        fix = "leave it out, or exclude it from quantization"
        raise ModelError([Problem("DC3207", f"node '{n}'", why, fix) for n, why in found.items()])
    return nodes


def _unfit(editor: Editor, node: NodeProto) -> str:
    """Why the weights of a node cannot be quantized per column, or ""."""
    if not is_op(node, "Gemm", "MatMul"):
        return f"it is a {node.op_type}, only Gemm and MatMul have columns of weights"
    weights = editor.constant(operand(node, 1))
    if weights is None:
        return "its weights are not constant"
    if weights.dtype != np.float32 or weights.ndim != 2:
        return f"its weights are {weights.dtype} of rank {weights.ndim}, not float32 of rank 2"
    if not np.isfinite(weights).all():
        return "a weight is not finite"
    return ""


def is_turned(node: NodeProto) -> bool:
    """Whether the weights are stored (n, k)."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def quantize_layer(editor: Editor, node: NodeProto, bits: int = 8) -> Columns:
    """The weights of a layer (k, n) in codes."""
    weights = editor.constant(node.input[1])
    assert weights is not None
    return quantize_columns(weights.T if is_turned(node) else weights, bits)
