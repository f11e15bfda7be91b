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
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto, helper

from .convolutions import DOMAIN, OP, Geometry, geometry
from .editor import Editor, Shape, attribute, is_op, operand
from .quantized import INT8, Refused

POOL = "DccPool"  # see `pooling`

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
_GLOBAL = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}


def channels_last(editor: Editor) -> None:
    """Rewrites the graph if it has convolutions that a kernel runs."""
    if any(node.domain == DOMAIN and node.op_type == OP for node in editor.nodes):
        _Pass(editor).run()


class _Pass:
    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.last: dict[str, str] = {}  # value -> its channels-last form
        self.only_last: set[str] = set()  # values whose own form is made on request
        self.new: list[NodeProto] = []
        self.node = NodeProto()  # the one being rewritten
        self.changes: dict[str, list[NodeProto]] = {}
        self.done: set[str] = set()  # nodes that were rewritten together with one before

    def run(self) -> None:
        rules: dict[str, Callable[[NodeProto], bool]] = {
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_REDUCTIONS, self._reduce),
            **dict.fromkeys(_GLOBAL, self._global),
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._quantize,
            "MaxPool": self._pool,
            "AveragePool": self._pool,
            "Concat": self._concat,
            "Split": self._split,
            "Slice": self._slice,
            "Pad": self._pad,
            "Reshape": self._shuffle,
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
                if rule is None or not rule(node):
                    self.new = []
                    for name in self._read(node):
                        self._first(name)
                    self.new.append(node)
            self.changes[node.name] = self.new
        self.node, self.new = self.editor.nodes[-1], []
        for name in self.editor.outputs:
            self._first(name)
        self.changes[self.editor.nodes[-1].name] += self.new
        self.editor.rewrite(self.changes)

    def _read(self, node: NodeProto) -> list[str]:
        """What the node reads, in its subgraphs too."""
        names = [name for name in node.input if name]
        return names + [name for name in self.editor.captured(node) if name in self.only_last]

    # ---- forms of values ----
    def _rank(self, name: str) -> int:
        shape = self.editor.shape(name)
        return -1 if shape is None else len(shape)

    def _is_last(self, name: str) -> bool:
        return name in self.last

    def _set(self, name: str) -> str:
        """A new name for the channels-last form of a value, which the node makes."""
        editor, shape = self.editor, self.editor.shape(name)
        assert shape is not None
        fresh = editor.fresh(f"{name}_nhwc")
        editor.set_type(fresh, editor.dtype(name), _turn(shape))
        self.last[name] = fresh
        self.only_last.add(name)
        return fresh

    def _last(self, name: str) -> str:
        """The channels-last form of a value."""
        if name not in self.last:
            editor, shape = self.editor, self.editor.shape(name)
            assert shape is not None
            fresh = editor.fresh(f"{name}_nhwc")
            editor.set_type(fresh, editor.dtype(name), _turn(shape))
            rank = len(shape)
            self._move(name, fresh, shape, [0, *range(2, rank), 1])
            self.last[name] = fresh
        return self.last[name]

    def _first(self, name: str) -> None:
        """Makes the value itself, channels first, where only its other form exists."""
        if name not in self.only_last:
            return
        shape = self.editor.shape(name)
        assert shape is not None
        rank = len(shape)
        self._move(self.last[name], name, _turn(shape), [0, rank - 1, *range(1, rank - 1)])
        self.only_last.discard(name)

    def _move(self, source: str, target: str, shape: Shape, perm: list[int]) -> None:
        """A Transpose, or a Reshape where at most one dim besides the batch is not 1."""
        editor = self.editor
        if sum(dim != 1 for dim in shape[1:]) <= 1:
            dims = [0, *(shape[p] for p in perm[1:])]
            if all(isinstance(dim, int) for dim in dims):
                sizes = editor.add_constant(np.asarray(dims, np.int64), f"{target}_shape")
                self.new.append(editor.node("Reshape", [source, sizes], self.node, output=target))
                return
        self.new.append(editor.node("Transpose", [source], self.node, output=target, perm=perm))

    def _copy(self, node: NodeProto, inputs: list[str], outputs: list[str]) -> NodeProto:
        new = NodeProto()
        new.CopyFrom(node)
        new.input[:], new.output[:] = inputs, outputs
        self.new.append(new)
        return new

    # ---- rules: whether the node was rewritten ----
    def _convolution(self, node: NodeProto) -> None:
        inputs = [self._last(name) for name in node.input]
        self._copy(node, inputs, [self._set(node.output[0])])

    def _unary(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self._is_last(x) or any(self._is_last(name) for name in node.input[1:]):
            return False
        self._copy(node, [self._last(x), *node.input[1:]], [self._set(node.output[0])])
        return True

    def _quantize(self, node: NodeProto) -> bool:
        """QuantizeLinear and DequantizeLinear, per tensor or along an axis."""
        if not self._is_last(node.input[0]) or attribute(node, "block_size", 0):
            return False
        if not self.editor.is_scalar(node.input[1]):
            rank = self._rank(node.input[0])
            axis = attribute(node, "axis", 1) % rank
            _set_attribute(node, "axis", _axis(axis, rank))
        return self._unary(node)

    def _elementwise(self, node: NodeProto) -> bool:
        editor = self.editor
        rank = self._rank(node.output[0])
        if not any(self._is_last(name) for name in node.input) or not 3 <= rank <= 5:
            return False
        if any(self._rank(n) != rank and editor.constant(n) is None for n in node.input):
            return False
        inputs = []
        for name in node.input:
            value = editor.constant(name)
            if value is None:
                inputs.append(self._last(name))
            elif value.size == 1:
                inputs.append(name)
            else:
                wide = value.reshape((1,) * (rank - value.ndim) + value.shape)
                turned = np.ascontiguousarray(np.moveaxis(wide, 1, -1))
                inputs.append(editor.add_constant(turned, f"{name}_nhwc"))
        self._copy(node, inputs, [self._set(node.output[0])])
        return True

    def _reduce(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self._is_last(x):
            return False
        rank, axes = self._rank(x), attribute(node, "axes")
        if operand(node, 1):
            value = self.editor.constant(node.input[1])
            axes = None if value is None else [int(a) for a in value.reshape(-1)]
        if not axes:
            return False
        axes = sorted(a % rank for a in axes)
        keep = attribute(node, "keepdims", 1)
        if keep and node.op_type == "ReduceMean" and axes == [*range(2, rank)]:
            if self._integer_mean(node, self._whole(x)):
                return True
        if not keep and axes not in ([*range(2, rank)], [*range(1, rank)]):
            return False
        moved = sorted(_axis(a, rank) for a in axes)
        output = self._set(node.output[0]) if keep else node.output[0]
        self._reduction(node, self._last(x), moved, output)
        return True

    def _reduction(self, node: NodeProto, x: str, axes: list[int], output: str) -> None:
        new = self._copy(node, [x], [output])
        if self.editor.opset() >= (13 if node.op_type == "ReduceSum" else 18):
            _drop_attribute(new, "axes")
            name = self.editor.add_constant(np.asarray(axes, np.int64), f"{node.name}_axes")
            new.input.append(name)
        else:
            _set_attribute(new, "axes", axes)

    def _global(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self._is_last(x):
            return False
        if node.op_type == "GlobalAveragePool" and self._integer_mean(node, self._whole(x)):
            return True
        axes = [*range(1, self._rank(x) - 1)]
        node.op_type = _GLOBAL[node.op_type]
        _set_attribute(node, "keepdims", 1)
        self._reduction(node, self._last(x), axes, self._set(node.output[0]))
        return True

    def _pool(self, node: NodeProto) -> bool:
        x = node.input[0]
        shape, result = self.editor.shape(x), self.editor.shape(node.output[0])
        if not self._is_last(x) or len(node.output) > 1 or shape is None or result is None:
            return False
        inside = attribute(node, "count_include_pad", 0)
        if inside and attribute(node, "ceil_mode", 0):
            return False
        try:
            where = geometry(node, list(shape[2:]), tuple(attribute(node, "kernel_shape")))
        except Refused:
            return False
        sizes = [1] * (5 - len(result)) + [int(d) for d in result[2:]]  # type: ignore[arg-type]
        if node.op_type == "AveragePool" and (inside or not any(map(any, where.pads))):
            whole = [
                (size - 1) * stride + (k - 1) * dilation + 1 <= n + sum(pads)
                for size, stride, k, dilation, n, pads in zip(
                    sizes, where.strides, where.kernel, where.dilations, where.size, where.pads,
                    strict=True,
                )
            ]  # fmt: skip
            if all(whole) and self._integer_mean(node, where):
                return True
        output = self._set(node.output[0])
        self.new.append(self._pooling(node, self._last(x), output, node.op_type, where, sizes))
        if inside:
            _set_attribute(self.new[-1], "count_include_pad", inside)
        return True

    def _pooling(
        self, node: NodeProto, x: str, output: str, kind: str, where: Geometry, sizes: list[int]
    ) -> NodeProto:
        return self.editor.node(
            POOL,
            [x],
            node,
            output=output,
            domain=DOMAIN,
            kind=kind,
            kernel=where.kernel,
            strides=where.strides,
            dilations=where.dilations,
            pads=[p for pair in where.pads for p in pair],
            sizes=sizes,
        )

    def _whole(self, x: str) -> Geometry | None:
        """A window over all of a value's pixels."""
        shape = self.editor.shape(x)
        assert shape is not None
        try:
            return geometry(NodeProto(), list(shape[2:]), tuple(shape[2:]))  # type: ignore[arg-type]
        except Refused:
            return None

    def _integer_mean(self, node: NodeProto, where: Geometry | None) -> bool:
        """The mean of dequantized codes as their exact sum, dequantized once per window.

        sum of (q - zero) * scale / n = (sum of q - n * zero) * (scale / n).
        """
        editor = self.editor
        back = editor.producer(node.input[0], "DequantizeLinear")
        if where is None or back is None or editor.dtype(back.input[0]) not in INT8:
            return False
        scale = editor.scalar(back.input[1])
        zero = editor.scalar(back.input[2]) if operand(back, 2) else 0
        shape = editor.shape(node.output[0])
        if scale is None or zero is None or scale.dtype != np.float32 or shape is None:
            return False
        count = prod(where.kernel)
        if not np.isfinite(scale / count) or count >= 1 << 20:
            return False
        total = editor.fresh(f"{node.output[0]}_sum")
        editor.set_type(total, TensorProto.INT32, _turn(shape))
        sizes = [1] * (5 - len(shape)) + [int(d) for d in shape[2:]]  # type: ignore[arg-type]
        source = self._last(back.input[0])
        self.new.append(self._pooling(node, source, total, "Sum", where, sizes))
        _set_attribute(self.new[-1], "fill", int(zero))
        numbers = [
            editor.add_constant(np.asarray(scale / np.float32(count)), f"{node.name}_scale"),
            editor.add_constant(np.asarray(count * int(zero), np.int32), f"{node.name}_zero"),
        ]
        output = self._set(node.output[0])
        self.new.append(editor.node("DequantizeLinear", [total, *numbers], node, output=output))
        return True

    def _concat(self, node: NodeProto) -> bool:
        rank = self._rank(node.input[0])
        if not any(self._is_last(name) for name in node.input) or not 3 <= rank <= 5:
            return False
        inputs = []
        for name in node.input:
            value = self.editor.constant(name)
            if value is None:
                inputs.append(self._last(name))
            else:
                turned = np.ascontiguousarray(np.moveaxis(value, 1, -1))
                inputs.append(self.editor.add_constant(turned, f"{name}_nhwc"))
        new = self._copy(node, inputs, [self._set(node.output[0])])
        _set_attribute(new, "axis", _axis(attribute(node, "axis", 0) % rank, rank))
        return True

    def _split(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self._is_last(x):
            return False
        rank = self._rank(x)
        inputs = [self._last(x), *node.input[1:]]
        new = self._copy(node, inputs, [self._set(name) for name in node.output])
        _set_attribute(new, "axis", _axis(attribute(node, "axis", 0) % rank, rank))
        return True

    def _slice(self, node: NodeProto) -> bool:
        x = node.input[0]
        axes = self.editor.constant(operand(node, 3)) if operand(node, 3) else None
        if not self._is_last(x) or axes is None or len(node.input) < 4:
            return False
        rank = self._rank(x)
        moved = np.asarray([_axis(int(a) % rank, rank) for a in axes.reshape(-1)], np.int64)
        name = self.editor.add_constant(moved, f"{node.name}_axes")
        inputs = [self._last(x), *node.input[1:3], name, *node.input[4:]]
        self._copy(node, inputs, [self._set(node.output[0])])
        return True

    def _pad(self, node: NodeProto) -> bool:
        x = node.input[0]
        pads = self.editor.constant(operand(node, 1)) if operand(node, 1) else None
        if not self._is_last(x) or pads is None or operand(node, 3):
            return False
        rank = self._rank(x)
        order = [0, *range(2, rank), 1]
        moved = pads.reshape(2, rank)[:, order].reshape(-1)
        name = self.editor.add_constant(moved.astype(np.int64), f"{node.name}_pads")
        inputs = [self._last(x), name, *node.input[2:]]
        self._copy(node, inputs, [self._set(node.output[0])])
        return True

    def _shuffle(self, node: NodeProto) -> bool:
        """Reshape - Transpose - Reshape that takes channels apart and together again."""
        editor, x = self.editor, node.input[0]
        if not self._is_last(x):
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
        self.new.append(editor.node("Reshape", [self._last(x), sizes], node, output=apart))
        turned = editor.fresh(f"{turn.output[0]}_nhwc")
        order = [*range(spatial + 1), *(spatial + 1 + p for p in inner)]
        editor.set_type(turned, editor.dtype(x), tuple([shape[0], *wide][p] for p in order))
        self.new.append(editor.node("Transpose", [apart], turn, output=turned, perm=order))
        sizes = editor.add_constant(
            np.asarray([0, *shape[2:], shape[1]], np.int64), f"{merge.name}_shape"
        )
        output = self._set(merge.output[0])
        self.new.append(editor.node("Reshape", [turned, sizes], merge, output=output))
        self.done |= {turn.name, merge.name}
        return True

    def _transpose(self, node: NodeProto) -> bool:
        """Composed with the Transpose that made, or will make, the other form."""
        editor, x = self.editor, node.input[0]
        rank = self._rank(x)
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


def channel_shuffle(
    editor: Editor, node: NodeProto
) -> tuple[NodeProto, NodeProto, Shape, list[int]] | None:
    """Of the Reshape that splits channels to shuffle them: what follows, and the permutation.

    Returns the Transpose, the Reshape that merges them again, the parts that channels are split
    into and the order of these; None if it is another Reshape.
    """
    shape, split = editor.shape(node.input[0]), editor.shape(node.output[0])
    turn = editor.only_user(node.output[0])
    if shape is None or split is None or turn is None or not is_op(turn, "Transpose"):
        return None
    merge = editor.only_user(turn.output[0])
    if merge is None or not is_op(merge, "Reshape") or editor.shape(merge.output[0]) != shape:
        return None
    spatial = len(shape) - 2
    parts = split[1 : len(split) - spatial]
    if split[0] != shape[0] or split[len(split) - spatial :] != shape[2:] or len(parts) < 2:
        return None
    perm = attribute(turn, "perm") or [*range(len(split))][::-1]
    tail = [*range(len(split) - spatial, len(split))]
    if perm[0] != 0 or [*perm[1 + len(parts) :]] != tail or not _static(shape[1:], parts):
        return None
    return turn, merge, parts, [p - 1 for p in perm[1 : 1 + len(parts)]]


def _turn(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1])


def _axis(axis: int, rank: int) -> int:
    """Where an axis of the channels-first form is in the other."""
    return 0 if axis == 0 else rank - 1 if axis == 1 else axis - 1


def _static(*dims: Shape) -> bool:
    return all(isinstance(dim, int) for part in dims for dim in part)


def _set_attribute(node: NodeProto, name: str, value: int | list[int]) -> None:
    _drop_attribute(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def _drop_attribute(node: NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
