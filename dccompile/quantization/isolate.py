"""One graph that holds a float model, its quantized form, and every step of that alone.

Alone a step computes from the float model's values: its branch begins behind the layers before it
and in front of the pairs of its inputs, which belong to it. Its difference to the float tensor is
what this step costs, and nothing of what came before.

The parts share inputs, constants and every node that computes the same of the same: one run gives
all values to compare, and float parts of the quantized model have no error at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dccompile.errors import ModelError, Problem

from .steps import Quantized, Step

_LARGEST = 2**31 - 2**26  # bytes of one protobuf message, less what nodes and names add


class Joined:
    """`model`, and the names there of tensors of the quantized model and of steps alone.

    Tensors of the float model keep their names; so do the inputs, which are the quantized model's.
    """

    def __init__(self, float_model: ModelProto, quantized: Quantized) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(float_model)
        graph = self.model.graph
        del graph.value_info[:], graph.input[:]
        graph.input.extend(quantized.model.graph.input)
        self._add_domains(quantized.model)
        self._quantized = quantized
        self._prefix = _free_prefix(float_model.graph)
        self._made = {_key(node, [*node.input]): [*node.output] for node in graph.node}
        self._names = {value.name: value.name for value in graph.input}  # quantized -> joined
        self._take_constants(quantized.model.graph)
        for node in quantized.editor.nodes:
            self._add(node, self._names, "quantized")

    def whole(self, name: str) -> str:
        """A tensor of the quantized model as it computes it."""
        return self._names[name]

    def is_constant(self, name: str) -> bool:
        """Whether this is an initializer, which no node computes."""
        return any(tensor.name == name for tensor in self.model.graph.initializer)

    def alone(self, step: Step) -> str:
        """What a step makes of the float model's values."""
        view = self._quantized
        names: dict[str, str] = {}
        needed: set[str] = set()
        todo = [step.start]
        while todo:
            name = todo.pop()
            node = view.editor.producer(name)
            if not name or name in names:
                continue
            if node is None or name in view.constants:
                names[name] = self._names.get(name, name)  # or a subgraph's own value
            elif name in view.pairs and view.pairs[name] != step and view.quantizer(name):
                names[name] = self._pair(name)
            elif view.begins(name) and view.layers[name].name != step.node:
                names[name] = name
            elif node.name not in needed:
                needed.add(node.name)
                todo += [*node.input, *view.editor.captured(node)]
        for node in view.editor.nodes:
            if node.name in needed:
                self._add(node, names, "alone")
        return names[step.start]

    def arrange(self, names: Iterable[str]) -> None:
        """Keeps the nodes that these tensors need, in the order of the names.

        What is made next to each other can be observed together where memory is short.
        """
        graph, captured = self.model.graph, self._quantized.editor.captured
        nodes = [*graph.node]
        makers = {name: index for index, node in enumerate(nodes) for name in node.output}
        order: dict[int, None] = {}
        for name in names:
            todo = [makers[name]] if name in makers else []
            while todo:
                node = nodes[todo[-1]]
                reads = {makers[n] for n in (*node.input, *captured(node)) if n in makers}
                if before := [index for index in reads if index not in order]:
                    todo += before
                else:
                    order[todo.pop()] = None
        kept = [NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
        del graph.node[:]
        graph.node.extend(kept)

    def cast(self, name: str) -> str:
        """A tensor of integers or truth values as floats."""
        node = helper.make_node("Cast", [name], ["float"], "cast", to=TensorProto.FLOAT)
        names = {name: name}
        self._add(node, names, "output")
        return names["float"]

    def _pair(self, real: str) -> str:
        """The tensor of the float model that a dequantized one stands for, quantized as it is."""
        view = self._quantized
        quantize, dequantize = view.quantizer(real), view.editor.producer(real)
        assert quantize is not None and dequantize is not None
        names = {**self._names, quantize.input[0]: view.pairs[real].target}
        self._add(quantize, names, "alone")
        self._add(dequantize, names, "alone")
        return names[real]

    def _add(self, node: NodeProto, names: dict[str, str], part: str) -> None:
        """Adds a node that reads `names` and puts there what it makes; not if there is its like."""
        inputs = [names[name] if name else "" for name in node.input]
        inner = [name for name in self._quantized.editor.captured(node) if name in names]
        key = _key(node, inputs) if all(names[name] == name for name in inner) else b""
        if key in self._made and len(self._made[key]) == len(node.output):
            names.update(zip(node.output, self._made[key], strict=True))
            return
        index = len(self.model.graph.node)
        new = self.model.graph.node.add()
        new.CopyFrom(node)
        title = f"{self._prefix}{part}_{index}_"
        new.name = f"{title}{node.name}"
        new.input[:] = inputs
        new.output[:] = [f"{title}{name}" if name else "" for name in node.output]
        for attribute in new.attribute:
            for graph in [*[attribute.g] * attribute.HasField("g"), *attribute.graphs]:
                _rename(graph, names)
        names.update(zip(node.output, new.output, strict=True))
        if key:
            self._made[key] = list(new.output)

    def _take_constants(self, graph: GraphProto) -> None:
        """Initializers of the quantized model; those that the float model has too only once."""
        ours = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for tensor in graph.initializer:
            name = tensor.name
            if name not in ours or not _equal(ours[name], tensor):
                name = f"{self._prefix}{name}"
                self.model.graph.initializer.add().CopyFrom(tensor)
                self.model.graph.initializer[-1].name = name
            self._names[tensor.name] = name
        size = sum(tensor.ByteSize() for tensor in self.model.graph.initializer)
        if size > _LARGEST:
            found = f"{size >> 20} MiB of weights of both models; {_LARGEST >> 20} are possible"
            fix = "compare the layers without the embedding tables"
            raise ModelError([Problem("DC3205", "model", found, fix)])

    def _add_domains(self, other: ModelProto) -> None:
        known = {entry.domain for entry in self.model.opset_import}
        self.model.opset_import.extend(e for e in other.opset_import if e.domain not in known)


def _free_prefix(graph: GraphProto) -> str:
    """What no name of a tensor begins with."""
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    prefix = "~"
    while any(name.startswith(prefix) for name in names):
        prefix += "~"
    return prefix


def _key(node: NodeProto, inputs: list[str]) -> bytes:
    """What a node computes, of what. Subgraphs compute the same if what they read has its name."""
    attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return repr((node.domain, node.op_type, attributes, [*inputs])).encode()


def _equal(a: TensorProto, b: TensorProto) -> bool:
    if a.data_type != b.data_type or a.dims != b.dims:
        return False
    return np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Lets a subgraph read the values of the graph around it under their new names."""
    own = {name for node in graph.node for name in node.output}
    own.update(value.name for value in graph.input)
    own.update(tensor.name for tensor in graph.initializer)
    outer = {old: new for old, new in names.items() if old not in own}
    for node in graph.node:
        node.input[:] = [outer.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in [*[attribute.g] * attribute.HasField("g"), *attribute.graphs]:
                _rename(inner, outer)
    for value in graph.output:
        value.name = outer.get(value.name, value.name)
