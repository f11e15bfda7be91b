"""Counts where a quantized model computes in float.

A float island is a largest set of operators that pass float tensors to each other: what stands
between the 8-bit tensors that go in and those that come out. A kernel that multiplies 8-bit
tensors and writes float ones belongs to the island of its output. Not an island is what the
compiler fuses into one function that reads and writes bytes: elementwise operators between
DequantizeLinear and a single QuantizeLinear, as the sum of two 8-bit tensors. Its floats are in
registers only.

A precision switch is a tensor that exists both in 8 bits and in float, in memory or as what a
kernel read and wrote: each quantization, each dequantization for an island, each kernel from 8
bits to float.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx
from onnx import NodeProto, TensorProto

from .editor import attribute, is_op
from .quantized import INT8
from .recover import Recovered
from .spread import FUSED

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Islands:
    """nodes: of every island, the names of the model's nodes."""

    count: int = 0
    switches: int = 0
    nodes: list[list[str]] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {"count": self.count, "switches": self.switches, "nodes": self.nodes}


def islands(recovered: Recovered) -> Islands:
    """Of a rewritten model; nothing where it has no 8-bit tensors."""
    graph = _Graph(recovered.model.graph)
    if not any(kind in INT8 for kind in graph.kinds.values()):
        return Islands()
    switches = sum(graph.crosses(node) for node in graph.nodes)
    found = []
    for island in graph.islands():
        into = {name for node in island for name in graph.dequantized(node)}
        if graph.in_registers(island, into):
            switches -= 1  # its one quantization
        else:
            switches += len(into)
            found.append(_names(recovered, island))
    return Islands(len(found), switches, found)


def _names(recovered: Recovered, island: Iterable[NodeProto]) -> list[str]:
    """Of the model's nodes; of those that one kernel computes, the multiplication."""
    names = []
    for node in island:
        site = attribute(node, "site", b"").decode()
        names.append(site or recovered.origin.get(node.name, (node.name,))[0])
    return list(dict.fromkeys(names))


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        values = (*graph.input, *graph.value_info, *graph.output)
        constants = {t.name for t in graph.initializer}
        self.kinds = {
            v.name: v.type.tensor_type.elem_type for v in values if v.name not in constants
        }
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {v.name for v in graph.output}

    def _floats(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.kinds.get(name) in _FLOATS]

    def _bytes(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.kinds.get(name) in INT8]

    def crosses(self, node: NodeProto) -> bool:
        """Whether a node other than a DequantizeLinear is itself a precision switch."""
        if is_op(node, "DequantizeLinear"):
            return False
        if is_op(node, "QuantizeLinear"):  # of what was integers just now, it is no step in between
            return not is_op(self._maker(node.input[0]), "DequantizeLinear")
        if is_op(node, "DynamicQuantizeLinear"):
            return True
        return bool(self._bytes(node.input[:1]) and self._floats(node.output))

    def dequantized(self, node: NodeProto) -> list[str]:
        """The values that a member of an island reads through a DequantizeLinear."""
        if is_op(node, "DequantizeLinear"):
            return [node.output[0]]
        return [n for n in self._floats(node.input) if is_op(self._maker(n), "DequantizeLinear")]

    def _maker(self, name: str) -> NodeProto | None:
        return self.makers.get(name)

    def islands(self) -> list[list[NodeProto]]:
        """Connected members, in the order of the graph."""
        group: dict[str, int] = {}
        islands: dict[int, list[NodeProto]] = {}
        for index, node in enumerate(self.nodes):
            if not self._member(node):
                continue
            near = {
                group[maker.name]
                for name in self._floats(node.input)
                if (maker := self._maker(name)) is not None and maker.name in group
            }
            here = min(near, default=index)
            islands.setdefault(here, []).append(node)
            for other in near - {here}:
                islands[here] += islands.pop(other)
            group.update((member.name, here) for member in islands[here])
        order = {node.name: i for i, node in enumerate(self.nodes)}
        return [sorted(island, key=lambda n: order[n.name]) for island in islands.values()]

    def _member(self, node: NodeProto) -> bool:
        if is_op(node, "QuantizeLinear", "DynamicQuantizeLinear"):
            return False
        if is_op(node, "DequantizeLinear"):  # as it is, where no operator reads it
            return node.output[0] in self.outputs and bool(self._floats(node.output))
        return bool(self._floats(node.output) or self._floats(node.input))

    def in_registers(self, island: list[NodeProto], into: set[str]) -> bool:
        """Whether one function reads and writes bytes in place of an island."""
        if not all(is_op(node, *FUSED) for node in island):
            return False
        members = {node.name for node in island}
        for name in {name for node in island for name in self._floats(node.input)}:
            maker = self._maker(name)
            if name in into:
                fused = all(reader.name in members for reader in self.readers[name])
                fused = fused and maker is not None and bool(self._bytes(maker.input[:1]))
            else:
                fused = maker is not None and maker.name in members
            if not fused:
                return False
        ends = {name for node in island for name in node.output}
        last = [r for name in ends for r in self.readers.get(name, []) if r.name not in members]
        return not ends & self.outputs and len(last) == 1 and is_op(last[0], "QuantizeLinear")
