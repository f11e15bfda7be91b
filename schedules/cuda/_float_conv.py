"""Float convolution as a product of gathered rows with packed weights, never written to memory.

Row p of A are the products' left factors of output pixel p: k = (tap, channel), channels of the
group. A block copies its part of them into shared memory: 16 bytes are 4 channels of one tap where
the channels are a multiple of 4, else 4 bytes are one (a first layer of 3 channels). A tap in the
padding is copied as zeros. What follows is the tile of a GEMM; W has the same k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ...workload import Conv, ConvWeights
from ._float_gemm import FloatProduct, Operands, Shape
from ._float_layout import Layout, pack
from ._float_loops import Output, each, flat
from ._ir import T, i64, local, tirx

__all__ = ["FloatConv"]


def _matrix(work: Conv) -> bool:
    """Whether A's pixels are the rows of a matrix as they are."""
    return prod(work.kernel) == prod(work.strides) == 1 and not any(map(any, work.pads))


class FloatConv(FloatProduct):
    """Of Conv workloads, grouped or not."""

    weights = "f32"

    def refuses(self, workload: Conv) -> str | None:
        if workload.dtypes != "f32f32f32":
            return f"operands are {workload.a} x {workload.b}, not f32 x f32"
        return None

    def shape(self, workload: Conv) -> Shape:
        pixels = prod(workload.outputs)
        m = None if workload.batch is None else workload.batch * pixels
        k = prod(workload.kernel) * workload.group_channels
        n = workload.filters // workload.groups
        return Shape(m, n, k, pixels, workload.groups, _matrix(workload))

    def pack(self, workload: Conv, weights: ConvWeights, params: Any) -> np.ndarray:
        lay = self.layout(workload, params)
        b = np.moveaxis(weights.b.reshape(lay.k, lay.groups, lay.n), 1, 0)
        return pack(lay, b, None, weights.bias)

    def operands(self, workload: Conv, lay: Layout) -> Operands:
        fixed, filters = workload.batch is not None, workload.filters
        batch = i64(workload.batch) if fixed else tirx.Var("batch", "int64")
        pixels = prod(workload.outputs)
        a = T.arg("a", T.buffer((batch, *workload.size, workload.channels), "float32"))
        w = T.arg("w", T.buffer((lay.nbytes,), "uint8"))
        shape = (batch, *workload.outputs, filters)
        r = T.arg("r", T.buffer(shape, "float32")) if workload.residual else None
        c = T.arg("c", T.buffer(shape, "float32"))
        m = i64(workload.batch * pixels) if fixed else batch * pixels

        def out(group: Any) -> Output:
            first, padded = group * lay.n, group * lay.columns
            return Output(workload, w, lay.scale, lay.bias, c, r, filters, lay.n, first, padded)

        def load(row: Any, k: Any) -> Any:
            at = tirx.Cast("int64", row) * workload.channels + k
            return a[0, 0, 0, 0, at]

        return Operands(m, load, lambda group: _Gather(workload, a, m, group), out)


@dataclass
class _Gather:
    """Taps of output pixels as the rows that a block copies from."""

    work: Conv
    a: Any
    rows: Any
    group: Any
    base: Any = None  # of a pass: the element of A at the pixel's first tap, if it were inside
    places: dict[int, Any] = field(default_factory=dict)  # of it, in dims with padding

    @property
    def width(self) -> int:
        whole = self.work.channels % 4 == 0 and self.work.group_channels % 4 == 0
        return 4 if whole else 1

    def prepare(self, passes: int, row: Callable[[Any], Any]) -> None:
        work = self.work
        self.base = local(passes, "int64")
        padded = [dim for dim in range(3) if any(work.pads[dim])]
        self.places = {dim: local(passes, "int32") for dim in padded}
        with each(passes) as index:
            rest = T.Bind(row(index))
            if _matrix(work):
                at = rest
            else:
                found = []
                for dim in (2, 1, 0):
                    size = work.outputs[dim]
                    found.append(T.Bind(tirx.Cast("int32", rest % size)) if size > 1 else 0)
                    rest = T.Bind(rest // size) if size > 1 else rest
                at = rest
                for dim in range(3):
                    place = found[2 - dim] * work.strides[dim] - work.pads[dim][0]
                    if dim in padded:
                        place = T.Bind(place)
                        T.buffer_store(self.places[dim], place, [index])
                    at = at * work.size[dim] + place
            first = self.group * work.group_channels
            T.buffer_store(self.base, at * work.channels + first, [index])

    def piece(self, index: Any, row: Any, k: Any) -> tuple[Any, Any]:
        work = self.work
        channels = work.group_channels
        inside = tirx.And(row < self.rows, k < prod(work.kernel) * channels)
        tap, offset = k // channels, 0
        taps = [tap // prod(work.kernel[d + 1 :]) % work.kernel[d] for d in range(3)]
        for dim in range(3):
            step = taps[dim] * work.dilations[dim] if work.kernel[dim] > 1 else 0
            offset = offset * work.size[dim] + step
            if dim in self.places:
                place = self.places[dim][index] + step
                inside = tirx.And(inside, tirx.And(place >= 0, place < work.size[dim]))
        at = self.base[index] + (offset * work.channels + k % channels)
        inside = T.Bind(inside)
        place = flat(self.a, tirx.Select(inside, at, i64(0)))
        return place, tirx.Select(inside, 4 * self.width, 0)
