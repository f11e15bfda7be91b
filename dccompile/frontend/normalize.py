"""Spells out operators that bundle quantization in the standard ones that the recovery reads.

QLinear operators become DequantizeLinear - operator - QuantizeLinear; ONNX Runtime's bundles
(domain com.microsoft) become MatMulInteger with Cast and Mul, Gemm or MatMul with an activation.
What does not fit (runtime scales of a bias, unusual attributes) stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from .editor import STANDARD, Editor, Shape, attribute, operand

MICROSOFT = "com.microsoft"

# operator: float operator, positions of its (tensor, scale, zero point) operands, of y_scale
_QLINEAR: dict[str, tuple[str, tuple[int, ...], int]] = {
    "QLinearMatMul": ("MatMul", (0, 3), 6),
    "QLinearConv": ("Conv", (0, 3), 6),
    "QGemm": ("Gemm", (0, 3), 7),
    "QLinearAdd": ("Add", (0, 3), 6),
    "QLinearMul": ("Mul", (0, 3), 6),
    "QLinearSigmoid": ("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), 3),
    "QLinearSoftmax": ("Softmax", (0,), 3),
    "QLinearAveragePool": ("AveragePool", (0,), 3),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 3),
}
_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu")
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def normalize(editor: Editor) -> None:
    """Rewrites every such node of the graph."""
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if node.domain not in (*STANDARD, MICROSOFT):
            continue
        op = node.op_type
        new: list[NodeProto] | None = None
        if node.domain == MICROSOFT and op in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""
        elif op in _QLINEAR:
            new = _qlinear(editor, node)
        elif op == "QLinearConcat" and node.domain == MICROSOFT:
            new = _qconcat(editor, node)
        elif op in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
            new = _integer(editor, node)
        elif op == "FusedGemm":
            new = _fused_gemm(editor, node)
        elif op == "FusedConv":
            new = _fused_conv(editor, node)
        elif op == "FusedMatMul":
            new = _fused_matmul(editor, node)
        if new is not None:
            changes[node.name] = new
    editor.rewrite(changes)


class _Chain:
    """New nodes in the place of one, each with the type of its value."""

    def __init__(self, editor: Editor, source: NodeProto) -> None:
        self.editor, self.source = editor, source
        self.nodes: list[NodeProto] = []

    def add(
        self,
        op: str,
        inputs: list[str],
        dtype: int = TensorProto.FLOAT,
        shape: Shape | None = None,
        output: str = "",
        **attributes: Any,
    ) -> str:
        node = self.editor.node(op, inputs, self.source, output, **attributes)
        self.nodes.append(node)
        if not output:
            self.editor.set_type(node.output[0], dtype, shape)
        return str(node.output[0])

    def dequantize(self, name: str, scale: str, zero: str, axis: int | None = None) -> str:
        """DequantizeLinear; scale and zero of one element lose their rank, as it wants them."""
        editor = self.editor
        attributes: dict[str, Any] = {}
        for part in (scale, zero):
            value = editor.constant(part) if part else None
            if value is not None and value.size == 1 and value.ndim:
                flat = editor.add_constant(value.reshape(()), f"{part}_scalar")
                scale, zero = (flat if p == part else p for p in (scale, zero))
        if axis is not None and not editor.is_scalar(scale):
            attributes["axis"] = axis
        inputs = [name, scale, zero] if zero else [name, scale]
        return self.add("DequantizeLinear", inputs, shape=editor.shape(name), **attributes)

    def turn(self, name: str, perm: list[int], shape: Shape) -> str:
        """Transpose of a float tensor of this shape."""
        return self.add("Transpose", [name], shape=tuple(shape[p] for p in perm), perm=perm)


def _kept(node: NodeProto, *names: str) -> dict[str, Any]:
    return {
        a.name: helper.get_attribute_value(a)
        for a in node.attribute
        if not names or a.name in names
    }


def _qlinear(editor: Editor, node: NodeProto) -> list[NodeProto] | None:
    op, positions, y_scale = _QLINEAR[node.op_type]
    chain = _Chain(editor, node)
    inputs = []
    for at in positions:
        name, scale, zero = (operand(node, at + i) for i in range(3))
        shape, scales = editor.shape(name), editor.shape(scale)
        if shape is None or scales is None or (len(scales) > 1 and not editor.is_scalar(scale)):
            return None
        axis = {
            "MatMul": len(shape) - (2 if at == 0 else 1),
            "Gemm": 0 if attribute(node, "transB", 0) else 1,
            "Conv": 0,
        }.get(op)
        inputs.append(chain.dequantize(name, scale, zero, axis))
    attributes = _kept(node)
    last = attributes.pop("channels_last", 0)
    if op == "Softmax" and attributes.pop("opset", 13) < 13:  # over all dims from the axis on
        return None
    bias = operand(node, {"Gemm": 6, "Conv": 8}.get(op, 99))
    if bias:
        first, second = (editor.constant(operand(node, at + 1)) for at in positions)
        if first is None or second is None:
            return None
        alpha = np.float32(attribute(node, "alpha", 1.0))
        scale = editor.add_constant((alpha * first * second).squeeze(), f"{bias}_scale")
        inputs.append(chain.dequantize(bias, scale, "", 0 if second.size > 1 else None))
    shape = editor.shape(node.output[0])
    if not operand(node, y_scale):
        chain.add(op, inputs, output=node.output[0], **attributes)
        return chain.nodes
    if last:
        given = editor.shape(node.input[0])
        if given is None or shape is None:
            return None
        rank = len(given)
        forth, back = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]
        inner = tuple(shape[p] for p in forth)
        pooled = chain.add(op, [chain.turn(inputs[0], forth, given)], shape=inner, **attributes)
        value = chain.turn(pooled, back, inner)
    else:
        value = chain.add(op, inputs, shape=shape, **attributes)
    _quantize(chain, value, operand(node, y_scale), operand(node, y_scale + 1))
    return chain.nodes


def _quantize(chain: _Chain, value: str, scale: str, zero: str) -> None:
    """Ends a chain: the quantized value under the name of the source's output."""
    editor, output = chain.editor, chain.source.output[0]
    names = [scale, zero] if zero else [scale]
    for index, name in enumerate(names):
        constant = editor.constant(name)
        if constant is not None and constant.ndim:
            names[index] = editor.add_constant(constant.reshape(()), f"{name}_scalar")
    chain.add("QuantizeLinear", [value, *names], output=output)


def _qconcat(editor: Editor, node: NodeProto) -> list[NodeProto]:
    chain = _Chain(editor, node)
    triples = [node.input[i : i + 3] for i in range(2, len(node.input), 3)]
    parts = [chain.dequantize(*triple) for triple in triples]
    axis = attribute(node, "axis", 1)
    value = chain.add("Concat", parts, shape=editor.shape(node.output[0]), axis=axis)
    _quantize(chain, value, node.input[0], node.input[1])
    return chain.nodes


def _integer(editor: Editor, node: NodeProto) -> list[NodeProto] | None:
    """MatMulInteger, Cast, Mul and Add; before them DynamicQuantizeLinear where it is bundled."""
    chain = _Chain(editor, node)
    shape = editor.shape(node.output[0])
    if node.op_type == "DynamicQuantizeMatMul":
        b, b_scale, b_zero, bias = (operand(node, i) for i in (1, 2, 3, 4))
        a = chain.add(
            "DynamicQuantizeLinear",
            [node.input[0]],
            TensorProto.UINT8,
            editor.shape(node.input[0]),
        )
        a_scale, a_zero = (editor.fresh(f"{node.name}_{part}") for part in ("scale", "zero"))
        chain.nodes[0].output.extend([a_scale, a_zero])
        editor.set_type(a_scale, TensorProto.FLOAT, ())
        editor.set_type(a_zero, TensorProto.UINT8, ())
    else:
        a, b, a_scale, b_scale, a_zero, b_zero, bias = (operand(node, i) for i in range(7))
        if not editor.is_scalar(a_scale) or (a_zero and not editor.is_scalar(a_zero)):
            return None
    product = chain.add("MatMulInteger", [a, b, a_zero, b_zero], TensorProto.INT32, shape)
    scales = chain.add("Mul", [a_scale, b_scale], shape=editor.shape(b_scale))
    value = chain.add("Cast", [product], shape=shape, to=TensorProto.FLOAT)
    if not bias:
        chain.add("Mul", [value, scales], output=node.output[0])
        return chain.nodes
    value = chain.add("Mul", [value, scales], shape=shape)
    chain.add("Add", [value, bias], output=node.output[0])
    return chain.nodes


def _fused_gemm(editor: Editor, node: NodeProto) -> list[NodeProto] | None:
    activation = attribute(node, "activation", b"").decode()
    if activation not in _ACTIVATIONS:
        return None
    chain = _Chain(editor, node)
    attributes = _kept(node, "alpha", "beta", "transA", "transB")
    value = chain.add("Gemm", [*node.input], shape=editor.shape(node.output[0]), **attributes)
    slope = {"alpha": attribute(node, "activation_alpha", 0.01)}
    chain.add(
        activation, [value], output=node.output[0], **(slope if activation == "LeakyRelu" else {})
    )
    return chain.nodes


def _fused_conv(editor: Editor, node: NodeProto) -> list[NodeProto] | None:
    """Conv, the sum with another tensor if there is one, then the activation."""
    activation = attribute(node, "activation", b"").decode()
    numbers = [float(x) for x in attribute(node, "activation_params") or []]
    chain = _Chain(editor, node)
    shape, other = editor.shape(node.output[0]), operand(node, 3)
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if other:
        steps.append(("Add", [other], {}))
    if activation in ("Relu", "Sigmoid", "Tanh"):
        steps.append((activation, [], {}))
    elif activation == "LeakyRelu" and len(numbers) == 1:
        steps.append((activation, [], {"alpha": numbers[0]}))
    elif activation == "HardSigmoid" and len(numbers) == 2:
        steps.append((activation, [], {"alpha": numbers[0], "beta": numbers[1]}))
    elif activation == "Clip" and len(numbers) == 2 and editor.opset() >= 11:
        limits = [editor.add_constant(np.float32(x), f"{node.name}_limit") for x in numbers]
        steps.append((activation, limits, {}))
    elif activation:
        return None
    inputs = list(node.input[:3] if operand(node, 2) else node.input[:2])
    value = chain.add("Conv", inputs, shape=shape, **_kept(node, *_CONV))
    for op, more, attributes in steps:
        value = chain.add(op, [value, *more], shape=shape, **attributes)
    chain.nodes[-1].output[0] = node.output[0]
    return chain.nodes


def _fused_matmul(editor: Editor, node: NodeProto) -> list[NodeProto] | None:
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return None
    chain = _Chain(editor, node)
    inputs = []
    for name, flag in zip(node.input, ("transA", "transB"), strict=True):
        shape = editor.shape(name)
        if attribute(node, flag, 0):
            if shape is None:
                return None
            axes = [*range(len(shape))]
            axes[-2:] = axes[:-3:-1]
            turned = tuple(shape[axis] for axis in axes)
            name = chain.add("Transpose", [name], editor.dtype(name), turned, perm=axes)
        inputs.append(name)
    alpha = attribute(node, "alpha", 1.0)
    if alpha == 1:
        chain.add("MatMul", inputs, output=node.output[0])
        return chain.nodes
    value = chain.add("MatMul", inputs, shape=editor.shape(node.output[0]))
    factor = editor.add_constant(np.asarray(alpha, np.float32), f"{node.name}_alpha")
    chain.add("Mul", [value, factor], output=node.output[0])
    return chain.nodes
