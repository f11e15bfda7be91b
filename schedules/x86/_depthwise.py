"""What the integer depthwise kernels share: geometry, the packed layout of W.

A row of A is turned once into windows, vectors in which every dword holds some neighbouring columns
of a channel, which the dot product instructions take (see _depthwise_loops for their order):

    u8, 4 columns:   c0: x0 x1 x2 x3 | c1: x0 x1 x2 x3 | ..      outputs x0 (weights w0 w1 w2 0)
    u16, 2 columns:  c0: x0    x1    | c1: x0    x1    | ..      and x1 (0 w0 w1 w2) share them

Channels are taken in blocks of V = 64, 32 or 16 bytes, the last block overlapping the one before
where it must. W holds per block, each part 64-byte aligned:

    weights    [quarter][kd][kh][step][share] vectors of V bytes
    start s32, scale f32, bias f32    4 vectors of V bytes each, by quarter (the last two if used)

and after the blocks 64 bytes each, all alike, of what equal layers do not share: A's zero point as
it is in A, and in windows; C's zero point s16, least and greatest code; and kd s32.

A quarter is what byte and word unpacking leave in one vector: of every 16 neighbouring channels 4,

    quarter q, dword i:   channel 16 * (i / 4) + 4 * q + i % 4

which packing s32 to s16 to 8 bits puts in order again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import INT8_LIMITS, Conv, ConvWeights

# Numbers of a layer in W, 64 bytes each.
BLANK, BLANK_WINDOW, ZERO, LEAST, GREATEST, DEPTH = range(6)
COMMON = 6


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def even(total: int, most: int, unit: int) -> int:
    """The least multiple of `unit` that covers `total` in as few parts of at most `most`."""
    parts = ceil_div(total, most)
    return ceil_div(ceil_div(total, parts), unit) * unit


@dataclass(frozen=True)
class Block:
    """`count` blocks of `width` channels from `channel` on; a block has `bytes` of W from `at`."""

    width: int
    channel: int
    count: int
    at: int
    bytes: int


class Plan:
    """The geometry of a workload: windows of `taps` columns, strips, rows kept unpacked.

    A window is `taps` columns, side by side (dilated as the kernel is), in one dword per channel.
    `share` neighbouring outputs use the same windows, each with weights of its own. A strip is
    `strip` columns of C; of it the last `ring` rows of A are kept as windows, for every kd.
    """

    def __init__(self, work: Conv, taps: int, most_bytes: int, widest: int) -> None:
        self.work, self.taps, self.widest = work, taps, widest
        (self.kd, self.kh, self.kw) = work.kernel
        self.sd, self.sh, self.sw = work.strides
        self.dd, self.dh, self.dw = work.dilations
        self.front, self.top, self.left = (before for before, _ in work.pads)
        self.od, self.oh, self.ow = work.outputs
        self.steps = ceil_div(self.kw, taps)  # windows per output and kernel row
        self.share = 1
        if self.sw == self.dw == 1:
            while self.share < taps and self._steps_of(2 * self.share) == self.steps:
                self.share *= 2
        # columns from one window to the next; windows from one step to the next
        self.pitch = self.sw * self.share
        reach = taps * self.dw
        self.chained = self.steps == 1 or reach % self.pitch == 0
        self.hop = reach // self.pitch if self.chained else 1
        # Where every output has windows of its own, only the pairs of columns they are made of are
        # stored: 2 vectors to a window instead of 4, joined when used.
        self.next_pair, odd = divmod(2 * self.dw, self.pitch)
        self.paired = taps == 4 and self.share == 1 and self.chained and not odd
        self.stored = 2 if self.paired else 4  # vectors per window
        self.ring = (self.kh - 1) * self.dh + 1
        # rows of A that the next row of C needs for the first time
        self.fresh = min(self.sh, self.ring)
        self.slots = self.ring + self.fresh
        slots = self.kd * self.slots * self.stored * widest
        longest = most_bytes // slots
        if self.chained:
            longest -= (self.steps - 1) * self.hop
        else:
            longest //= self.steps
        self.strip = even(self.ow, max(longest, 4) * self.share, self.share)
        self.strip = min(self.strip, self.ow)
        if self.inner == (0, 0):
            self.strip = self.ow
            del self.inner, self.windows
        self.strips = ceil_div(self.ow, self.strip)

    def cell(self, pixels: int) -> int:
        """Outputs of equal cells of at most about `pixels`."""
        cells = ceil_div(self.strip, pixels)
        return ceil_div(ceil_div(self.strip, cells), self.share) * self.share

    def _steps_of(self, share: int) -> int:
        return ceil_div(self.kw + share - 1, self.taps)

    @cached_property
    def windows(self) -> int:
        """Windows of a row of a strip."""
        groups = ceil_div(self.strip, self.share)
        if self.chained:
            return groups + (self.steps - 1) * self.hop + (self.next_pair if self.paired else 0)
        return groups * self.steps

    @cached_property
    def inner(self) -> tuple[int, int]:
        """The first window that lies in A in every strip, and the one after the last."""
        width = self.work.size[2]
        last = (self.ow - self.strip) * self.sw
        inside = [
            w
            for w in range(0, self.windows)
            if all(0 <= c - self.left and last + c - self.left < width for c in self.columns(w))
        ]
        if not self.chained:
            whole = [w - w % self.steps for w in inside]
            inside = [w for w in inside if whole.count(w - w % self.steps) == self.steps]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def window(self, group: Any, step: int) -> Any:
        """The window of a group of outputs (of `share` each) and a step of taps."""
        return group + step * self.hop if self.chained else group * self.steps + step

    def columns(self, window: int) -> list[int]:
        """Columns of a window, from the first column of the strip's first window on."""
        first = window * self.pitch
        if not self.chained:
            group, step = divmod(window, self.steps)
            first = group * self.pitch + step * self.taps * self.dw
        return [first + t * self.dw for t in range(2 if self.paired else self.taps)]

    def tap(self, step: int, slot: int, place: int) -> int | None:
        """kw of a slot of the window of a step, for the output at `place` of its group."""
        k = step * self.taps + slot - place
        return k if 0 <= k < self.kw else None

    def used(self, step: int, place: int) -> bool:
        return any(self.tap(step, t, place) is not None for t in range(self.taps))

    def vectors(self) -> int:
        """Vectors of weights of a quarter."""
        return self.kd * self.kh * self.steps * self.share

    def vector(self, kd: int, kh: int, step: int, place: int) -> int:
        return ((kd * self.kh + kh) * self.steps + step) * self.share + place


class Depthwise(Kernel):
    """C = epilogue(A * B), every channel by itself; a subclass says how windows are made."""

    taps: ClassVar[int]  # columns of a window
    bits: ClassVar[int]  # widest vector
    gops: ClassVar[float]  # about the speed of one thread, for the choice to use more

    @property
    def op(self) -> str:
        return "conv"

    def refuses(self, workload: Conv) -> str | None:
        if workload.a != "u8" or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 x s8"
        if not workload.depthwise:
            return f"{workload.groups} groups of {workload.channels} -> {workload.filters} channels"
        if workload.residual is not None:
            return "a residual is not added"
        return None

    def registers(self, params: Any) -> int:
        return 2 * params.pixels + 4

    def effect(self, workload: Conv, params: Any) -> Hashable:
        plan = self.plan(workload, params)
        begin, stop = plan.inner
        unroll = min(params.unroll * (1 if plan.chained else plan.steps), stop - begin)
        return plan.strip, plan.cell(params.pixels), unroll

    # ---- the vocabulary of an instruction set ----
    @abstractmethod
    def encode(self, windows: np.ndarray) -> np.ndarray:
        """s8 (..., taps) weights of windows as uint8 (..., 4)."""

    @abstractmethod
    def windows(
        self, columns: list[int], pixel: Callable[[int], Any], made: dict[Any, Any], width: int
    ) -> list[Any]:
        """What the ring holds of a window: vectors int8x`width`.

        `pixel` gives a column, int8x`width`; `made` keeps what several windows share.
        """

    @abstractmethod
    def multiply_add(self, acc: Any, window: Any, weight: Any, width: int) -> Any:
        """acc s32 plus the sums of the products of a quarter of a window, both int8x`width`."""

    # ---- geometry and packing ----

    def plan(self, workload: Conv, params: Any) -> Plan:
        return Plan(workload, self.taps, params.strip_bytes, self.bits // 8)

    def layout(self, workload: Conv, plan: Plan, width: int) -> tuple[int, int, int, int]:
        """Offsets in a block of `width` channels of start, scale, bias, and its end."""
        at = 4 * width * plan.vectors()
        offsets = [at]
        for used in (True, workload.out != "s32", workload.bias == "f32"):
            offsets.append(offsets[-1] + (4 * width if used else 0))
        return offsets[0], offsets[1], offsets[2], offsets[3]

    def blocks(self, workload: Conv, plan: Plan) -> list[Block]:
        """All channels in blocks, wide ones first."""
        channels, widest = workload.channels, self.bits // 8
        out: list[Block] = []
        at = 0

        def add(width: int, channel: int, count: int) -> None:
            nonlocal at
            size = self.layout(workload, plan, width)[3]
            out.append(Block(width, channel, count, at, size))
            at += size * count

        whole = channels // widest
        if whole:
            add(widest, 0, whole)
        done = whole * widest
        while done < channels:
            rest = channels - done
            fits = [w for w in (16, 32, 64) if w <= widest]
            width = next((w for w in fits if w >= rest), 0)
            if width == 64 and channels < 64:
                width = 32
            width = width or 32
            channel = max(0, min(done, channels - width))
            add(width, channel, 1)
            done = channel + width
        return out

    def constants(self, workload: Conv, plan: Plan) -> int:
        """Offset of the numbers of the layer in W."""
        last = self.blocks(workload, plan)[-1]
        return ceil_div(last.at + last.bytes * last.count, 64) * 64

    def pack(self, workload: Conv, weights: ConvWeights, params: Any) -> np.ndarray:
        plan = self.plan(workload, params)
        end = self.constants(workload, plan)
        out = np.zeros(end + 64 * COMMON, np.uint8)
        b = weights.b[:, :, :, 0]  # kd, kh, kw, channels
        windows = np.zeros((plan.vectors(), workload.channels, plan.taps), np.int8)
        for kd, kh, step, place in np.ndindex(plan.kd, plan.kh, plan.steps, plan.share):
            for slot in range(plan.taps):
                k = plan.tap(step, slot, place)
                if k is not None:
                    windows[plan.vector(kd, kh, step, place), :, slot] = b[kd, kh, k]
        encoded = self.encode(windows)
        start = -weights.a_zero * b.sum(axis=(0, 1, 2), dtype=np.int64)
        if workload.bias == "s32":
            assert weights.bias is not None
            start = start + weights.bias
        rows = [start.astype(np.int32)]
        if workload.out != "s32":
            assert weights.scale is not None
            rows.append(weights.scale.astype(np.float32))
        if workload.bias == "f32":
            assert weights.bias is not None
            rows.append(weights.bias.astype(np.float32))
        added = [row.view(np.uint8).reshape(1, -1, 4) for row in rows]
        dwords = np.concatenate([encoded, *added])  # vectors, channels, 4
        for block in self.blocks(workload, plan):
            for i in range(block.count):
                channel = block.channel + i * block.width
                part = np.zeros((len(dwords), block.width, 4), np.uint8)
                own = dwords[:, channel : channel + block.width]
                part[:, : own.shape[1]] = own
                # 16-byte lane, quarter, channel of the quarter
                part = part.reshape(len(part), block.width // 16, 4, 4, 4).transpose(2, 0, 1, 3, 4)
                count = plan.vectors()
                at = block.at + i * block.bytes
                for piece in (part[:, :count], *part[:, count:].swapaxes(0, 1)):
                    raw = np.ascontiguousarray(piece).reshape(-1)
                    out[at : at + raw.size] = raw
                    at += raw.size
        low, high = weights.clamp or INT8_LIMITS.get(workload.out, (0, 0))
        for number, value, dtype in (
            (BLANK, weights.a_zero, np.uint8),
            (BLANK_WINDOW, weights.a_zero, np.uint8 if self.taps == 4 else np.uint16),
            (ZERO, weights.zero_point, np.int16),
            (LEAST, low & 255, np.uint8),
            (GREATEST, high & 255, np.uint8),
            (DEPTH, plan.kd, np.int32),
        ):
            at = end + 64 * number
            out[at : at + 64] = np.full(64 // np.dtype(dtype).itemsize, value, dtype).view(np.uint8)
        return out

    def build(self, workload: Conv, params: Any, machine: Machine) -> Any:
        from ._depthwise_loops import Builder

        return Builder(self, workload, params).function()
