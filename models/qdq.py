"""The int8 form of a reference model: quantize/dequantize pairs around its Gemms.

Activations u8 with one scale each, calibrated once; weights s8 with a scale per output, symmetric;
biases s32 in the scale of the accumulator. What follows a Gemm without another Gemm stays float.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Scales = Mapping[str, "list[float]"]  # tensor -> scale, zero point


def quantize(model: onnx.ModelProto, scales: Scales) -> onnx.ModelProto:
    """The model with every Gemm of constant weights (n, k), transB=1, quantized."""
    constants = {t.name: t for t in model.graph.initializer}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.initializer[:]
    nodes: list[onnx.NodeProto] = []
    made: dict[str, onnx.TensorProto] = {}
    quantized: dict[str, str] = {}

    def constant(value: np.ndarray, name: str) -> str:
        made[name] = numpy_helper.from_array(value, name)
        return name

    def activation(name: str) -> str:
        if name not in quantized:
            scale, zero = scales[name]
            parameters = [
                constant(np.asarray(scale, np.float32), f"{name}_scale"),
                constant(np.asarray(zero, np.uint8), f"{name}_zero_point"),
            ]
            for op, source, target in (
                ("QuantizeLinear", name, f"{name}_quantized"),
                ("DequantizeLinear", f"{name}_quantized", f"{name}_dequantized"),
            ):
                title = f"{name}_{op}"
                nodes.append(helper.make_node(op, [source, *parameters], [target], name=title))
            quantized[name] = f"{name}_dequantized"
        return quantized[name]

    def parameter(name: str, value: np.ndarray, scale: np.ndarray) -> str:
        inputs = [
            constant(value, f"{name}_quantized"),
            constant(scale, f"{name}_scale"),
            constant(np.zeros(scale.shape, value.dtype), f"{name}_zero_point"),
        ]
        output, title = f"{name}_dequantized", f"{name}_DequantizeLinear"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=title, axis=0))
        return output

    for node in model.graph.node:
        if not is_layer(node, constants):
            nodes.append(node)
            continue
        a, b, c = node.input
        source = activation(a)
        w, bias = (numpy_helper.to_array(constants.pop(name)) for name in (b, c))
        scale = np.maximum(np.abs(w).max(axis=1), np.float32(1e-8)) / np.float32(127)
        accumulator = np.float32(scales[a][0]) * scale
        inputs = [
            source,
            parameter(b, np.rint(w / scale[:, None]).astype(np.int8), scale),
            parameter(c, np.rint(bias / accumulator).astype(np.int32), accumulator),
        ]
        layer = onnx.NodeProto()
        layer.CopyFrom(node)
        layer.input[:] = inputs
        nodes.append(layer)
    graph.node.extend(nodes)
    graph.initializer.extend([*constants.values(), *made.values()])
    return result


def is_layer(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    return node.op_type == "Gemm" and len(node.input) == 3 and node.input[1] in constants


def calibrate(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Scale and zero point of the input of every layer, from its range over `feeds`."""
    constants = {t.name: t for t in model.graph.initializer}
    wanted = dict.fromkeys(n.input[0] for n in model.graph.node if is_layer(n, constants))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted
    )
    found = {}
    for name, value in zip(wanted, ReferenceEvaluator(probe).run(None, feeds), strict=True):
        low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        scale = float(f"{(high - low) / 255:.6g}")
        found[name] = [scale, round(-low / scale)]
    return found
