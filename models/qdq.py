"""The int8 form of a reference model: quantize/dequantize pairs around its layers.

As ONNX Runtime's static quantizer writes it: activations u8 with one scale each, calibrated once;
weights s8 with a scale per output channel, symmetric; biases s32 in the scale of the accumulator.
A Relu or Clip in front of a quantization to its range is dropped: the codes saturate there.
Tensors without a scale, and what is computed of them alone, stay float.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Scales = Mapping[str, "list[float]"]  # tensor -> scale, zero point

_LAYERS = ("Conv", "Gemm")  # with constant weights, a row of them for every output channel
_SAME = ("AveragePool", "Flatten", "MaxPool", "Reshape", "Transpose")  # keep the scale they get
_ACTIVATIONS = ("Clip", "Relu")
_INTEGER = (*_LAYERS, *_SAME, *_ACTIVATIONS, "Add", "Concat", "GlobalAveragePool", "RoiAlign")


def quantize(model: onnx.ModelProto, scales: Scales) -> onnx.ModelProto:
    """The model with a pair at every tensor of `scales` and the layers behind them quantized."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    writer = _Writer(model, scales)
    for node in model.graph.node:
        writer.add(node)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    read = {name for node in writer.nodes for name in node.input}
    graph.node.extend(n for n in writer.nodes if n.op_type != "Constant" or n.output[0] in read)
    graph.initializer.extend([*writer.constants.values(), *writer.made.values()])
    return result


class _Writer:
    def __init__(self, model: onnx.ModelProto, scales: Scales) -> None:
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {t.name: t for t in graph.initializer}
        self.made: dict[str, onnx.TensorProto] = {}
        self.scales = scales
        self.outputs = {value.name for value in graph.output}
        self.quantized: dict[str, str] = {}
        self.dropped = {  # the tensor before -> the one behind
            node.input[0]: node.output[0]
            for node in graph.node
            if node.output[0] in scales and not scales[node.output[0]][1] and _single(graph, node)
        }
        for value in graph.input:
            if value.name in scales:
                self._pair(value.name, value.name)

    def add(self, node: onnx.NodeProto) -> None:
        if node.input and node.input[0] in self.dropped:
            return
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[:] = [self.quantized.get(name, name) for name in node.input]
        if _is_layer(node, self.constants) and node.input[0] in self.scales:
            self._parameters(node, new)
        new.output[:] = [self.dropped.get(name, name) for name in node.output]
        self.nodes.append(new)
        for index, name in enumerate(new.output):
            if name in self.scales:
                if name in self.outputs:
                    new.output[index] = f"{name}_float"
                self._pair(name, new.output[index])

    def _pair(self, name: str, source: str) -> None:
        scale, zero = self.scales[name]
        parameters = [
            self._constant(np.asarray(scale, np.float32), f"{name}_scale"),
            self._constant(np.asarray(zero, np.uint8), f"{name}_zero_point"),
        ]
        target = name if name in self.outputs else f"{name}_dequantized"
        self._node("QuantizeLinear", name, [source, *parameters], f"{name}_quantized")
        self._node("DequantizeLinear", name, [f"{name}_quantized", *parameters], target)
        self.quantized[name] = target

    def _parameters(self, node: onnx.NodeProto, new: onnx.NodeProto) -> None:
        """Quantizes the weights and the bias of a layer."""
        weights = numpy_helper.to_array(self.constants.pop(node.input[1]))
        rows = weights.reshape(len(weights), -1)
        scale = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-8)) / np.float32(127)
        codes = np.rint(rows / scale[:, None]).astype(np.int8).reshape(weights.shape)
        new.input[1] = self._parameter(node.input[1], codes, scale)
        if len(node.input) > 2:
            bias = numpy_helper.to_array(self.constants.pop(node.input[2]))
            accumulator = np.float32(self.scales[node.input[0]][0]) * scale
            codes = np.rint(bias / accumulator).astype(np.int32)
            new.input[2] = self._parameter(node.input[2], codes, accumulator)

    def _parameter(self, name: str, value: np.ndarray, scale: np.ndarray) -> str:
        inputs = [
            self._constant(value, f"{name}_quantized"),
            self._constant(scale, f"{name}_scale"),
            self._constant(np.zeros(scale.shape, value.dtype), f"{name}_zero_point"),
        ]
        self._node("DequantizeLinear", name, inputs, f"{name}_dequantized", axis=0)
        return f"{name}_dequantized"

    def _constant(self, value: np.ndarray, name: str) -> str:
        self.made[name] = numpy_helper.from_array(value, name)
        return name

    def _node(self, op: str, name: str, inputs: list[str], output: str, **attributes: int) -> None:
        title = f"{name}_{op}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=title, **attributes))


def _is_layer(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    return node.op_type in _LAYERS and node.input[1] in constants


def _single(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Whether this is an activation, and the only reader of its input."""
    readers = sum([*other.input].count(node.input[0]) for other in graph.node)
    return node.op_type in _ACTIVATIONS and readers == 1


def layer_inputs(model: onnx.ModelProto) -> list[str]:
    """The tensors that layers read: what follows a layer without another one stays float."""
    constants = {t.name: t for t in model.graph.initializer}
    return [*dict.fromkeys(n.input[0] for n in model.graph.node if _is_layer(n, constants))]


def activations(model: onnx.ModelProto, floats: Collection[str] = ()) -> list[str]:
    """The float input and every tensor that integers can hold, but for those before a Relu.

    `floats` and what is computed of them stay float.
    """
    graph = model.graph
    known = {value.name for value in graph.input}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type in _INTEGER and node.input[0] in known:
            known.update(name for name in node.output if name not in floats)
    fused = {
        node.input[0]
        for node in graph.node
        if node.op_type in _ACTIVATIONS and readers[node.input[0]] == 1
    }
    return [name for name in _tensors(graph) if name in known and name not in fused]


def _tensors(graph: onnx.GraphProto) -> Iterable[str]:
    yield from (value.name for value in graph.input)
    yield from (name for node in graph.node for name in node.output)


def calibrate(
    model: onnx.ModelProto, feeds: Iterable[dict[str, np.ndarray]], wanted: Iterable[str]
) -> dict[str, list[float]]:
    """Scale and zero point of the tensors wanted, from their range over the feeds."""
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = [*wanted]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    low, high = np.zeros(len(names)), np.zeros(len(names))
    for feed in feeds:
        for index, value in enumerate(session.run(None, feed)):
            low[index] = min(low[index], value.min(initial=0))
            high[index] = max(high[index], value.max(initial=0))
    found: dict[str, list[float]] = {}
    same = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in _SAME}
    for name, least, most in zip(names, low.tolist(), high.tolist(), strict=True):
        scale = float(f"{(most - least) / 255:.6g}")
        found[name] = found.get(same.get(name, ""), [scale, round(-least / scale)])
    return found


def dump(scales: Scales, path: Path) -> None:
    """Writes scales as JSON, a line for each tensor."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in scales.items()]
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
