"""Which nodes run in integers, which tensors get a Quantize/DequantizeLinear pair, which share one.

A *layer* (Conv, ConvTranspose, Gemm, MatMul with constant weights) wants 8-bit inputs. Operators
between layers are kept in integers too: moves (Reshape, MaxPool ..) hand codes on, sums (Add,
Concat, AveragePool ..) and functions of one tensor (HardSwish ..) read and write codes. What only
float operators read stays float: quantizing it would cost accuracy and save nothing.

Net-aware (Park et al. 2018, section 3.2.2 (e)): a range is what the *readers* of a tensor can tell
apart. A layer in front of a Relu or a Clip has no pair at all: the kernel goes on from the
accumulator, so that the negative half needs no codes. What is only read by a MaxPool has the range
behind it; what is only read by a Concat has the Concat's scale, so that joining copies codes;
HardSwish needs nothing below -3.

Residual sums: both operands get pairs, with which ONNX Runtime too computes in integers, and bit by
bit the same. `fuse_sums` leaves out the pair of the operand that a layer makes, and with it one of
three roundings: 0.1 to 1.2 dB at the outputs of the reference models. Other runtimes then run that
layer in float, and in deep networks the last bits of floats grow to whole codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from dccompile.frontend.editor import STANDARD, Editor, attribute, is_op, operand

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "GlobalMaxPool", "Identity", "MaxPool", "Pad",
    "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
)  # fmt: skip
_SUMS = ("AveragePool", "Concat", "GlobalAveragePool", "ReduceMean")
_CLAMPS = ("Clip", "Relu")
_FUNCTIONS = (
    *_CLAMPS, "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
    "Sigmoid", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
_BINARY = ("Add", "Div", "Mul", "Sub")
OPEN = (-np.inf, np.inf)
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """Tensors with one scale; its range is that of the `observed` ones, clamped to `bounds`."""

    tensors: tuple[str, ...]
    observed: tuple[str, ...]
    bounds: Bounds = OPEN


@dataclass(frozen=True)
class Plan:
    """What runs in integers.

    layers: names of these nodes · groups: of tensors that get pairs · through: tensors between two
    nodes that are computed at once, which need none.
    """

    layers: tuple[str, ...]
    groups: tuple[Group, ...]
    through: tuple[str, ...]

    def group_of(self) -> dict[str, Group]:
        """The group of every quantized tensor."""
        return {name: group for group in self.groups for name in group.tensors}


def layers(model: onnx.ModelProto) -> list[str]:
    """The names of all layers, in the order of the graph."""
    editor = Editor(model)
    return [node.name for node in editor.nodes if is_layer(editor, node)]


def is_layer(editor: Editor, node: NodeProto) -> bool:
    """Whether the node multiplies a float tensor by constant float weights of the usual form."""
    if not is_op(node, *LAYERS) or editor.dtype(node.input[0]) != TensorProto.FLOAT:
        return False
    shape = editor.shape(node.input[1])
    if editor.constant(node.input[0]) is not None or shape is None or 0 in shape:
        return False
    constant = editor.constant(node.input[1])
    if constant is None or constant.dtype != np.float32:
        return False
    return len(shape) == 2 if node.op_type in ("Gemm", "MatMul") else len(shape) >= 3


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a node's name, or a glob that fits it."""
    return pattern == name or fnmatchcase(name, pattern)


def place(
    model: onnx.ModelProto,
    exclude: Collection[str] = (),
    net_aware: bool = True,
    fuse_sums: bool = False,
) -> Plan:
    """Plans the pairs of a prepared float model. `exclude`: names or patterns of nodes."""
    return _Placement(Editor(model), exclude, net_aware, fuse_sums).run()


@dataclass
class _Placement:
    editor: Editor
    exclude: Collection[str]
    net_aware: bool
    fuse_sums: bool
    root: dict[str, str] = field(default_factory=dict)  # what a tensor is a function of
    integer: set[str] = field(default_factory=set)  # tensors that integers could hold
    wanted: set[str] = field(default_factory=set)  # tensors that get a pair
    through: set[str] = field(default_factory=set)  # accumulators, and sums, before a clamp
    inside: list[NodeProto] = field(default_factory=list)

    def run(self) -> Plan:
        self.kinds = {node.name: self._kind(node) for node in self.editor.nodes}
        self._find_functions()
        for node in self.editor.nodes:
            self._forward(node)
        for node in reversed(self.editor.nodes):
            self._backward(node)
        found = [n for n in self.editor.nodes if is_layer(self.editor, n)]
        active = tuple(n.name for n in found if self.kinds[n.name] == "layer")
        return Plan(active, tuple(self._groups()), tuple(sorted(self.through - self.wanted)))

    # ---- what a node is ----
    def _kind(self, node: NodeProto) -> str:
        """layer, move, sum, function or "" for what computes in float."""
        editor = self.editor
        if node.domain not in STANDARD or self._excluded(node):
            return ""
        if any(editor.dtype(name) != TensorProto.FLOAT for name in node.output[:1]):
            return ""
        op = node.op_type
        if op in LAYERS:
            return "layer" if is_layer(editor, node) else ""
        if op in _MOVES:
            return "move" if _moves(editor, node) else "sum" if op == "Resize" else ""
        if op in _SUMS:
            return "sum"
        if op in _FUNCTIONS:
            return "function"
        if op in _BINARY:
            return "function" if len(self._data(node)) == 1 else "sum"
        return ""

    def _excluded(self, node: NodeProto) -> bool:
        return any(matches(node.name, pattern) for pattern in self.exclude)

    def _data(self, node: NodeProto) -> list[str]:
        """The float tensors, not constants, that a node computes with."""
        names = node.input if is_op(node, "Concat", *_BINARY) else node.input[:1]
        return [name for name in names if self.editor.constant(name) is None]

    # ---- forward: what could be integers ----
    def _find_functions(self) -> None:
        """Sums whose operands are functions of one tensor are one of it too: x * sigmoid(x)."""
        root: dict[str, str] = {}
        for node in self.editor.nodes:
            binary = self.kinds[node.name] == "sum" and is_op(node, *_BINARY)
            if binary or self.kinds[node.name] == "function":
                roots = {root.get(name, name) for name in self._data(node)}
                if len(roots) == 1:
                    self.kinds[node.name] = "function"
                    root[node.output[0]] = roots.pop()

    def _forward(self, node: NodeProto) -> None:
        data = self._data(node)
        if self.kinds[node.name] == "function":
            roots = {self.root.get(name, name) for name in data}
            if len(roots) > 1:  # others read what is between
                self.kinds[node.name] = "sum"
            elif self._internal(node.output[0]):
                self.root[node.output[0]] = roots.pop()
        kind = self.kinds[node.name]
        able = kind == "layer" or (
            kind == "move" and all(self._is_input(n) or n in self.integer for n in data)
        )
        if kind in ("sum", "function"):
            able = bool(data) and all(name in self.integer for name in data)
        if able:
            self.integer.update(node.output)

    def _is_input(self, name: str) -> bool:
        return self.editor.producer(name) is None

    def _internal(self, name: str) -> bool:
        """Whether only functions read the tensor: no pair is needed at it."""
        readers = self.editor.users(name)
        only = all(self.kinds[r.name] == "function" for r in readers)
        return self.net_aware and bool(readers) and only and not self.editor.is_output(name)

    # ---- backward: what is to be integers ----
    def _backward(self, node: NodeProto) -> None:
        kind = self.kinds[node.name]
        if kind == "layer":
            self.wanted.add(node.input[0])
            return
        needed = any(name in self.wanted or name in self.through for name in node.output)
        if not kind or not needed or node.output[0] not in self.integer:
            return
        data = self._data(node)
        if kind == "function":
            self._function(node)
            return
        self.inside.append(node)
        kept = self._accumulator(node) if self.fuse_sums and is_op(node, "Add") else ""
        self.wanted.update(name for name in data if name != kept)
        if kept:
            self.through.add(kept)

    def _function(self, node: NodeProto) -> None:
        """A function whose result gets a pair: its argument does too, or is an accumulator."""
        result = node.output[0]
        if result in self.through and result not in self.wanted:
            self.through.update(self._data(node))
            return
        if not self.net_aware:
            self.wanted.update(self._data(node))
            return
        steps = [*self._steps(node)]
        argument = self._argument(node)
        readers = {r.name for r in self.editor.users(argument)} - {s.name for s in steps}
        maker = self.editor.producer(argument)
        clamps = all(is_op(s, *_CLAMPS) for s in steps)
        biased = maker is not None and is_op(maker, "MatMul", "Gemm") and is_op(steps[-1], "Add")
        bias = biased and all(is_op(s, *_CLAMPS) for s in steps[:-1])
        alone = not readers and not self.editor.is_output(argument)
        if (clamps or bias) and alone and argument not in self.wanted:
            self.through.add(argument)
        else:
            self.wanted.add(argument)

    def _argument(self, node: NodeProto) -> str:
        """The tensor that the function which ends in this node is a function of."""
        name = self._data(node)[0]
        return self.root.get(name, name)

    def _steps(self, node: NodeProto) -> Iterator[NodeProto]:
        """The nodes of the function that ends in this one, the last first."""
        stop, seen, todo = self._argument(node), set(), [node]
        while todo:
            step = todo.pop(0)
            if step.name in seen:
                continue
            seen.add(step.name)
            yield step
            makers = (self.editor.producer(n) for n in self._data(step) if n != stop)
            todo += [maker for maker in makers if maker is not None]

    def _accumulator(self, node: NodeProto) -> str:
        """The operand of a sum that a layer makes for it alone, of two the later; or ""."""
        order = {n.name: i for i, n in enumerate(self.editor.nodes)}
        found = []
        for name in self._data(node):
            maker = self.editor.producer(name)
            if maker is None or self.editor.only_user(name) is None or name in self.wanted:
                continue
            if self.kinds[maker.name] == "layer":
                found.append((order[maker.name], name))
        return max(found)[1] if found else ""

    # ---- groups ----
    def _groups(self) -> Iterator[Group]:
        parent = {name: name for name in self.wanted}

        def find(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        ties: dict[str, set[str]] = {}  # node -> its outputs that share the scale of an input
        for node in reversed(self.inside):
            for source in self._shared(node):
                for name in node.output:
                    if name in self.wanted:
                        parent[find(name)] = find(source)
                        ties.setdefault(node.name, set()).add(source)
        members: dict[str, list[str]] = {}
        for name in self._in_order():
            members.setdefault(find(name), []).append(name)
        for names in members.values():
            seen = names
            if self.net_aware:
                seen = [n for n in names if self._read_outside(n, ties)] or names
            yield Group(tuple(names), tuple(seen), self._bounds(seen))

    def _in_order(self) -> Iterator[str]:
        names = [v for node in self.editor.nodes for v in (*node.input, *node.output)]
        yield from (name for name in dict.fromkeys(names) if name in self.wanted)

    def _shared(self, node: NodeProto) -> list[str]:
        """The inputs of a node inside that have its output's scale."""
        if self.kinds[node.name] == "move":
            return [node.input[0]]
        if is_op(node, "Concat") and self.net_aware:
            editor = self.editor
            return [n for n in self._data(node) if editor.only_user(n) is not None]
        return []

    def _read_outside(self, name: str, ties: dict[str, set[str]]) -> bool:
        readers = self.editor.users(name)
        inner = all(name in ties.get(reader.name, ()) for reader in readers)
        return not inner or self.editor.is_output(name)

    def _bounds(self, names: list[str]) -> Bounds:
        if not self.net_aware:
            return OPEN
        found = [reader_bounds(self.editor, name) for name in names]
        return min(low for low, _ in found), max(high for _, high in found)


def reader_bounds(editor: Editor, name: str) -> Bounds:
    """Between which values the readers of a tensor tell them apart; beyond, all are one."""
    readers = editor.users(name)
    if not readers or editor.is_output(name):
        return OPEN
    found = [_bounds_of(editor, reader) for reader in readers]
    return min(low for low, _ in found), max(high for _, high in found)


def _bounds_of(editor: Editor, reader: NodeProto) -> Bounds:
    if is_op(reader, "Relu"):
        return 0.0, np.inf
    if is_op(reader, "HardSwish"):
        return -3.0, np.inf
    if is_op(reader, "HardSigmoid"):
        alpha, beta = attribute(reader, "alpha", 0.2), attribute(reader, "beta", 0.5)
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else OPEN
    if is_op(reader, "Clip"):
        ends = [editor.scalar(operand(reader, i)) for i in (1, 2)]
        low, high = (d if e is None else float(e) for e, d in zip(ends, OPEN, strict=True))
        return low, high
    return OPEN


def _moves(editor: Editor, node: NodeProto) -> bool:
    """Whether every output value is an input value, or 0."""
    if is_op(node, "Resize"):
        return attribute(node, "mode", b"nearest") == b"nearest"
    if is_op(node, "Pad"):
        value = editor.scalar(operand(node, 2)) if operand(node, 2) else 0
        return value == 0
    if is_op(node, "MaxPool"):
        return len(node.output) == 1
    return editor.constant(node.input[0]) is None
