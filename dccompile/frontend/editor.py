"""An editable view of an ONNX graph: who makes and who uses a value, constants, types.

Plain protobuf inside. The passes of the front end replace nodes here; `finish` writes a new model
that holds only what is still needed. The model given is never changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

Shape = tuple["int | str | None", ...]

STANDARD = ("", "ai.onnx")


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of an attribute: a python number, list, bytes or proto, or the default."""
    for a in node.attribute:
        if a.name == name:
            return helper.get_attribute_value(a)
    return default


def is_op(node: NodeProto | None, *ops: str) -> bool:
    """Whether the node is one of these standard operators."""
    return node is not None and node.op_type in ops and node.domain in STANDARD


def operand(node: NodeProto, index: int) -> str:
    """Name of an input, "" where an optional one is left out."""
    return node.input[index] if index < len(node.input) else ""


def _subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    for a in node.attribute:
        if a.type == AttributeProto.GRAPH:
            yield a.g
        elif a.type == AttributeProto.GRAPHS:
            yield from a.graphs


def _captured(node: NodeProto) -> Iterator[str]:
    """Every name that the subgraphs of a node read, their own values included."""
    for graph in _subgraphs(node):
        yield from (output.name for output in graph.output)
        for inner in graph.node:
            yield from inner.input
            yield from _captured(inner)


class Editor:
    """The top-level graph of a model, open for changes."""

    def __init__(
        self, model: onnx.ModelProto, constants: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """`constants` gives the data of initializers; of others the model's own are decoded."""
        self._model = model
        self._given = constants or {}
        graph = model.graph
        self.outputs = [value.name for value in graph.output]
        self._constants: dict[str, np.ndarray | TensorProto] = {
            t.name: t for t in graph.initializer
        }
        self._types: dict[str, tuple[int, Shape | None]] = {}
        for value in (*graph.value_info, *graph.input, *graph.output):
            if value.type.HasField("tensor_type"):
                self._types[value.name] = _tensor_type(value.type.tensor_type)
        dims = (d for i in graph.input for d in self._types.get(i.name, (0, None))[1] or ())
        self.symbols = {dim for dim in dims if isinstance(dim, str)}  # of the model's inputs
        self._names = {*self._types, *self._constants, *(i.name for i in graph.input)}
        self._names.update(name for node in graph.node for name in node.output)
        self.nodes: list[NodeProto] = []
        self.origin: dict[str, tuple[str, ...]] = {}  # node -> the model's nodes it stands for
        for index, node in enumerate(graph.node):
            copy = NodeProto()
            copy.CopyFrom(node)
            if not copy.name or copy.name in self.origin:
                copy.name = self.fresh(f"{node.name or node.op_type}_{index}")
            self.origin[copy.name] = (copy.name,)
            self.nodes.append(copy)
        self.original = [(node.name, node.op_type, list(node.output)) for node in self.nodes]
        self.reindex()

    def opset(self, domain: str = "") -> int:
        names = STANDARD if domain == "" else (domain,)
        return max((o.version for o in self._model.opset_import if o.domain in names), default=0)

    def reindex(self) -> None:
        """Finds producers and readers again after changes to the inputs of nodes."""
        self._producers = {name: node for node in self.nodes for name in node.output if name}
        self._users: dict[str, list[NodeProto]] = {}
        self._extra_uses = Counter(self.outputs)
        for node in self.nodes:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
            self._extra_uses.update(_captured(node))

    def producer(self, name: str, *ops: str) -> NodeProto | None:
        """The node that makes a value, if it is one of these standard operators (any if none)."""
        node = self._producers.get(name)
        return node if node is not None and (not ops or is_op(node, *ops)) else None

    def producer_of(self, name: str, domain: str, op: str) -> NodeProto | None:
        """The node that makes a value, if it is this operator of a domain of our own."""
        node = self._producers.get(name)
        mine = node is not None and node.domain == domain and node.op_type == op
        return node if mine else None

    def users(self, name: str) -> list[NodeProto]:
        """The nodes that read a value."""
        return self._users.get(name, [])

    def only_user(self, name: str) -> NodeProto | None:
        """The one node that reads a value; None if several do, or it is a graph output."""
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and not self._extra_uses[name] else None

    def is_output(self, name: str) -> bool:
        return self._extra_uses[name] > 0

    def captured(self, node: NodeProto) -> Iterator[str]:
        """Every name that the subgraphs of a node read, their own values included."""
        return _captured(node)

    def constant(self, name: str) -> np.ndarray | None:
        value = self._constants.get(name)
        if isinstance(value, TensorProto):
            given = self._given.get(name)
            value = self._constants[name] = numpy_helper.to_array(value) if given is None else given
        return value

    def scalar(self, name: str) -> Any:
        """The constant of one element as a numpy scalar, or None."""
        value = self.constant(name)
        return value.reshape(-1)[0] if value is not None and value.size == 1 else None

    def dtype(self, name: str) -> int:
        """TensorProto data type of a value; UNDEFINED where it is not known."""
        value = self._constants.get(name)
        if isinstance(value, TensorProto):
            return value.data_type
        if value is not None:
            return helper.np_dtype_to_tensor_dtype(value.dtype)
        return self._types.get(name, (TensorProto.UNDEFINED, None))[0]

    def shape(self, name: str) -> Shape | None:
        """Dims of a value: int, symbol or None each; None where the rank is not known."""
        value = self._constants.get(name)
        if value is not None:
            return tuple(value.dims if isinstance(value, TensorProto) else value.shape)
        return self._types.get(name, (0, None))[1]

    def is_scalar(self, name: str) -> bool:
        """Whether the value is known to have one element."""
        shape = self.shape(name)
        return shape is not None and all(dim == 1 for dim in shape)

    def fresh(self, hint: str) -> str:
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def add_constant(self, value: np.ndarray, hint: str) -> str:
        name = self.fresh(hint)
        self._constants[name] = value
        return name

    def set_constant(self, name: str, value: np.ndarray) -> None:
        """Gives a value that a node made so far; the caller removes the node."""
        self._constants[name] = value

    def node(
        self, op: str, inputs: list[str], source: NodeProto, output: str = "", **attributes: Any
    ) -> NodeProto:
        """A new node that stands for `source`; `output` names its value (fresh if empty)."""
        domain = attributes.pop("domain", "")
        name = self.fresh(f"{source.name}_{op}")
        output = output or self.fresh(f"{name}_out")
        self.origin[name] = self.origin[source.name]
        return helper.make_node(op, inputs, [output], name=name, domain=domain, **attributes)

    def set_type(self, name: str, dtype: int, shape: Shape | None) -> None:
        self._types[name] = (dtype, shape)

    def rewrite(self, changes: dict[str, list[NodeProto]]) -> None:
        """Puts new nodes in the place of the named ones, then drops what nothing reads."""
        nodes = [new for node in self.nodes for new in changes.get(node.name, [node])]
        wanted = set(self.outputs)
        kept = []
        for node in reversed(nodes):
            if wanted.isdisjoint(node.output):
                continue
            wanted.update(node.input)
            wanted.update(_captured(node))
            kept.append(node)
        self.nodes = kept[::-1]
        self.reindex()

    def rename_uses(self, old: str, new: str) -> bool:
        """Lets every reader of `old` read `new`; False where a subgraph or the caller reads it."""
        if self.is_output(old):
            return False
        for node in self._users.get(old, []):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        self._users.setdefault(new, []).extend(self._users.pop(old, []))
        return True

    def finish(self) -> onnx.ModelProto:
        """The changed model; initializers and types of vanished values are left out."""
        source = self._model
        made = {name for node in self.nodes for name in node.output}
        used = {n for node in self.nodes for n in (*node.input, *_captured(node))} | {*self.outputs}
        model = onnx.ModelProto(ir_version=source.ir_version, producer_name=source.producer_name)
        domains = {o.domain: o.version for o in source.opset_import}
        for domain in {node.domain for node in self.nodes} - set(domains):
            domains[domain] = 1
        model.opset_import.extend(helper.make_opsetid(d, v) for d, v in sorted(domains.items()))
        graph = model.graph
        graph.name = source.graph.name
        graph.input.extend(i for i in source.graph.input if i.name not in self._constants)
        graph.output.extend(source.graph.output)
        graph.node.extend(self.nodes)
        for name, value in self._constants.items():
            if name in used and name not in made:
                if name in self._given:
                    value = self._given[name]
                if not isinstance(value, TensorProto):
                    value = numpy_helper.from_array(np.asarray(value), name)
                graph.initializer.append(value)
        for name in sorted(made - set(self.outputs)):
            if name in self._types:
                dtype, shape = self._types[name]
                graph.value_info.append(helper.make_tensor_value_info(name, dtype, shape))
        return model


def _tensor_type(tensor: onnx.TypeProto.Tensor) -> tuple[int, Shape | None]:
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        known = dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        dims.append(known)
    return tensor.elem_type, tuple(dims)


def static_size(shape: Shape | None) -> int | None:
    """Number of elements, or None where some dim is open."""
    if shape is None:
        return None
    dims = [dim for dim in shape if isinstance(dim, int)]
    return prod(dims) if len(dims) == len(shape) else None
