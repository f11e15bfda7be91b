"""Puts the graph around convolutions into channels-last layout, in one pass.

Kernels of convolutions want the channels of a pixel side by side. Every value of rank 3 to 5 may
exist in the model's order, channels first (N, C, ..), and channels last (N, .., C); which one is
made depends on who makes it, the other follows by a Transpose where somebody asks for it. Operators
that do not care compute in the layout their inputs have, so that a network has one Transpose where
images enter and, at most, one where they leave: none if what leaves is 1 x 1 pixels.

A Transpose of the model itself is composed with these: a network exported channels-last has none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from . import code_tables
from .convolutions import DOMAIN, OP
from .editor import Editor, attribute, is_op, operand
from .forms import channel_shuffle, moved_axis, set_attribute
from .layout_windows import GLOBAL, Windows

_UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_ELEMENTWISE = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max",
    "Mean", "Min", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")


def channels_last(editor: Editor) -> None:
    """Rewrites the graph if it has convolutions that a kernel runs."""
    if any(node.domain == DOMAIN and node.op_type == OP for node in editor.nodes):
        _Pass(editor).run()


class _Pass(Windows):
    def __init__(self, editor: Editor) -> None:
        super().__init__(editor)
        self.changes: dict[str, list[NodeProto]] = {}
        self.done: set[str] = set()  # nodes that were rewritten together with one before

    def run(self) -> None:
        rules: dict[str, Callable[[NodeProto], bool]] = {
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_REDUCTIONS, self.reduce),
            **dict.fromkeys(GLOBAL, self.whole_image),
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._quantize,
            "MaxPool": self.pool,
            "AveragePool": self.pool,
            "Concat": self._concat,
            "Split": self._split,
            "Slice": self._slice,
            "Pad": self._pad,
            "Reshape": self._shuffle,
            "Resize": self._spatial,
            "RoiAlign": self._spatial,
            "Transpose": self._transpose,
        }
        for node in self.editor.nodes:
            self.node, self.new = node, []
            if node.name in self.done:
                self.changes[node.name] = []
                continue
            if node.domain == DOMAIN and node.op_type == OP:
                self._convolution(node)
            else:
                rule = rules.get(node.op_type) if is_op(node, node.op_type) else None
                if any(self.rank(name) < 0 for name in (*node.input, *node.output) if name):
                    rule = None  # of another rank, perhaps
                if node.domain == DOMAIN and node.op_type == code_tables.OP:
                    rule = self._unary
                if rule is None or not rule(node):
                    self.new = []
                    for name in self._read(node):
                        self.as_first(name)
                    self.new.append(node)
            self.changes[node.name] = self.new
        self.node, self.new = self.editor.nodes[-1], []
        for name in self.editor.outputs:
            self.as_first(name)
        self.changes[self.editor.nodes[-1].name] += self.new
        self.editor.rewrite(self.changes)

    def _read(self, node: NodeProto) -> list[str]:
        """What the node reads, in its subgraphs too."""
        names = [name for name in node.input if name]
        return names + [name for name in self.editor.captured(node) if name in self.only_last]

    # ---- rules: whether the node was rewritten ----
    def _convolution(self, node: NodeProto) -> None:
        inputs = [self.as_last(name) for name in node.input]
        self.copy(node, inputs, [self.made(node.output[0])])

    def _unary(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self.is_last(x) or any(self.is_last(name) for name in node.input[1:]):
            return False
        self.copy(node, [self.as_last(x), *node.input[1:]], [self.made(node.output[0])])
        return True

    def _quantize(self, node: NodeProto) -> bool:
        """QuantizeLinear and DequantizeLinear, per tensor or along an axis."""
        if not self.is_last(node.input[0]) or attribute(node, "block_size", 0):
            return False
        if not self.editor.is_scalar(node.input[1]):
            rank = self.rank(node.input[0])
            axis = attribute(node, "axis", 1) % rank
            set_attribute(node, "axis", moved_axis(axis, rank))
        return self._unary(node)

    def _elementwise(self, node: NodeProto) -> bool:
        editor = self.editor
        rank = self.rank(node.output[0])
        if not any(self.is_last(name) for name in node.input) or not 3 <= rank <= 5:
            return False
        if any(self.rank(n) != rank and editor.constant(n) is None for n in node.input):
            return False
        inputs = []
        for name in node.input:
            value = editor.constant(name)
            if value is None:
                inputs.append(self.as_last(name))
            elif value.size == 1:
                inputs.append(name)
            else:
                wide = value.reshape((1,) * (rank - value.ndim) + value.shape)
                turned = np.ascontiguousarray(np.moveaxis(wide, 1, -1))
                inputs.append(editor.add_constant(turned, f"{name}_nhwc"))
        self.copy(node, inputs, [self.made(node.output[0])])
        return True

    def _concat(self, node: NodeProto) -> bool:
        rank = self.rank(node.input[0])
        if not any(self.is_last(name) for name in node.input) or not 3 <= rank <= 5:
            return False
        inputs = []
        for name in node.input:
            value = self.editor.constant(name)
            if value is None:
                inputs.append(self.as_last(name))
            else:
                turned = np.ascontiguousarray(np.moveaxis(value, 1, -1))
                inputs.append(self.editor.add_constant(turned, f"{name}_nhwc"))
        new = self.copy(node, inputs, [self.made(node.output[0])])
        set_attribute(new, "axis", moved_axis(attribute(node, "axis", 0) % rank, rank))
        return True

    def _split(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self.is_last(x):
            return False
        rank = self.rank(x)
        inputs = [self.as_last(x), *node.input[1:]]
        new = self.copy(node, inputs, [self.made(name) for name in node.output])
        set_attribute(new, "axis", moved_axis(attribute(node, "axis", 0) % rank, rank))
        return True

    def _slice(self, node: NodeProto) -> bool:
        x = node.input[0]
        axes = self.editor.constant(operand(node, 3)) if operand(node, 3) else None
        if not self.is_last(x) or axes is None or len(node.input) < 4:
            return False
        rank = self.rank(x)
        moved = np.asarray([moved_axis(int(a) % rank, rank) for a in axes.reshape(-1)], np.int64)
        name = self.editor.add_constant(moved, f"{node.name}_axes")
        inputs = [self.as_last(x), *node.input[1:3], name, *node.input[4:]]
        self.copy(node, inputs, [self.made(node.output[0])])
        return True

    def _pad(self, node: NodeProto) -> bool:
        x = node.input[0]
        pads = self.editor.constant(operand(node, 1)) if operand(node, 1) else None
        if not self.is_last(x) or pads is None or operand(node, 3):
            return False
        rank = self.rank(x)
        order = [0, *range(2, rank), 1]
        moved = pads.reshape(2, rank)[:, order].reshape(-1)
        name = self.editor.add_constant(moved.astype(np.int64), f"{node.name}_pads")
        inputs = [self.as_last(x), name, *node.input[2:]]
        self.copy(node, inputs, [self.made(node.output[0])])
        return True

    def _spatial(self, node: NodeProto) -> bool:
        """Operators that have a channels-last form: attribute `layout`, the rest as it is."""
        x = node.input[0]
        rank = self.rank(node.output[0])
        if not self.is_last(x) or rank != self.rank(x) or not 3 <= rank <= 5:
            return False
        inputs = [self.as_last(x), *node.input[1:]]
        new = self.copy(node, inputs, [self.made(node.output[0])])
        new.op_type, new.domain = f"Dcc{node.op_type}", DOMAIN
        set_attribute(new, "layout", "NHWC")
        return True

    def _shuffle(self, node: NodeProto) -> bool:
        """Reshape - Transpose - Reshape that takes channels apart and together again."""
        editor, x = self.editor, node.input[0]
        if not self.is_last(x):
            return False
        found = channel_shuffle(editor, node)
        if found is None:
            return False
        turn, merge, parts, inner = found
        shape = editor.shape(x)
        assert shape is not None
        spatial = len(shape) - 2
        wide = (*shape[2:], *parts)
        apart = editor.fresh(f"{node.output[0]}_nhwc")
        editor.set_type(apart, editor.dtype(x), (shape[0], *wide))
        sizes = editor.add_constant(np.asarray([0, *wide], np.int64), f"{node.name}_shape")
        self.new.append(editor.node("Reshape", [self.as_last(x), sizes], node, output=apart))
        turned = editor.fresh(f"{turn.output[0]}_nhwc")
        order = [*range(spatial + 1), *(spatial + 1 + p for p in inner)]
        editor.set_type(turned, editor.dtype(x), tuple([shape[0], *wide][p] for p in order))
        self.new.append(editor.node("Transpose", [apart], turn, output=turned, perm=order))
        sizes = editor.add_constant(
            np.asarray([0, *shape[2:], shape[1]], np.int64), f"{merge.name}_shape"
        )
        output = self.made(merge.output[0])
        self.new.append(editor.node("Reshape", [turned, sizes], merge, output=output))
        self.done |= {turn.name, merge.name}
        return True

    def _transpose(self, node: NodeProto) -> bool:
        """Composed with the Transpose that made, or will make, the other form."""
        editor, x = self.editor, node.input[0]
        rank = self.rank(x)
        if not 3 <= rank <= 5:
            return False
        perm = list(attribute(node, "perm") or range(rank)[::-1])
        to_last = [0, *range(2, rank), 1]
        if x in self.only_last and perm == to_last:
            new = editor.node("Identity", [self.last[x]], node, output=node.output[0])
            self.new.append(new)
            return True
        if perm == [0, rank - 1, *range(1, rank - 1)] and x not in self.only_last:
            self.last[node.output[0]] = x
            self.only_last.add(node.output[0])
            return True
        return False
