"""Converters of normalizations, selections along an axis, and layout operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dccompile.generic import gpu_counted, gpu_topk
from dccompile.generic.elementwise import number
from dccompile.generic.lanes import local
from dccompile.generic.topk import top

from .operator_tools import Converter, Node, constant, dtype_of, shape_of
from .pooling import greatest
from .symbols import spell


def _axes_from(node: Node, x: Any) -> list[int]:
    rank = len(shape_of(x))
    return list(range(int(node.attr.get("axis", -1)) % rank, rank))


class LayerNormalization(Converter):
    """All three outputs; computed in float32 and returned in the input's type."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, scale, bias = (node.get(i) for i in range(3))
        kind = dtype_of(x)
        axes = _axes_from(node, x)
        epsilon = float(node.attr.get("epsilon", 1e-5))
        wide = x if kind in ("float32", "float64") else node.do(relax.op.astype(x, "float32"))
        stash = dtype_of(wide)
        dims = [shape_of(x)[a] for a in axes]
        full = relax.ShapeExpr(dims)
        scale = _spread(node, scale, full, stash)
        if bias is None:
            bias = relax.const(np.zeros([int(d) for d in dims], stash), stash)
        else:
            bias = _spread(node, bias, full, stash)
        y = node.do(relax.op.nn.layer_norm(wide, scale, bias, axes, epsilon))
        if stash != kind:
            y = node.do(relax.op.astype(y, kind))
        if node.outputs == 1:
            return y
        mean = node.do(relax.op.mean(wide, axes, keepdims=True))
        gap = node.emit(lambda a, b: (a - b) * (a - b), wide, mean)
        variance = node.do(relax.op.mean(gap, axes, keepdims=True))
        inverse = node.emit(lambda v: number(1, v) / tirx.sqrt(v + number(epsilon, v)), variance)
        return relax.Tuple([y, mean, inverse][: node.outputs])


def _spread(node: Node, value: Any, shape: Any, kind: str) -> Any:
    known = constant(value)
    if known is not None:
        dims = [int(d) for d in shape.values]
        spread = np.broadcast_to(known.astype(kind), dims)
        return relax.const(np.ascontiguousarray(spread), kind)
    if dtype_of(value) != kind:
        value = node.do(relax.op.astype(value, kind))
    return node.do(relax.op.broadcast_to(value, shape))


class RMSNormalization(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        x, scale = node.get(0), node.get(1)
        kind, axes = dtype_of(x), _axes_from(node, node.get(0))
        epsilon = float(node.attr.get("epsilon", 1e-5))
        wide = x if kind in ("float32", "float64") else node.do(relax.op.astype(x, "float32"))
        square = node.emit(lambda v: v * v, wide)
        mean = node.do(relax.op.mean(square, axes, keepdims=True))

        def rule(v: Any, m: Any, s: Any) -> Any:
            inverse = number(1, m) / tirx.sqrt(m + number(epsilon, m))
            return tirx.Cast(kind, v * inverse * tirx.Cast(str(v.ty), s))

        return node.emit(rule, wide, mean, scale)


class LpNormalization(Converter):
    """x divided by its norm along an axis; 0 where the norm is 0."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        axis = int(node.attr.get("axis", -1)) % len(shape_of(x))
        p = int(node.attr.get("p", 2))
        part = node.emit(lambda v: v * v if p == 2 else tirx.abs(v), x)
        total = node.do(relax.op.sum(part, [axis], keepdims=True))

        def rule(v: Any, s: Any) -> Any:
            norm = tirx.sqrt(s) if p == 2 else s
            return tirx.Select(norm == number(0, v), number(0, v), v / norm)

        return node.emit(rule, x, total)


class Softmax(Converter):
    """Before opset 13 over all dimensions from `axis` on, then over `axis` alone."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        return _along(node, lambda v: relax.op.nn.softmax(v, -1), relax.op.nn.softmax)


class LogSoftmax(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        return _along(node, lambda v: relax.op.nn.log_softmax(v, -1), relax.op.nn.log_softmax)


def _along(node: Node, flat: Any, whole: Any) -> Any:
    x = node.get(0)
    shape = shape_of(x)
    if node.opset >= 13:
        return whole(x, int(node.attr.get("axis", -1)) % max(1, len(shape)))
    axis = int(node.attr.get("axis", 1)) % max(1, len(shape))
    if axis == len(shape) - 1:
        return whole(x, axis)
    rows, columns = math.prod(shape[:axis]), math.prod(shape[axis:])
    two = node.do(relax.op.reshape(x, relax.ShapeExpr([rows, columns])))
    return relax.op.reshape(node.do(flat(two)), relax.ShapeExpr(shape))


def _explicit_pads(node: Node) -> None:
    """Replaces auto_pad by pads, which need only the spatial extents."""
    auto = node.text("auto_pad", "NOTSET")
    x, kernel = shape_of(node.get(0)), [int(k) for k in node.attr["kernel_shape"]]
    rank = len(kernel)
    strides = [int(s) for s in node.attr.get("strides", [1] * rank)]
    dilations = [int(d) for d in node.attr.get("dilations", [1] * rank)]
    if min([*kernel, *strides, *dilations]) < 1:
        raise node.wrong("a kernel, stride or dilation is below 1", "correct the attributes")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, k, s, d in zip(x[2:], kernel, strides, dilations, strict=True):
            total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            small, large = total // 2, total - total // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
        node.attr["pads"] = (*before, *after)
    node.attr["auto_pad"] = b"NOTSET"


class MaxPool(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        if node.outputs > 1:
            raise node.refuse("its second output, the indices, is used", "use the values alone")
        _explicit_pads(node)
        return onnx_frontend.MaxPool._impl_v1(node.bb, [node.get(0)], node.attr, [{}, {}])


class AveragePool(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        _explicit_pads(node)
        return onnx_frontend.AveragePool._impl_v1(node.bb, [node.get(0)], node.attr, [{}, {}])


class GlobalMaxPool(Converter):
    """Unlike ReduceMax, it passes over NaN."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        return node.compute(lambda x: greatest(x, 2), node.get(0))


class OneHot(Converter):
    """Values of their own type; an index outside the depth sets nothing."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        indices, depth, values = (node.get(i) for i in range(3))
        known = constant(depth)
        if known is None:
            raise node.refuse("its depth is not a constant", "make the depth a constant")
        size = int(known.reshape(-1)[0])
        rank = len(shape_of(indices))
        axis = int(node.attr.get("axis", -1)) % (rank + 1)

        def build(at: te.Tensor, v: te.Tensor) -> te.Tensor:
            def value(*i: Any) -> Any:
                place = tirx.Cast("int64", at(*i[:axis], *i[axis + 1 :]))
                place = place + tirx.Select(place < 0, number(size, place), number(0, place))
                hot = place == i[axis]
                return tirx.Select(hot, v(tirx.const(1, "int64")), v(tirx.const(0, "int64")))

            shape = [*at.shape[:axis], tirx.const(size, "int64"), *at.shape[axis:]]
            return te.compute(shape, value, name="one_hot")

        return node.compute(build, indices, values)


class SpaceToDepth(Converter):
    """Blocks to channels; mode CRD, of newer opsets, keeps the channel outermost."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        n, c, height, width = shape_of(x)
        b = int(node.attr["blocksize"])
        crd = node.text("mode", "DCR") == "CRD"

        def build(v: te.Tensor) -> te.Tensor:
            def value(*i: Any) -> Any:
                m, k, y, z = i
                if crd:
                    channel, block = tirx.floordiv(k, b * b), tirx.floormod(k, b * b)
                else:
                    channel, block = tirx.floormod(k, c), tirx.floordiv(k, c)
                down, right = tirx.floordiv(block, b), tirx.floormod(block, b)
                return v(m, channel, y * b + down, z * b + right)

            shape = [n, c * b * b, tirx.floordiv(height, b), tirx.floordiv(width, b)]
            return te.compute([tirx.convert(s) for s in shape], value, name="space_to_depth")

        return node.compute(build, x)


class Dropout(Converter):
    """Inference: the input, and a mask of ones in bool."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        if node.outputs == 1:
            return x
        mask = relax.op.full(relax.ShapeExpr(shape_of(x)), relax.const(True, "bool"), "bool")
        return relax.Tuple([x, node.do(mask)])


class TopK(Converter):
    """A sorted list of k per row, filled by insertion; the earlier of equal values comes first."""

    sizes = (1,)

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        k = node.dims(1)[0] if node.opset >= 10 else int(node.attr["k"])
        shape = node.symbols.shape(x)
        axis = int(node.attr.get("axis", -1)) % len(shape)
        rest = node.symbols.simple(shape[axis] - k)
        if isinstance(rest, int) and isinstance(k, int) and min(rest, k) < 0:
            raise node.wrong(f"k is {k} of {shape[axis]} values", "choose k within the axis")
        node.least([k], 0, "k")
        node.least([rest], 0, f"values beside the k = {spell(k)} first")
        largest = bool(node.attr.get("largest", 1))
        order = [a for a in range(len(shape)) if a != axis] + [axis]
        moved = axis != len(shape) - 1
        rows = node.do(relax.op.permute_dims(x, order)) if moved else x
        lead = [shape[a] for a in order[:-1]]
        kind = dtype_of(x)
        build = gpu_topk.top if node.symbols.gpu else top
        func = build(lead, shape[axis], k, kind, largest)
        types = [relax.TensorType([*lead, k], kind), relax.TensorType([*lead, k], "int64")]
        both = node.call(func, "topk", [rows], types)
        parts = [node.do(relax.TupleGetItem(both, i)) for i in range(2)]
        if moved:
            back = [order.index(a) for a in range(len(shape))]
            parts = [node.do(relax.op.permute_dims(p, back)) for p in parts]
        return relax.Tuple(parts)


class CumSum(Converter):
    """A running sum along a constant axis."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        known = constant(node.get(1))
        if known is None:
            raise node.refuse("its axis is not a constant", "make the axis a constant")
        shape = shape_of(x)
        axis = int(known.reshape(-1)[0]) % len(shape)
        exclusive = bool(node.attr.get("exclusive", 0))
        backward = bool(node.attr.get("reverse", 0))
        kind = dtype_of(x)
        if node.symbols.gpu:
            func = gpu_counted.cumulative(shape, axis, kind, exclusive, backward)
            return node.call(func, "cumsum", [x], relax.TensorType(shape, kind))
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("cumsum")
            T.func_attr({"tirx.noalias": True, "op_pattern": 8, "dcc.kernel": "cumsum"})
            source = T.arg("x", T.buffer(shape, kind))
            target = T.arg("y", T.buffer(shape, kind))

            def size(dims: list[Any]) -> Any:
                total: Any = tirx.const(1, "int64")
                for d in dims:
                    total = total * d
                return total

            outer, n, inner = size(shape[:axis]), size([shape[axis]]), size(shape[axis + 1 :])
            with T.sblock("root"):
                a = T.decl_buffer((outer * n * inner,), kind, data=tirx.buffer_data(source))
                b = T.decl_buffer((outer * n * inner,), kind, data=tirx.buffer_data(target))
                with T.serial(0, outer) as o, T.serial(0, inner) as j:
                    total = local(1, kind)
                    T.buffer_store(total, tirx.const(0, kind), [0])
                    with T.serial(0, n) as i:
                        step = n - 1 - i if backward else i
                        at = T.Bind((o * n + step) * inner + j)
                        value = T.Bind(a[at])
                        if exclusive:
                            T.buffer_store(b, total[0], [at])
                        T.buffer_store(total, total[0] + value, [0])
                        if not exclusive:
                            T.buffer_store(b, total[0], [at])
        return node.call(builder.get(), "cumsum", [x], relax.TensorType(shape, kind))


REDUCING = {
    c.__name__: c
    for c in (
        MaxPool, AveragePool, GlobalMaxPool, LayerNormalization, RMSNormalization, LpNormalization,
        Softmax, LogSoftmax, OneHot, SpaceToDepth, Dropout, TopK, CumSum,
    )
}  # fmt: skip
