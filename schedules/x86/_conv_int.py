"""What the integer convolution kernels share: the packed layout of W.

W holds, each part 64-byte aligned: the panels of every group; one value per filter (padded to
whole vectors) of: start s32, for every variant of border · scale f32 · bias f32; for every z, then
every y of the output the first tap inside, how many are, and the variant, s32; 64 bytes each, all
alike, of what equal layers do not share: zero point s16 · least and greatest code · a, b, c, low
and high of the residual f32 · A's zero point (all but start only where used).

    group 0: panel 0        panel 1        ...   last panel: the nr that are left; group 1: ...
    +-------------------+-------------------+
    | ky 0: kx*c/4: v0 .. v(nr-1) | ...     |    a vector: `lanes` filters x 4 channels
    +-------------------+-------------------+

A k-step reads 4 bytes of A. Where the bytes read at once (see Shape.span) are not a multiple of 4,
the last step reads the last 4 bytes again with weights 0 for those already used; from a copy of A
it reads on instead.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import INT8_LIMITS, Conv, ConvWeights
from ._conv_shape import Axis, Shape, ceil_div, touched
from ._dot import Dot

_FETCHED_BYTES = 64 << 10  # of weights or of A, C and R, from which on prefetching can matter
RESIDUAL = ("a", "b", "c", "shift", "low", "high")


@dataclass(frozen=True)
class Layout:
    """Where everything is in W: byte offsets. `vectors` of `lanes` filters per group.

    The last vector of a group has `tail` lanes: half a vector where that is enough, as it takes
    half the time.
    """

    lanes: int
    tail: int
    nr: int
    vectors: int
    step_bytes: int  # of one whole vector in one k-step
    group_bytes: int  # panels of a group
    row: int  # bytes of one value per filter of all groups
    start: int
    scale: int
    bias: int
    z_taps: int
    y_taps: int
    zero: int
    limits: int
    residual: int
    fill: int
    nbytes: int

    @property
    def panels(self) -> int:
        """Panels of a group."""
        return ceil_div(self.vectors, self.nr)


class IntegerConv(Dot, Kernel):
    """C = epilogue(A * B) for u8 A and s8 B; a vocabulary says how 4 bytes of A meet B."""

    @property
    def op(self) -> str:
        return "conv"

    def refuses(self, workload: Conv) -> str | None:
        if workload.a != "u8" or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 x s8"
        if self.seven_bits and workload.b_bits > 7:
            return "weights beyond +-64 overflow the 16-bit sums of products"
        return None

    def lanes(self, workload: Conv) -> int:
        """Filters per vector: half vectors where they hold a whole group."""
        return 8 if workload.filters // workload.groups <= 8 else self.bits // 32

    def weights_size(self, workload: Conv) -> tuple[int, int]:
        """Vectors of filters in a group; bytes of all weights, one each."""
        vectors = ceil_div(workload.filters // workload.groups, self.lanes(workload))
        return vectors, workload.groups * vectors * self.lanes(workload) * Shape(workload).steps * 4

    def tile(self, workload: Conv, pixels: Mapping[int, int]) -> tuple[int, int]:
        """(nr, mr) of equal panels of the fewest vectors; `pixels` has the mr of every nr."""
        vectors, _ = self.weights_size(workload)
        nr = ceil_div(vectors, ceil_div(vectors, max(pixels)))
        return nr, pixels[nr]

    def effect(self, workload: Conv, params: Any) -> Hashable:
        shape, (vectors, nbytes) = Shape(workload), self.weights_size(workload)
        pixels = shape.x.outputs
        mr = ceil_div(pixels, ceil_div(pixels, params.mr))
        # without a residual there is little to hide
        deferring = params.defer and shape.deferring(mr) and workload.residual is not None
        prefetching = params.prefetch and nbytes > _FETCHED_BYTES
        own = {"nr": min(params.nr, vectors), "defer": deferring, "prefetch": prefetching}
        panels, size = workload.groups * ceil_div(vectors, params.nr), touched(workload)
        strips = shape.copied and not shape.flat
        chunked = panels > 1 and params.chunk << 10 < size and not strips
        own["chunk"] = params.chunk if chunked else 0
        own["ahead"] = params.ahead and shape.flat and size > _FETCHED_BYTES
        return replace(params, mr=mr, **own)

    def estimate(self, workload: Conv, params: Any, machine: Machine) -> float:
        """Cycles of the k-steps and ends of a row of outputs, weights in the second-level cache."""
        shape, lanes = Shape(workload), self.lanes(workload)
        pixels, (vectors, _) = shape.x.outputs, self.weights_size(workload)
        blocks = ceil_div(pixels, params.mr)
        rows = pixels / blocks
        whole, rest = divmod(vectors, params.nr)

        def tile(nr: int) -> float:
            end = 20 + 2 * rows * nr * lanes / 8
            return end + shape.steps * self.step_cycles(rows, nr, lanes, params)

        return (whole * tile(params.nr) + (tile(rest) if rest else 0.0)) * blocks

    def layout(self, workload: Conv, params: Any) -> Layout:
        shape, lanes = Shape(workload), self.lanes(workload)
        vectors = ceil_div(workload.filters // workload.groups, lanes)
        filters = workload.filters // workload.groups
        tail = 8 if lanes == 16 and 0 < filters % 16 <= 8 else lanes
        step_bytes = self.encode(np.zeros((lanes, 4), np.int8), params).size
        group_bytes = ((vectors - 1) * step_bytes + step_bytes * tail // lanes) * shape.steps
        row = workload.groups * vectors * lanes * 4
        codes = workload.out in INT8_LIMITS
        sizes = (
            workload.groups * group_bytes,
            row * shape.variants,
            row if workload.out != "s32" else 0,
            row if workload.bias == "f32" else 0,
            *(0 if axis.whole else 12 * axis.outputs for axis in (shape.z, shape.y)),
            64 if codes and workload.shifted else 0,
            128 if codes and workload.clamped else 0,
            64 * len(RESIDUAL) if workload.residual else 0,
            64 if shape.copied and not shape.flat else 0,
        )
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + ceil_div(size, 64) * 64)
        return Layout(lanes, tail, params.nr, vectors, step_bytes, group_bytes, row, *offsets[1:])

    def pack(self, workload: Conv, weights: ConvWeights, params: Any) -> np.ndarray:
        shape, lay = Shape(workload), self.layout(workload, params)
        whole = shape.copied or all(axis.whole for axis in (shape.z, shape.y, shape.x))
        if weights.a_zero and not (workload.padded or whole):
            raise ValueError(f"{workload.describe()}: zero point {weights.a_zero}, not `padded`")
        out = np.zeros(lay.nbytes, np.uint8)
        at = 0
        for vectors in self._groups(workload, weights, shape, lay, params):
            for first in range(0, lay.vectors, lay.nr):
                panel = np.concatenate(vectors[first : first + lay.nr], axis=1).reshape(-1)
                out[at : at + panel.size] = panel
                at += panel.size

        def put(offset: int, values: Any, dtype: str) -> None:
            raw = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
            out[offset : offset + raw.size] = raw

        def filters(values: np.ndarray, dtype: str) -> np.ndarray:
            rows = np.zeros((workload.groups, lay.vectors * lay.lanes), dtype)
            rows[:, : workload.filters // workload.groups] = values.reshape(workload.groups, -1)
            return rows

        for i, start in enumerate(self._starts(workload, weights, shape)):
            put(lay.start + i * lay.row, filters(start, "int32"), "int32")
        if workload.out != "s32":
            assert weights.scale is not None
            put(lay.scale, filters(weights.scale, "float32"), "float32")
        if workload.bias == "f32":
            assert weights.bias is not None
            put(lay.bias, filters(weights.bias, "float32"), "float32")
        per_y = len(shape.x.classes)
        per_z = len(shape.y.classes) * per_y
        for offset, axis, stride in (
            (lay.z_taps, shape.z, per_z),
            (lay.y_taps, shape.y, per_y),
        ):
            if not axis.whole:
                put(offset, _taps(axis, stride), "int32")
        if workload.out in INT8_LIMITS:
            if workload.shifted:
                put(lay.zero, np.full(32, weights.zero_point), "int16")
            if workload.clamped:
                low, high = weights.clamp or INT8_LIMITS[workload.out]
                put(lay.limits, np.repeat((low & 255, high & 255), 64), "uint8")
        if workload.residual:
            assert weights.residual is not None
            numbers = [getattr(weights.residual, name) for name in RESIDUAL]
            put(lay.residual, np.repeat(np.array(numbers, np.float32), 16), "float32")
        if lay.fill < lay.nbytes:
            put(lay.fill, np.full(32 if self.staged else 64, weights.a_zero), _element(self.staged))
        return out

    def _groups(
        self, workload: Conv, weights: ConvWeights, shape: Shape, lay: Layout, params: Any
    ) -> Iterator[list[np.ndarray]]:
        """Per group a list of vectors, each uint8 (steps, bytes)."""
        count = workload.filters // workload.groups
        rows = weights.b.reshape(-1, shape.span, workload.filters)
        spans = len(rows)
        whole, rest = shape.span // 4 * 4, shape.span % 4
        end = whole + rest if shape.copied else shape.span_steps * 4
        for group in range(workload.groups):
            own = rows[:, :, group * count : (group + 1) * count]
            quads = np.zeros((spans, shape.span_steps * 4, lay.vectors * lay.lanes), np.int8)
            quads[:, :whole, :count] = own[:, :whole]
            if rest:
                quads[:, end - rest : end, :count] = own[:, whole:]
            quads = quads.reshape(shape.steps, 4, -1).transpose(0, 2, 1)
            ends = [lay.lanes * v for v in range(lay.vectors)] + [
                lay.lanes * (lay.vectors - 1) + lay.tail
            ]
            yield [
                self.encode(np.ascontiguousarray(quads[:, first:last]), params)
                for first, last in pairwise(ends)
            ]

    def _starts(self, workload: Conv, weights: ConvWeights, shape: Shape) -> Iterator[np.ndarray]:
        """Where the accumulators of every variant start, s32 (filters,) modulo 2**32."""
        base = np.zeros(workload.filters, np.int64)
        if workload.bias == "s32":
            assert weights.bias is not None
            base += weights.bias
        sums = weights.b.sum(axis=3, dtype=np.int64)  # kd, kh, kw, filters
        if not shape.classed:
            yield (base - weights.a_zero * sums.sum(axis=(0, 1, 2))).astype(np.int32)
            return
        for z, zs in shape.z.classes:
            for y, ys in shape.y.classes:
                for x, xs in shape.x.classes:
                    inside = sums[z : z + zs, y : y + ys, x : x + xs].sum(axis=(0, 1, 2))
                    yield (base - weights.a_zero * inside).astype(np.int32)

    def build(self, workload: Conv, params: Any, machine: Machine) -> Any:
        from ._conv_loops import Builder

        return Builder(self, workload, params).function()


def _element(staged: bool) -> str:
    """dtype of the copy of A that tiles read."""
    return "int16" if staged else "uint8"


def _taps(axis: Axis, stride: int) -> list[tuple[int, int, int]]:
    """Per output: first tap, number of taps, variant."""
    known = axis.classes
    return [(*taps, known.index(taps) * stride) for taps in map(axis.taps, range(axis.outputs))]
