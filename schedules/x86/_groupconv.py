"""What the integer group convolutions share: how channels meet lanes, the packed layout, packing.

An operand of A is a few bytes of one pixel, repeated over a register. A lane of it is `unit`
channels, which the multiplier adds up; the operand has `span` groups of `parts` such lanes each.
A lane of an accumulator so stands for (filter, group, part):

    A operand        g0 p0 | g0 p1 | g1 p0 | g1 p1 | g0 p0 | g0 p1 | ...     span 2, parts 2
    weights, j       filter o(j, 0) of all groups  | filter o(j, 1) of ..    `unit` in a lane

The channels of small groups are contiguous in a pixel: one broadcasting load without a shuffle
feeds several groups; a block may be two such operands, for longer stores. With larger groups it
has one group and lanes are filters. The sums of 2
parts are added up at the end, two accumulators making one; a shuffle of the packed bytes then
brings the filters of several groups into order.

W holds, each part 64-byte aligned: weights [block][kd][kh][step][kw][vector] · base s32
[block][border class][vector], where accumulators start: bias - a_zero * the sum of the weights
whose taps are inside of A · scale f32 [block] · bias f32 [block] · zero point, its largest and its
least addend, 32 times s16 each · clamp: 64 times the least code, 64 times the largest. All but
weights and base only where used.

A block is the filters that one cell of the loops computes. The last one overlaps the one before
where the groups are no multiple of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import INT8_LIMITS, NUMPY, Conv, ConvWeights
from ._ir import T, bits

_MOST_TAPS = 9  # of a row of the kernel, whose code is unrolled
# Of a group. 3x3 at 14x14 with VNNI, in Gop/s, this and the general convolution: 16 a group 498 and
# 463, 32 (7x7) 561 and 417, 48 513 and 506, 64 515 and 512, but 1x1 of 64 a group 381 and 420.
_MOST_CHANNELS = 32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Scheme:
    """How a block of filters is computed with registers of `lanes` lanes."""

    lanes: int
    unit: int  # channels of A in a lane
    span: int  # groups in an operand of A
    parts: int  # lanes of an operand that belong to one group, 1 or 2
    vectors: int  # accumulators of a pixel
    group: int  # channels of a group
    filters: int  # of a group
    groups: int
    merged: int = 1  # groups of the workload in one of these
    operands: int = 1  # of A for a pixel and step, of neighbouring groups

    @property
    def steps(self) -> int:
        """Operands of A for all channels of a group."""
        return self.group // (self.unit * self.parts)

    @property
    def a_bytes(self) -> int:
        """Bytes of A in an operand."""
        return self.unit * self.span * self.parts

    @property
    def outputs(self) -> int:
        """Vectors of a pixel after the parts have been added up."""
        return self.vectors // self.parts

    @property
    def width(self) -> int:
        """Filters of a block."""
        return self.outputs * self.lanes

    @property
    def shares(self) -> int:
        """Blocks that share the channels of one group."""
        return max(1, self.filters // self.width)

    @property
    def blocks(self) -> int:
        return ceil_div(self.groups, self.together) * self.shares

    @property
    def together(self) -> int:
        """Groups of a block."""
        return self.span * self.operands

    def first_filter(self, block: int) -> int:
        group = min(block // self.shares * self.together, self.groups - self.together)
        return group * self.filters + block % self.shares * self.width

    def lane_filters(self) -> np.ndarray:
        """Filter within the block, of every lane of the accumulators: (vectors, lanes)."""
        vector, lane = np.ogrid[: self.vectors, : self.lanes]
        if self.span > 1:
            period, each = self.span * self.parts, self.vectors // self.operands
            group = vector // each * self.span + lane % period // self.parts
            return group * self.filters + vector % each * (self.lanes // period) + lane // period
        if self.parts == 1:
            return vector * self.lanes + lane
        # the order that adding up the parts brings into line
        return (vector // 2 * self.lanes) + lane // 4 * 4 + vector % 2 * 2 + lane % 4 // 2

    def order(self) -> np.ndarray:
        """Filter within the block, of every lane once the parts are added up, flat (width,)."""
        filters = self.lane_filters()
        if self.parts == 2:  # per 128 bits: two sums of the even vector, two of the odd one
            filters = filters[:, ::2].reshape(self.outputs, 2, -1, 2).transpose(0, 2, 1, 3)
        return filters.reshape(-1)


@dataclass(frozen=True)
class Border:
    """Taps of one dimension that are inside of A, per output: contiguous ranges of the kernel."""

    taps: tuple[tuple[int, int], ...]  # first and last + 1, per output
    first: int  # outputs first .. last have the same taps, all others are classes of their own
    last: int

    @staticmethod
    def of(work: Conv, dim: int) -> Border:
        size, kernel, pad = work.size[dim], work.kernel[dim], work.pads[dim][0]
        stride, dilation = work.strides[dim], work.dilations[dim]
        taps = []
        for x in range(work.outputs[dim]):
            at = x * stride - pad
            low = min(kernel, max(0, ceil_div(-at, dilation)))
            taps.append((low, max(low, min(kernel, ceil_div(size - at, dilation)))))
        middle = max(set(taps), key=taps.count)
        first = taps.index(middle)
        return Border(tuple(taps), first, first + taps.count(middle) - 1)

    @property
    def classes(self) -> int:
        return len(self.taps) - (self.last - self.first)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The taps of every class."""
        return [*self.taps[: self.first + 1], *self.taps[self.last + 1 :]]

    @property
    def least(self) -> int:
        """Taps that every output has."""
        return min(high - low for low, high in self.taps)


@dataclass(frozen=True)
class Layout:
    """Byte offsets of the parts of W."""

    scheme: Scheme
    borders: tuple[Border, Border, Border]
    classes: int
    vector_bytes: int  # of weights
    base: int
    scale: int
    bias: int
    zero: int
    clamp: int
    nbytes: int


class IntegerGroupConv(Kernel):
    """Group convolution u8 x s8; a subclass says how bytes of A meet weights."""

    gops: ClassVar[float]  # about the speed of one thread, for the choice to use more
    spread: ClassVar[float] = 2.0  # multiply-adds of a cell per task of the end of the one before

    # ---- the micro-kernel's vocabulary ----
    @abstractmethod
    def scheme(self, work: Conv, params: Any) -> Scheme | None:
        """How channels meet lanes; None where they do not."""

    @abstractmethod
    def encode(self, lanes: np.ndarray) -> np.ndarray:
        """s8 (..., unit) weights of lanes as uint8 (bytes,)."""

    @abstractmethod
    def a_operand(self, raw: Any, scheme: Scheme) -> Any:
        """The multiplier input made of the a_bytes uint8 of one pixel."""

    @abstractmethod
    def multiply_add(self, acc: Any, a: Any, w: Any, scheme: Scheme) -> Any:
        """acc int32xL plus the sums of products with a vector of weights, raw bytes."""

    # ---- Kernel ----
    @property
    def op(self) -> str:
        return "conv"

    def refuses(self, workload: Conv) -> str | None:
        if workload.a != "u8" or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 x s8"
        if workload.residual is not None:
            return "no residual sum"
        if workload.activation in ("sigmoid", "tanh"):
            return f"no activation {workload.activation}"
        if workload.groups == 1:
            return "one group"
        if min(workload.outputs) < 1:
            return "C is empty"
        if workload.kernel[2] > _MOST_TAPS:
            return f"rows of {workload.kernel[2]} taps, more than {_MOST_TAPS}"
        if self.scheme(workload, self.Params()) is None:
            each = f"{workload.group_channels} to {workload.filters // workload.groups}"
            return f"{workload.groups} groups of {each} channels"
        return None

    def effect(self, workload: Conv, params: Any) -> Hashable:
        scheme = self.scheme(workload, params)
        assert scheme is not None
        cells = ceil_div(workload.outputs[2], params.pixels)
        blocks = min(params.blocks, scheme.blocks)
        return cells, scheme.vectors, scheme.operands, blocks, params.overlap

    def estimate(self, workload: Conv, params: Any, machine: Machine) -> float:
        """Pixels computed, of tiles whose multiply-adds outnumber their loads."""
        scheme = self.scheme(workload, params)
        assert scheme is not None
        width = workload.outputs[2]
        cells = ceil_div(width, params.pixels)
        pixels = ceil_div(width, cells)
        macs = pixels * scheme.vectors * workload.kernel[2]
        loads = pixels * scheme.operands + workload.kernel[2] * scheme.vectors
        return cells * max(macs, loads, 4.0 * workload.kernel[2]) / scheme.outputs

    def layout(self, work: Conv, params: Any) -> Layout:
        scheme = self.scheme(work, params)
        assert scheme is not None
        borders = Border.of(work, 0), Border.of(work, 1), Border.of(work, 2)
        classes = prod(b.classes for b in borders) if work.padded else 1
        vector_bytes = self.encode(np.zeros((scheme.lanes, scheme.unit), np.int8)).size
        taps = prod(work.kernel) * scheme.steps
        row, codes = 4 * scheme.blocks * scheme.width, work.out in INT8_LIMITS
        offsets = [0]
        for size in (
            scheme.blocks * taps * scheme.vectors * vector_bytes,
            row * classes * scheme.parts,
            row if work.out != "s32" else 0,
            row if work.bias == "f32" else 0,
            192 if work.shifted and codes else 0,
            128 if work.clamped and codes else 0,
        ):
            offsets.append(ceil_div(offsets[-1] + size, 64) * 64)
        return Layout(scheme, borders, classes, vector_bytes, *offsets[1:])

    def pack(self, workload: Conv, weights: ConvWeights, params: Any) -> np.ndarray:
        lay = self.layout(workload, params)
        scheme = lay.scheme
        starts = [scheme.first_filter(block) for block in range(scheme.blocks)]
        order, lanes = scheme.order(), scheme.lane_filters()
        out = np.zeros(lay.nbytes, np.uint8)

        def put(offset: int, values: np.ndarray, dtype: str) -> None:
            raw = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
            out[offset : offset + raw.size] = raw

        def by_block(values: np.ndarray, filters: np.ndarray) -> np.ndarray:
            """(..., all filters) as (blocks, ..., *filters.shape)."""
            return np.stack([values[..., start + filters] for start in starts])

        b = _merge(workload, weights.b, scheme)  # kd, kh, kw, channels of a group, filters
        split = b.reshape(*workload.kernel, scheme.steps, scheme.parts, scheme.unit, -1)
        split = by_block(split, lanes)  # block, kd, kh, kw, step, part, unit, vector, lane
        part = np.arange(scheme.lanes) % scheme.parts
        split = np.moveaxis(split, 5, 0)[part, ..., np.arange(scheme.lanes)]
        # lane, block, kd, kh, kw, step, unit, vector
        split = split.transpose(1, 2, 3, 5, 4, 7, 0, 6)
        put(0, self.encode(np.ascontiguousarray(split)), "uint8")

        sums = b.astype(np.int64).sum(axis=3)
        base = np.zeros((lay.classes, workload.filters), np.int64)
        if not workload.padded:
            base[:] = -weights.a_zero * sums.sum(axis=(0, 1, 2))
        else:
            ranges = [[slice(*r) for r in border.ranges] for border in lay.borders]
            for number, (d, h, w) in enumerate(np.ndindex(*map(len, ranges))):
                inside = sums[ranges[0][d], ranges[1][h], ranges[2][w]]
                base[number] = -weights.a_zero * inside.sum(axis=(0, 1, 2))
        if workload.bias == "s32":
            assert weights.bias is not None
            base += weights.bias
        put(lay.base, by_block(base, lanes) * (part == 0), "int32")
        if workload.out != "s32":
            assert weights.scale is not None
            put(lay.scale, by_block(weights.scale, order), "float32")
        if workload.bias == "f32":
            assert weights.bias is not None
            put(lay.bias, by_block(weights.bias, order), "float32")
        if workload.out in INT8_LIMITS and workload.shifted:
            zero = weights.zero_point
            bounds = [zero, 2**15 - 1 - max(zero, 0), -(2**15) - min(zero, 0)]
            put(lay.zero, np.repeat(bounds, 32), "int16")
        if workload.out in INT8_LIMITS and workload.clamped:
            assert weights.clamp is not None
            put(lay.clamp, np.repeat(weights.clamp, 64), NUMPY[workload.out])
        return out

    def build(self, workload: Conv, params: Any, machine: Machine) -> Any:
        from ._groupconv_loops import Builder

        return Builder(self, workload, params).function()


def _merge(work: Conv, b: np.ndarray, scheme: Scheme) -> np.ndarray:
    """B as (kd, kh, kw, channels of a group, filters) of groups merged, with zeros between."""
    m = scheme.merged
    if m == 1:
        return b
    each = work.group_channels
    small = b.reshape(*work.kernel, each, scheme.groups, m, -1)
    big = np.zeros((*work.kernel, m, each, scheme.groups, m, small.shape[-1]), b.dtype)
    for i in range(m):
        big[:, :, :, i, :, :, i] = small[..., i, :]
    return big.reshape(*work.kernel, scheme.group, work.filters)


def merge_groups(work: Conv) -> tuple[int, int, int, int]:
    """Channels and filters of a group, groups, and how many were merged into one of them."""
    group, filters, groups = work.group_channels, work.filters // work.groups, work.groups
    if group == filters == 2 and groups % 2 == 0:
        return 4, 4, groups // 2, 2
    return group, filters, groups, 1


def one_group(
    lanes: int, unit: int, parts: int, vectors: int, sizes: tuple[int, int, int, int]
) -> Scheme | None:
    """Lanes are filters of one group, with up to `vectors` vectors of them at once."""
    group, filters, groups, merged = sizes
    if group % (unit * parts) or filters % lanes or max(group, filters) > _MOST_CHANNELS:
        return None
    while filters // lanes % vectors:
        vectors -= 1
    return Scheme(lanes, unit, 1, parts, vectors * parts, group, filters, groups, merged)


def repeated(raw: Any, count: int, size: int) -> Any:
    """`count` bytes, over and over, as uint8x(size)."""
    words = count // 4
    value = bits("int32" if words == 1 else f"int32x{words}", raw)
    if words == 1:
        return bits(f"uint8x{size}", T.broadcast(value, size // 4))
    return bits(f"uint8x{size}", T.Shuffle([value] * (size // count), list(range(size // 4))))


def pixels(width: int, choices: tuple[int, ...]) -> int:
    """The cell size that wastes least on a row of `width` pixels, the first of equals."""

    def computed(most: int) -> int:
        cells = ceil_div(width, most)
        return cells * ceil_div(width, cells)

    return min(choices, key=computed)
