"""Patterns over the nodes of a graph and of the subgraphs of one node, with named parts.

A pattern is

- a string: any value; the same string stands for the same value everywhere
- `Const(values)`: a constant of these elements, whatever its shape
- a tuple ``(op, *inputs, {attribute: value})``: a node of this standard operator, its inputs in
  order; an input "" must be left out, `ANY` may be anything or left out; attributes that are not
  given have their defaults. If, the pattern of its condition first, takes those of its two results
- a list: the first of several patterns that fits
- a function of the `Matcher` and the value's name

Identity, CastLike and casts between integers are looked through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from .editor import STANDARD, Editor, attribute, is_op

ANY = None
_COMMUTES = ("Add", "Mul", "Equal")
_DEFAULTS: dict[str, Any] = {  # what a node must have where the pattern says nothing
    "axis": 0,
    "axes": None,
    "keepdims": 1,
    "exclusive": 0,
    "reverse": 0,
    "start": 0,
    "end": None,
}
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)


@dataclass(frozen=True)
class Const:
    values: Sequence[float]


class Matcher:
    """Looks for patterns in the main graph and, if given, in what is nested in `owner`.

    `usable` is False where two subgraphs use a name twice: names would not tell values apart.
    """

    def __init__(self, editor: Editor, owner: NodeProto | None = None) -> None:
        self.editor = editor
        self.usable = True
        self._nodes: dict[str, NodeProto] = {}
        self._constants: dict[str, np.ndarray] = {}
        if owner is not None:
            self._enter(owner)

    def _enter(self, owner: NodeProto) -> None:
        for a in owner.attribute:
            if a.type != AttributeProto.GRAPH:
                continue
            for tensor in a.g.initializer:
                self._once(tensor.name)
                self._constants[tensor.name] = numpy_helper.to_array(tensor)
            for node in a.g.node:
                for name in node.output:
                    self._once(name)
                    self._nodes[name] = node
                if is_op(node, "Constant") and node.attribute[0].type == AttributeProto.TENSOR:
                    value = numpy_helper.to_array(node.attribute[0].t)
                    self._constants[node.output[0]] = value
                self._enter(node)

    def _once(self, name: str) -> None:
        self.usable = self.usable and name not in self._nodes and name not in self._constants

    def node(self, name: str) -> NodeProto | None:
        """The node that makes a value, in whatever graph."""
        return self._nodes.get(name) or self.editor.producer(name)

    def constant(self, name: str) -> np.ndarray | None:
        value = self._constants.get(name)
        return self.editor.constant(name) if value is None else value

    def source(self, name: str) -> str:
        """The value behind Identity, CastLike and casts between integers."""
        while True:
            node = self.node(name)
            if node is None or not is_op(node, "Identity", "CastLike", "Cast"):
                return name
            if node.op_type == "Cast":
                kinds = attribute(node, "to"), self.editor.dtype(node.input[0])
                if kinds[0] not in _INTEGERS or kinds[1] not in (*_INTEGERS, 0):
                    return name
            name = node.input[0]

    def match(self, pattern: Any, name: str, found: dict[str, str] | None = None) -> Any:
        """The values of the pattern's strings if it fits a value, else None.

        `found` gives those that are known already.
        """
        return self._match(pattern, name, dict(found or {}))

    def _match(self, pattern: Any, name: str, found: dict[str, str]) -> dict[str, str] | None:
        if pattern is ANY:
            return found
        if isinstance(pattern, list):
            tries = (self._match(p, name, dict(found)) for p in pattern)
            return next((t for t in tries if t is not None), None)
        if pattern == "":
            return found if not name else None
        if not name:
            return None
        name = self.source(name)
        if isinstance(pattern, str):
            known = found.setdefault(pattern, name)
            return found if known == name or self._equal(known, name) else None
        if isinstance(pattern, Const):
            value = self.constant(name)
            fits = value is not None and value.reshape(-1).tolist() == list(pattern.values)
            return found if fits else None
        if isinstance(pattern, tuple):
            return self._match_node(pattern, name, found)
        return found if pattern(self, name) else None

    def _equal(self, first: str, second: str) -> bool:
        a, b = self.constant(first), self.constant(second)
        return a is not None and b is not None and a.size == b.size == 1 and a.item() == b.item()

    def _match_node(
        self, pattern: tuple[Any, ...], name: str, found: dict[str, str]
    ) -> dict[str, str] | None:
        op, *inputs = pattern
        node = self.node(name)
        if node is None or node.op_type != op or node.domain not in STANDARD:
            return None
        wanted = {**_DEFAULTS, **(inputs.pop() if inputs and isinstance(inputs[-1], dict) else {})}
        if any(attribute(node, k, _DEFAULTS.get(k)) != v for k, v in wanted.items()):
            return None
        given: list[tuple[Any, str]]
        if op == "If":
            condition, *results = inputs
            branches = [attribute(node, f"{b}_branch").output[0].name for b in ("then", "else")]
            given = [(condition, node.input[0]), *zip(results, branches, strict=True)]
        else:
            names = [*node.input, *[""] * (len(inputs) - len(node.input))]
            if len(names) > len(inputs):
                return None
            given = list(zip(inputs, names, strict=True))
        orders = [given]
        if op in _COMMUTES:
            (p, a), (q, b) = given
            orders.append([(p, b), (q, a)])
        for order in orders:
            state: dict[str, str] | None = dict(found)
            for part, value in order:
                state = None if state is None else self._match(part, value, state)
            if state is not None:
                return state
        return None


Predicate = Callable[[Matcher, str], bool]


def zeros(matcher: Matcher, name: str) -> bool:
    """Whether a value is a constant of zeros."""
    value = matcher.constant(name)
    if value is None:
        return matcher.match(("Expand", Const([0]), ANY), name) is not None
    return not np.any(value)


def body(loop: NodeProto) -> onnx.GraphProto:
    """The graph that a Loop repeats."""
    graph: onnx.GraphProto = attribute(loop, "body")
    return graph
