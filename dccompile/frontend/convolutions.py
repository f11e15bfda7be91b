"""Finds the convolutions with constant weights and makes each one node, ``DccConv``.

A DccConv (domain "dccompile", attribute "site") computes the workload.Conv of that site: inputs A
(batch, spatial dims.., channels) and, with a residual, R of the output's shape; output (batch,
spatial dims.., filters). It is channels-last while the graph around it is not: `layout` comes
next.

Recovered together with the convolution are its bias, a residual sum, an activation and the
quantization of the output: Conv [- Relu] - QuantizeLinear, and from there on, where its only reader
is a sum with another tensor, DequantizeLinear - Add [- Relu] - QuantizeLinear. Every rounding of
the model between 8-bit tensors stays. The factor of the accumulator is
fl(fl(a_scale * b_scale[o]) / y_scale) as in ONNX Runtime's QLinearConv.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from dccompile.workload import (
    INT8_LIMITS,
    Conv,
    ConvWeights,
    Residual,
    ResidualWeights,
)

from .conv_operands import (
    check_weights,
    divide,
    integer_bias,
    kernel_order,
    lifted,
    undoes,
)
from .editor import Editor, attribute, is_op, operand
from .epilogue import Epilogue, Tail, take_activation
from .products import check_scale
from .quantized import Activation, Constant, Refused, activation_operand, constant_operand
from .transposed import Interleave, as_convolution, spread
from .windows import geometry

DOMAIN, OP = "dccompile", "DccConv"
_MOST_TAPS = 1024  # of one filter, per channel: kernels unroll over them


@dataclass(frozen=True)
class ConvSite:
    """One recovered convolution: what it computes, with what, in place of which nodes."""

    name: str
    workload: Conv
    weights: ConvWeights
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    rank: int  # of A
    precision: str  # int8 | float32
    interleave: Interleave | None = None  # follows: the node is a ConvTranspose
    dims: tuple[int, ...] = ()  # spatial, of the output, where the workload's have another form


@dataclass
class Found:
    """Sites by name, and reasons by node."""

    sites: dict[str, ConvSite] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def recover_convolutions(editor: Editor) -> Found:
    """Rewrites the graph."""
    found = Found()
    changes: dict[str, list[NodeProto]] = {}
    taken: set[str] = set()  # nodes that a convolution before has in its tail
    for node in editor.nodes:
        if is_op(node, "Conv", "ConvTranspose"):
            try:
                _Recovery(editor, node, found, changes, taken).run()
            except Refused as refused:
                found.reasons[node.name] = str(refused)
    editor.rewrite(changes)
    return found


class _Recovery:
    """Of one Conv node."""

    def __init__(
        self,
        editor: Editor,
        node: NodeProto,
        found: Found,
        changes: dict[str, list[NodeProto]],
        taken: set[str],
    ) -> None:
        self.editor, self.node, self.found = editor, node, found
        self.changes, self.taken = changes, taken
        self.tail = Tail(editor, node)
        self.before: list[NodeProto] = []
        self.covered: list[NodeProto] = []
        self.interleave: Interleave | None = None

    def run(self) -> None:
        """Plans the replacement; raises Refused."""
        editor, node = self.editor, self.node
        shape = editor.shape(node.input[0])
        weights = constant_operand(editor, node.input[1])
        if shape is None or weights is None:
            raise Refused("weights are not constant" if shape else "rank of the input is not known")
        if not isinstance(shape[1], int) or len(weights.values.shape) != len(shape):
            raise Refused("channels are open")
        if 0 in weights.values.shape or 0 in shape:
            raise Refused("an operand is empty")
        source, groups = node, attribute(node, "group", 1)
        if node.op_type == "ConvTranspose":
            if weights.values.shape[0] != shape[1] or shape[1] % groups:
                raise Refused(f"{groups} groups do not divide {shape[1]} channels")
            weights, attributes, self.interleave = as_convolution(node, weights, list(shape[2:]))
            source = helper.make_node("Conv", [], [], **attributes)
        filters = weights.values.shape[0]
        if filters % groups or weights.values.shape[1] * groups != shape[1]:
            raise Refused(f"{groups} groups do not divide {shape[1]} channels")
        where = geometry(source, list(shape[2:]), weights.values.shape[2:])
        if int(np.prod(where.kernel)) > _MOST_TAPS:
            raise Refused(f"the window has more than {_MOST_TAPS} taps")
        activation, reason = self._activation(weights)
        if reason:
            self.found.reasons[node.name] = reason
        work = Conv(
            shape[0] if isinstance(shape[0], int) else None,
            where.size,
            shape[1],
            filters,
            where.kernel,
            where.strides,
            where.dilations,
            where.pads,
            groups,
        )
        if min(work.outputs) < 1:
            raise Refused("the window is larger than the padded input")
        self.covered += weights.nodes
        if activation is None:
            self._float(work, weights)
        else:
            self._integer(work, weights, activation)

    # ---- operands ----
    def _activation(self, weights: Constant) -> tuple[Activation | None, str]:
        """The quantized input if integers can be multiplied; else None and why floats."""
        reason = ""
        try:
            activation = activation_operand(self.editor, self.node.input[0])
            if activation is not None:
                check_weights(weights)
                if activation.zero is None or activation.scale is None:
                    raise Refused("the input's scale is computed when called")
                return activation, ""
            if weights.scale is not None:
                reason = "activations are not quantized"
        except Refused as refused:
            reason = str(refused)
        if self.editor.dtype(self.node.input[0]) != TensorProto.FLOAT:
            kind = TensorProto.DataType.Name(self.editor.dtype(self.node.input[0])).lower()
            raise Refused(f"activations are {kind}")
        return None, reason

    def _bias(self) -> Constant | None:
        name = operand(self.node, 2)
        if not name:
            return None
        bias = constant_operand(self.editor, name)
        if bias is None:
            raise Refused("the bias is not constant")
        self.covered += bias.nodes
        interleave = self.interleave
        if interleave is None:
            return bias
        return bias.each(lambda part: spread(part, interleave))

    # ---- the two kinds ----
    def _float(self, work: Conv, weights: Constant) -> None:
        b = weights.dequantize()
        if b.dtype != np.float32:
            raise Refused(f"weights are {b.dtype}")
        bias = self._bias()
        values = None if bias is None else bias.dequantize().astype(np.float32).reshape(-1)
        inputs, epilogue = [self.node.input[0]], Epilogue()
        other = self._sum()
        if other:
            inputs.append(other)
            work = replace(work, residual=Residual("f32"))
        take_activation(self.tail, epilogue, quantize=False)
        work = replace(
            work,
            a="f32",
            b="f32",
            out="f32",
            bias="none" if bias is None else "f32",
            activation=epilogue.activation,
            clip=epilogue.clip,
        )
        self._emit(work, ConvWeights(kernel_order(b), bias=values), inputs, "float32")

    def _integer(self, work: Conv, weights: Constant, activation: Activation) -> None:
        assert activation.zero is not None and activation.scale is not None
        assert weights.scale is not None and weights.zero is not None
        self.covered += activation.nodes
        wide = weights.values.astype(np.int32) - weights.zero
        filters = work.filters
        scale = np.broadcast_to(weights.scale.reshape(-1), (filters,))
        with np.errstate(all="ignore"):
            scale = activation.scale * scale
        usable = lifted(scale)
        check_scale(usable)
        found = ConvWeights(kernel_order(wide.astype(np.int8)), usable, a_zero=activation.zero)
        name = activation.name
        if activation.dtype == "s8":
            name = self._unsigned(name)
            found.a_zero += 128
        constant = self._bias()
        bias = None if constant is None else integer_bias(constant, scale)
        reach = max(255 - found.a_zero, found.a_zero)
        bound = np.abs(found.b.astype(np.float64)).sum((0, 1, 2, 3)) * reach
        if bias is not None:
            bound = bound + np.abs(bias.astype(np.float64))
            if bound.max() >= 2**31:
                bound, bias = bound - np.abs(bias.astype(np.float64)), None
        if bound.max() >= 2**31:
            raise Refused("sums can leave the 32-bit range")
        found.bias = bias
        if bias is None and constant is not None:
            found.bias = constant.dequantize().astype(np.float32).reshape(-1)

        start = len(self.tail.nodes)
        epilogue = Epilogue()
        take_activation(self.tail, epilogue, quantize=True)
        inputs, work = self._residual(work, found, epilogue, start)
        work = replace(
            work,
            out=epilogue.y_dtype or "f32",
            bias="none" if found.bias is None else "s32" if bias is not None else "f32",
            b_bits=7 if np.abs(found.b.astype(np.int16)).max() <= 64 else 8,
            shifted=epilogue.zero_point != 0,
            clamped=epilogue.clamp is not None,
            activation=epilogue.activation,
            clip=epilogue.clip,
            padded=found.a_zero != 0 and any(p for pair in work.pads for p in pair),
        )
        if work.out != "f32":
            found.zero_point, found.clamp = epilogue.zero_point, epilogue.clamp
            assert found.scale is not None
            y = bound * np.abs(found.scale.astype(np.float64))
            if work.bias == "f32" and found.bias is not None:
                y = y + np.abs(found.bias.astype(np.float64))
            if work.residual is not None and not work.residual.inner:
                assert found.residual is not None
                y = y + 256 * abs(found.residual.b) + abs(found.residual.c)
            work = replace(work, bounded=bool(y.max() * 1.0001 + 512 < 2**31))
        self._emit(work, found, [name, *inputs], "int8")

    def _residual(
        self, work: Conv, found: ConvWeights, epilogue: Epilogue, start: int
    ) -> tuple[list[str], Conv]:
        """Takes the sum with another quantized tensor, if one follows; sets the output's scale.

        `epilogue` becomes that of the last quantization.
        """
        nodes, inner = list(self.tail.nodes), replace(epilogue)
        if inner.y_scale is None:  # no quantization between the convolution and the sum
            del self.tail.nodes[start:]
        taken = self._quantized_sum(inner)
        if taken is None:
            self.tail.nodes = nodes
            if epilogue.y_scale is not None:
                divide(found, epilogue.y_scale)
            return [], work
        other, last, first = taken
        assert last.y_scale is not None and other.scale is not None and other.zero is not None
        b = other.scale / last.y_scale
        if inner.y_scale is not None:
            limits = inner.clamp or INT8_LIMITS[inner.y_dtype]
            zero = inner.zero_point
            a = inner.y_scale / last.y_scale
            terms = [a * np.float32(zero), b * np.float32(other.zero)]
            if first:
                terms.reverse()
            c = np.float32(last.zero_point) - (terms[0] + terms[1])
            last.zero_point = 0  # is in c
            divide(found, inner.y_scale)
        else:
            limits, zero, a = (0, 0), 0, np.float32(1)
            c = np.float32(-other.zero) * b
            divide(found, last.y_scale)
        found.residual = ResidualWeights(float(a), float(b), float(c), zero, *limits)
        for name in ("y_scale", "y_dtype", "zero_point", "clamp", "activation", "clip"):
            setattr(epilogue, name, getattr(last, name))
        sum_ = Residual(other.dtype, inner.y_dtype, first and bool(inner.y_dtype))
        return [other.name], replace(work, residual=sum_)

    def _quantized_sum(self, inner: Epilogue) -> tuple[Activation, Epilogue, bool] | None:
        """Extends the tail by [DequantizeLinear -] Add [- Relu] - QuantizeLinear.

        Returns the other operand, what follows, and whether the other is the first operand.
        """
        tail, editor = self.tail, self.editor
        start = len(tail.nodes)
        if inner.y_scale is not None:
            node = tail.peek("DequantizeLinear")
            if node is None or not undoes(editor, node, inner):
                return None
            tail.nodes.append(node)
        elif inner.activation != "none":
            return None
        add = tail.peek("Add")
        if add is None or add.name in self.taken or self.interleave:
            del tail.nodes[start:]
            return None
        name = tail.other(add)
        try:
            other = activation_operand(editor, name)
        except Refused:
            other = None
        same = editor.shape(name) == editor.shape(tail.value)
        if other is None or other.zero is None or other.scale is None or not same:
            del tail.nodes[start:]
            return None
        tail.nodes.append(add)
        last = Epilogue()
        take_activation(tail, last, quantize=True)
        if last.y_scale is None:
            del tail.nodes[start:]
            return None
        self.taken.add(add.name)
        return other, last, add.input[0] == name

    def _sum(self) -> str:
        """Extends the tail by the Add of a float tensor of the same shape; its name or ""."""
        add = self.tail.peek("Add")
        if add is None or add.name in self.taken or self.interleave:
            return ""
        name = self.tail.other(add)
        same = self.editor.shape(name) == self.editor.shape(self.tail.value)
        if not same or name == self.tail.value or self.editor.constant(name) is not None:
            return ""
        self.taken.add(add.name)
        self.tail.nodes.append(add)
        return name

    # ---- new nodes ----
    def _unsigned(self, name: str) -> str:
        """s8 activations as u8, 128 higher."""
        editor, shape = self.editor, self.editor.shape(name)

        def step(op: str, inputs: list[str], kind: int, **more: Any) -> str:
            node = editor.node(op, inputs, self.node, **more)
            editor.set_type(node.output[0], kind, shape)
            self.before.append(node)
            return str(node.output[0])

        offset = editor.add_constant(np.asarray(128, np.int16), f"{name}_offset")
        wide = step("Cast", [name], TensorProto.INT16, to=TensorProto.INT16)
        moved = step("Add", [wide, offset], TensorProto.INT16)
        return step("Cast", [moved], TensorProto.UINT8, to=TensorProto.UINT8)

    def _emit(self, work: Conv, weights: ConvWeights, inputs: list[str], precision: str) -> None:
        editor, node, tail = self.editor, self.node, self.tail
        new = editor.node(OP, inputs, node, output=tail.value, domain=DOMAIN, site=node.name)
        origins = [n for o in (*tail.nodes, *self.covered) for n in editor.origin[o.name]]
        editor.origin[new.name] = tuple(dict.fromkeys(origins))
        self.changes[tail.nodes[-1].name] = [*self.before, new]
        rank = len(editor.shape(node.input[0]) or ())
        self.found.sites[node.name] = ConvSite(
            node.name,
            work,
            weights,
            editor.origin[new.name],
            tuple(inputs),
            tail.value,
            rank,
            precision,
            self.interleave,
        )
