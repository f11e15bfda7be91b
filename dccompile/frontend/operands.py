"""A node together with what is known of its operands: types, dims, constant values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto

from .external import as_array
from .infer import type_of, types_of
from .structure import opsets, subgraphs

MAX_NUMBERS = 1 << 16  # of a constant that is looked at number by number


@dataclass
class Node:
    """A node with what is known of its operands."""

    node: NodeProto
    opset: int
    types: Mapping[str, onnx.TypeProto]
    constants: Mapping[str, np.ndarray]

    def attribute(self, name: str, default=None):
        for attribute in self.node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default

    def has(self, index: int) -> bool:
        return index < len(self.node.input) and bool(self.node.input[index])

    def constant(self, index: int) -> np.ndarray | None:
        return self.constants.get(self.node.input[index]) if self.has(index) else None

    def integers(self, index: int) -> list[int] | None:
        """The numbers of a constant input, where it holds integers."""
        array = self.constant(index)
        if array is None or array.dtype.kind not in "iu" or array.size > MAX_NUMBERS:
            return None
        return array.reshape(-1).tolist()

    def dims(self, index: int) -> list[int | None] | None:
        """Dims of an input, None where open; None where the rank is unknown."""
        kind = self.types.get(self.node.input[index]) if self.has(index) else None
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        dims = kind.tensor_type.shape.dim
        fixed = (d.WhichOneof("value") == "dim_value" and d.dim_value >= 0 for d in dims)
        return [d.dim_value if f else None for d, f in zip(dims, fixed, strict=True)]

    def elem_type(self, index: int) -> int:
        kind = self.types.get(self.node.input[index]) if self.has(index) else None
        return kind.tensor_type.elem_type if kind else 0


def operands(model: onnx.ModelProto, constants: Mapping[str, np.ndarray]) -> Iterator[Node]:
    """Every node of the graph and its subgraphs; types are known in the main graph."""
    opset = opsets(model.opset_import)[""]
    yield from _operands(model.graph, opset, types_of(model.graph), constants)


def _operands(
    graph: onnx.GraphProto,
    opset: int,
    types: Mapping[str, onnx.TypeProto],
    constants: Mapping[str, np.ndarray],
) -> Iterator[Node]:
    for node in graph.node:
        yield Node(node, opset, types, constants)
        for _, inner in subgraphs(node):
            own = {value.name for value in inner.input}.union(*(n.output for n in inner.node))
            known = {name: kind for name, kind in types.items() if name not in own}
            known.update((t.name, type_of(t)) for t in inner.initializer)
            held = {name: constants[name] for name in _names(inner) if name in constants}
            held.update((t.name, as_array(t)) for t in inner.initializer)
            held = {name: array for name, array in held.items() if name not in own}
            yield from _operands(inner, opset, known, held)


def _names(graph: onnx.GraphProto) -> set[str]:
    """Names that the nodes of a graph and its subgraphs read."""
    names = {name for node in graph.node for name in node.input}
    return names.union(*(_names(g) for node in graph.node for _, g in subgraphs(node)))
