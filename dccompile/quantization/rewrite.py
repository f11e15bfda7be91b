"""Writes the QDQ model: pairs at the planned tensors, layers with 8-bit weights and 32-bit biases.

A tensor T keeps its name for the float value before the pair; ``T_quantized`` are the codes and
``T_dequantized`` is what all readers get. Where T is an output of the model T is the value behind
the pair, and ``T_float`` the one before. Weights W become ``W_quantized``, ``W_scale``,
``W_zero_point`` and ``W_dequantized``. Nodes keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from dccompile.frontend.editor import operand

from .placement import Group, Plan
from .ranges import Range
from .weights import Quantized

_MOST_BIAS = 2.0**31 - 1


@dataclass(frozen=True)
class Layer:
    """What a layer computes with: weights, and its bias (channels,) f32, if it has one.

    The bias of a MatMul is added behind it, and stays float. `corrected`: what the rounding of the
    weights adds on average is taken off the bias.
    """

    weights: Quantized
    bias: np.ndarray | None
    corrected: bool = False


def write(
    model: onnx.ModelProto,
    plan: Plan,
    ranges: Mapping[Group, Range],
    layers: Mapping[str, Layer],
) -> onnx.ModelProto:
    """The QDQ form of a prepared float model; `layers` by node name."""
    return _Writer(model, plan, ranges, layers).run()


class _Writer:
    def __init__(
        self,
        model: onnx.ModelProto,
        plan: Plan,
        ranges: Mapping[Group, Range],
        layers: Mapping[str, Layer],
    ) -> None:
        self.model, self.ranges, self.layers = model, ranges, layers
        self.group = plan.group_of()
        self.active = {*plan.layers}
        self.outputs = {value.name for value in model.graph.output}
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.added: dict[str, np.ndarray] = {}  # product -> what is added to it
        self.behind: dict[str, str] = {}  # tensor -> its value behind the pair
        graph = model.graph
        self.taken = {v.name for v in (*graph.input, *graph.initializer)}
        self.taken.update(name for node in graph.node for name in (*node.output, *_inner(node)))

    def run(self) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        kept = {t.name: t for t in graph.initializer}
        for value in graph.input:
            if value.name in self.group:
                self._pair(value.name, value.name)
        for node in self.model.graph.node:
            self._add(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in (*node.input, *_inner(node))} | self.outputs
        unread = [name for name in kept if name not in read]
        chosen = [t for name, t in kept.items() if name in read]
        del graph.initializer[:]
        graph.initializer.extend([*chosen, *self.constants.values()])
        _drop_inputs(graph, unread)
        return result

    def _add(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        new.input[:] = [self.behind.get(name, name) for name in node.input]
        if node.name in self.active:
            self._parameters(node, new)
        for name in node.input:
            if name in self.added:
                index = 1 - [*node.input].index(name)
                title = f"{node.input[index]}_{node.name}"
                new.input[index] = self._constant(self.added[name], title)
        self.nodes.append(new)
        for index, name in enumerate(node.output):
            if name in self.group:
                source = name
                if name in self.outputs:
                    new.output[index] = source = self._name(f"{name}_float")
                self._pair(name, source)

    def _pair(self, name: str, source: str) -> None:
        group = self.group[name]
        found, owner = self.ranges[group], group.tensors[0]
        parameters = [
            self._constant(np.asarray(found.scale, np.float32), f"{owner}_scale"),
            self._constant(np.asarray(found.zero, np.uint8), f"{owner}_zero_point"),
        ]
        target = self._name(f"{name}_dequantized") if source == name else name
        codes = self._name(f"{name}_quantized")
        self._node("QuantizeLinear", name, [source, *parameters], codes)
        self._node("DequantizeLinear", name, [codes, *parameters], target)
        self.behind[name] = target

    def _parameters(self, node: NodeProto, new: NodeProto) -> None:
        layer, name = self.layers[node.name], node.input[1]
        codes, scale = layer.weights.codes, layer.weights.scale
        new.input[1] = self._parameter(name, codes, scale, layer.weights.axis)
        if layer.bias is None:
            return
        if node.op_type == "MatMul":
            self.added[node.output[0]] = layer.bias
            return
        with np.errstate(over="ignore"):
            accumulator = np.float32(self.ranges[self.group[node.input[0]]].scale) * scale
            bias = np.rint(layer.bias.astype(np.float64) / accumulator)
        title = operand(node, 2) or f"{node.name}_bias"
        while len(new.input) < 3:
            new.input.append("")
        if self._name(f"{title}_quantized") in self.constants:  # of another layer, in its scale
            title = f"{node.name}_{title}"
        if np.abs(bias).max(initial=0) <= _MOST_BIAS and accumulator.min(initial=1) > 0:
            new.input[2] = self._parameter(title, bias.astype(np.int32), accumulator, 0)
        else:  # of weights near zero: no 32-bit code reaches the bias
            new.input[2] = self._constant(layer.bias, f"{title}_float")

    def _parameter(self, name: str, codes: np.ndarray, scale: np.ndarray, axis: int) -> str:
        target = self._name(f"{name}_dequantized")
        if self._name(f"{name}_quantized") not in self.constants:
            inputs = [
                self._constant(codes, f"{name}_quantized"),
                self._constant(scale, f"{name}_scale"),
                self._constant(np.zeros(scale.shape, codes.dtype), f"{name}_zero_point"),
            ]
            self._node("DequantizeLinear", name, inputs, target, axis=axis)
        return target

    def _name(self, hint: str) -> str:
        """The same name for the same hint; another one where the model has it."""
        while hint in self.taken:
            hint += "_"
        return hint

    def _constant(self, value: np.ndarray, hint: str) -> str:
        name = self._name(hint)
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def _node(self, op: str, name: str, inputs: list[str], output: str, **attributes: int) -> None:
        title = f"{name}_{op}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=title, **attributes))


def _inner(node: NodeProto) -> list[str]:
    """Names that the subgraphs of a node read."""
    graphs = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    nodes = [inner for graph in graphs for inner in graph.node]
    names = [name for inner in nodes for name in (*inner.input, *_inner(inner))]
    return names + [output.name for graph in graphs for output in graph.output]


def _drop_inputs(graph: onnx.GraphProto, names: list[str]) -> None:
    """Takes initializers that are gone out of the inputs, where old files list them."""
    for value in [v for v in graph.input if v.name in names]:
        graph.input.remove(value)
