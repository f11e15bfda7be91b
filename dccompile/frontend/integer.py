"""Converters of quantization and integer arithmetic, exact: the route of nodes without a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from tvm import relax, te, tirx

from dccompile.generic.elementwise import greater, number, smaller

from .operator_tools import Converter, Node, constant, dtype_of, shape_of

_RANGES = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
}

# TVM's class of operators that fuse with elementwise ones: it takes a look-up for a gather.
_BROADCAST = 1


def quantized(y: Any, zero: Any, dtype: str) -> Any:
    """saturate(rint(y) + zero); NaN gives the least code, as ONNX Runtime does."""
    low, high = (number(float(v), y) for v in _RANGES[dtype])
    code = tirx.nearbyint(y) + tirx.Cast(str(y.ty), zero)
    code = tirx.Select(code > low, code, low)
    code = tirx.Select(code < high, code, high)
    return tirx.Cast(dtype, tirx.Cast("int32", code))


def _at(scale: te.Tensor, index: tuple[Any, ...], axis: int, block: int) -> Any:
    """The scale or zero point of an element: one for all, per axis, or per block of the axis."""
    rank = len(scale.shape)
    if rank == 0:
        return scale()
    if rank == 1 and len(index) >= 1 and not block:
        size = scale.shape[0]
        if isinstance(size, tirx.IntImm) and int(size.value) == 1:
            return scale(tirx.const(0, "int64"))
        return scale(index[axis])
    place = list(index)
    place[axis] = tirx.floordiv(index[axis], block)
    return scale(*place)


def _layout(node: Node, x: Any) -> tuple[int, int]:
    rank = max(1, len(shape_of(x)))
    axis = int(node.attr.get("axis", 1))
    return (0 if rank == 1 else axis % rank), int(node.attr.get("block_size", 0))


def _target(node: Node, zero: Any) -> str:
    if zero is not None:
        kind = dtype_of(zero)
    else:
        code = int(node.attr.get("output_dtype", 0))
        kind = str(onnx.helper.tensor_dtype_to_np_dtype(code)) if code else "uint8"
    if kind not in _RANGES:
        raise node.refuse(f"type {kind} is not one of {', '.join(_RANGES)}", "use one of these")
    return kind


class QuantizeLinear(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        x, scale, zero = (node.get(i) for i in range(3))
        kind = _target(node, zero)
        axis, block = _layout(node, x)
        if int(node.attr.get("precision", 0)) not in (0, 1):
            raise node.refuse("precision is not float32", "remove the attribute precision")

        def build(v: te.Tensor, s: te.Tensor, *z: te.Tensor) -> te.Tensor:
            def value(*i: Any) -> Any:
                step = tirx.Cast("float32", _at(s, i, axis, block))
                code = _at(z[0], i, axis, block) if z else tirx.const(0, kind)
                return quantized(tirx.Cast("float32", v(*i)) / step, code, kind)

            return te.compute(v.shape, value, name="quantize")

        return node.compute(build, x, scale, *([] if zero is None else [zero]))


class Requantize(Converter):
    """DccRequantize, see `requantize`: saturate(rint((q - zero) * factor) + output_zero)."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        kind = str(onnx.helper.tensor_dtype_to_np_dtype(int(node.attr["to"])))
        zero, output_zero = (int(node.attr[name]) for name in ("zero", "output_zero"))
        factor = float(node.attr["factor"])

        def build(q: te.Tensor) -> te.Tensor:
            def value(*i: Any) -> Any:
                whole = tirx.Cast("int32", q(*i)) - tirx.const(zero, "int32")
                y = tirx.Cast("float32", whole) * tirx.const(factor, "float32")
                return quantized(y, tirx.const(output_zero, kind), kind)

            return te.compute(q.shape, value, name="requantize")

        return node.compute(build, node.get(0))


class Table(Converter):
    """DccTable, see `code_tables`: table[q], q counted as unsigned."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        def build(q: te.Tensor, table: te.Tensor) -> te.Tensor:
            def value(*i: Any) -> Any:
                return table(tirx.Cast("int64", tirx.Cast("uint8", q(*i))))

            return te.compute(q.shape, value, name="table")

        call = node.bb.call_te(
            build,
            node.get(0),
            node.get(1),
            primfunc_name_hint="table",
            primfunc_attrs={"op_pattern": _BROADCAST},
        )
        return node.do(call)


class DynamicQuantizeLinear(Converter):
    """u8 with the range of the data, 0 in it; the scale of all zeros is 1."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)

        def low(v: Any) -> Any:
            return smaller(v, number(0, v))

        def high(v: Any) -> Any:
            return greater(v, number(0, v))

        least = node.emit(low, node.do(relax.op.min(x)))
        most = node.emit(high, node.do(relax.op.max(x)))

        def scale_of(a: Any, b: Any) -> Any:
            return tirx.Select(a == b, number(1, a), (b - a) / number(255, a))

        scale = node.emit(scale_of, least, most)

        def zero_of(a: Any, s: Any) -> Any:
            return quantized((number(0, a) - a) / s, tirx.const(0, "uint8"), "uint8")

        zero = node.emit(zero_of, least, scale)

        def code_of(v: Any, s: Any, z: Any) -> Any:
            return quantized(v / s, z, "uint8")

        return relax.Tuple([node.emit(code_of, x, scale, zero), scale, zero])


class DequantizeLinear(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        x, scale, zero = (node.get(i) for i in range(3))
        kind = dtype_of(x)
        if kind not in (*_RANGES, "int32"):
            raise node.refuse(f"type {kind} is not supported", f"use {', '.join(_RANGES)}")
        axis, block = _layout(node, x)
        out = dtype_of(scale)
        code = int(node.attr.get("output_dtype", 0))
        if code:
            out = str(onnx.helper.tensor_dtype_to_np_dtype(code))

        def build(v: te.Tensor, s: te.Tensor, *z: te.Tensor) -> te.Tensor:
            def value(*i: Any) -> Any:
                whole = tirx.Cast("int32", v(*i))
                if z:
                    whole = whole - tirx.Cast("int32", _at(z[0], i, axis, block))
                exact = tirx.Cast("float32", whole)
                return tirx.Cast(out, exact * tirx.Cast("float32", _at(s, i, axis, block)))

            return te.compute(v.shape, value, name="dequantize")

        return node.compute(build, x, scale, *([] if zero is None else [zero]))


def _centered(node: Node, x: Any, zero: Any, row_wise: bool) -> Any:
    """int32 x - zero; a vector of zero points belongs to rows or columns of the last two dims."""
    if zero is None:
        return node.emit(lambda v: tirx.Cast("int32", v), x)
    known = constant(zero)
    if known is not None and not known.any():
        return node.emit(lambda v: tirx.Cast("int32", v), x)
    shape = shape_of(zero)
    if row_wise and len(shape) == 1 and shape[0] != 1:
        zero = node.do(relax.op.reshape(zero, relax.ShapeExpr([shape[0], 1])))
    elif len(shape) == 1 and shape[0] == 1:
        zero = node.do(relax.op.reshape(zero, relax.ShapeExpr([])))
    return node.emit(lambda v, z: tirx.Cast("int32", v) - tirx.Cast("int32", z), x, zero)


class MatMulInteger(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        a = _centered(node, node.get(0), node.get(2), True)
        b = _centered(node, node.get(1), node.get(3), False)
        return relax.op.matmul(a, b, out_dtype="int32")


def _requantize(node: Node, acc: Any, inputs: list[Any], axis: int) -> Any:
    """u8 or s8 from s32: round(acc * (a_scale * b_scale / y_scale)) + y_zero."""
    a_scale, b_scale, y_scale, zero = inputs
    kind = dtype_of(zero)

    def build(v: te.Tensor, a: te.Tensor, b: te.Tensor, y: te.Tensor, z: te.Tensor) -> te.Tensor:
        def value(*i: Any) -> Any:
            rows = len(i) - 2
            factor = _at(a, i, rows, 0) * _at(b, i, axis, 0) / _at(y, i, axis, 0)
            return quantized(tirx.Cast("float32", v(*i)) * factor, _at(z, i, axis, 0), kind)

        return te.compute(v.shape, value, name="requantize")

    return node.compute(build, acc, a_scale, b_scale, y_scale, zero)


class QLinearMatMul(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (node.get(i) for i in range(8))
        acc = relax.op.matmul(
            _centered(node, a, a_zero, True), _centered(node, b, b_zero, False), out_dtype="int32"
        )
        acc = node.do(acc)
        return _requantize(node, acc, [a_scale, b_scale, y_scale, y_zero], len(shape_of(acc)) - 1)


def _convolved(node: Node, x: Any, w: Any) -> Any:
    """The s32 convolution of centered operands: padding is the zero point, that is 0."""
    spatial = len(shape_of(x)) - 2
    if spatial not in (1, 2, 3):
        raise node.refuse(f"it has {spatial} spatial dimensions; 1 to 3 are supported", "reshape")
    kernel = shape_of(w)[2:]
    strides = [int(s) for s in node.attr.get("strides", [1] * spatial)]
    dilations = [int(d) for d in node.attr.get("dilations", [1] * spatial)]
    pads = [int(p) for p in node.attr.get("pads", [0] * 2 * spatial)]
    auto = node.text("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * spatial
        for k in range(spatial):
            size = shape_of(x)[2 + k]
            reach = (kernel[k] - 1) * dilations[k] + 1
            total = max(0, (-(-size // strides[k]) - 1) * strides[k] + reach - size)
            pads[k] = total // 2 if auto == "SAME_UPPER" else total - total // 2
            pads[spatial + k] = total - pads[k]
    op = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}[spatial]
    groups = int(node.attr.get("group", 1))
    return node.do(op(x, w, strides, pads, dilations, groups, out_dtype="int32"))


class ConvInteger(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        x = _centered(node, node.get(0), node.get(2), False)
        return _convolved(node, x, _weights(node, node.get(1), node.get(3)))


class QLinearConv(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (
            node.get(i) for i in range(9)
        )
        acc = _convolved(node, _centered(node, x, x_zero, False), _weights(node, w, w_zero))
        if bias is not None:
            ones = [1] * (len(shape_of(acc)) - 2)
            bias = node.do(relax.op.reshape(bias, relax.ShapeExpr([shape_of(bias)[0], *ones])))
            acc = node.emit(lambda v, b: v + b, acc, bias)
        return _requantize(node, acc, [x_scale, w_scale, y_scale, y_zero], 1)


def _weights(node: Node, w: Any, zero: Any) -> Any:
    """int32 weights less their zero point, of which there is one or one per output channel."""
    known = constant(w), None if zero is None else constant(zero)
    if known[0] is not None and (zero is None or known[1] is not None):
        value = known[0].astype(np.int32)
        if known[1] is not None:
            value = value - known[1].astype(np.int32).reshape(-1, *[1] * (value.ndim - 1))
        return relax.const(np.ascontiguousarray(value))
    if zero is not None and shape_of(zero) not in ([], [1]):
        ones = [1] * (len(shape_of(w)) - 1)
        zero = node.do(relax.op.reshape(zero, relax.ShapeExpr([shape_of(zero)[0], *ones])))
    return _centered(node, w, zero, False)


INTEGER = {
    c.__name__: c
    for c in (
        QuantizeLinear,
        DynamicQuantizeLinear,
        DequantizeLinear,
        MatMulInteger,
        QLinearMatMul,
        ConvInteger,
        QLinearConv,
    )
}
