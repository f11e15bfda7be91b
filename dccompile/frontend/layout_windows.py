"""Rules of `layout` for pools and means: windows over the pixels of an image, or all of them."""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from .convolutions import DOMAIN
from .editor import attribute, operand
from .forms import Forms, drop_attribute, moved_axis, set_attribute, turn
from .quantized import INT8, Refused
from .windows import Geometry, geometry

POOL = "DccPool"  # see `pooling`
GLOBAL = ("GlobalAveragePool", "GlobalMaxPool")


class Windows(Forms):
    """Each rule tells whether it rewrote the node."""

    def reduce(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self.is_last(x):
            return False
        rank, axes = self.rank(x), attribute(node, "axes")
        if operand(node, 1):
            value = self.editor.constant(node.input[1])
            axes = None if value is None else [int(a) for a in value.reshape(-1)]
        if not axes:
            return False
        axes = sorted(a % rank for a in axes)
        keep = attribute(node, "keepdims", 1)
        if keep and node.op_type == "ReduceMean" and axes == [*range(2, rank)]:
            if self.integer_mean(node, self.whole(x)):
                return True
        if not keep and axes not in ([*range(2, rank)], [*range(1, rank)]):
            return False
        moved = sorted(moved_axis(a, rank) for a in axes)
        output = self.made(node.output[0]) if keep else node.output[0]
        self.reduction(node, self.as_last(x), moved, output)
        return True

    def reduction(self, node: NodeProto, x: str, axes: list[int], output: str) -> None:
        new = self.copy(node, [x], [output])
        if self.editor.opset() >= (13 if node.op_type == "ReduceSum" else 18):
            drop_attribute(new, "axes")
            name = self.editor.add_constant(np.asarray(axes, np.int64), f"{node.name}_axes")
            new.input.append(name)
        else:
            set_attribute(new, "axes", axes)

    def whole_image(self, node: NodeProto) -> bool:
        x = node.input[0]
        if not self.is_last(x):
            return False
        where = self.whole(x)
        if node.op_type == "GlobalMaxPool":  # unlike ReduceMax, it passes over NaN
            if where is None:
                return False
            output, sizes = self.made(node.output[0]), [1, 1, 1]
            self.new.append(self.pooling(node, self.as_last(x), output, "GlobalMax", where, sizes))
            return True
        if self.integer_mean(node, where):
            return True
        axes = [*range(1, self.rank(x) - 1)]
        node.op_type = "ReduceMean"
        set_attribute(node, "keepdims", 1)
        self.reduction(node, self.as_last(x), axes, self.made(node.output[0]))
        return True

    def pool(self, node: NodeProto) -> bool:
        x = node.input[0]
        shape, result = self.editor.shape(x), self.editor.shape(node.output[0])
        if not self.is_last(x) or len(node.output) > 1 or shape is None or result is None:
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
            if all(whole) and self.integer_mean(node, where):
                return True
        output = self.made(node.output[0])
        self.new.append(self.pooling(node, self.as_last(x), output, node.op_type, where, sizes))
        if inside:
            set_attribute(self.new[-1], "count_include_pad", inside)
        return True

    def pooling(
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

    def whole(self, x: str) -> Geometry | None:
        """A window over all of a value's pixels."""
        shape = self.editor.shape(x)
        assert shape is not None
        try:
            return geometry(NodeProto(), list(shape[2:]), tuple(shape[2:]))  # type: ignore[arg-type]
        except Refused:
            return None

    def integer_mean(self, node: NodeProto, where: Geometry | None) -> bool:
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
        editor.set_type(total, TensorProto.INT32, turn(shape))
        sizes = [1] * (5 - len(shape)) + [int(d) for d in shape[2:]]  # type: ignore[arg-type]
        source = self.as_last(back.input[0])
        self.new.append(self.pooling(node, source, total, "Sum", where, sizes))
        set_attribute(self.new[-1], "fill", int(zero))
        numbers = [
            editor.add_constant(np.asarray(scale / np.float32(count)), f"{node.name}_scale"),
            editor.add_constant(np.asarray(count * int(zero), np.int32), f"{node.name}_zero"),
        ]
        output = self.made(node.output[0])
        self.new.append(editor.node("DequantizeLinear", [total, *numbers], node, output=output))
        return True
