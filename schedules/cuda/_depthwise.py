"""Depthwise convolution of bytes: windows of rows, what a thread computes, the layout of W.

The 4 bytes of a word of A are 4 channels of a pixel; dp4a wants 4 taps of one channel. A window
is up to 4 rows of one column, turned into one word per channel:

    row 0   c0 c1 c2 c3                          c0: r0 r1 r2 r3
    row 1   c0 c1 c2 c3   4 permutes of pairs    c1: r0 r1 r2 r3
    row 2   c0 c1 c2 c3   ----------------->     c2: ..
    row 3   c0 c1 c2 c3   4 of pairs of pairs    c3: ..

It is made once for all taps of a row of the kernel that meet the column. `share` outputs, one
below the other, use the same windows, each with weights of its own: w0 w1 w2 0 and 0 w0 w1 w2.
Windows of 2 rows are left as pairs of channels, of 1 row as they are, the other bytes of the
weights are 0; they take 2 and no permutes.

W: [part of the kernel][column of the part][use][channel] 4 bytes of weights, a use being a window
and one of the outputs that share it; then what `_conv_epilogue` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from ...workload import Conv
from ._depthwise_strips import Strips, chunk
from ._ir import ceil_div

__all__ = ["Use", "Windows"]

_ROWS, _COLUMNS = 8, 9  # of a part of the kernel, at most
_PERMUTES = {1: 0, 2: 2, 3: 6, 4: 8}  # of a window of so many rows


@dataclass(frozen=True)
class Use:
    """What an output, number `place` of those that share, does with a window.

    `rows` are those of the window, from the first row of the outputs on; `taps` the row of the
    kernel that each is for the output, -1: none.
    """

    window: int
    place: int
    rows: tuple[int, ...]
    taps: tuple[int, ...]


class Windows:
    """How the kernel of a workload is cut, for strips of `across` x `down` outputs.

    The kernel is taken in equal parts of `part` rows and columns, a plane at a time, in a loop.
    """

    def __init__(self, work: Conv, across: int, down: int, words: int) -> None:
        self.work = work
        self.across = min(across, work.outputs[2])
        self.down = min(down, work.outputs[1])
        self.words = max(w for w in (1, 2, 4) if w <= words and (w == 1 or self._whole(w)))
        self.part = chunk(work.kernel[1], _ROWS), chunk(work.kernel[2], _COLUMNS)
        shares = [s for s in range(1, self.down + 1) if self.down % s == 0]
        least = ceil_div(self.part[0], 4)
        shares = [s for s in shares if len(self._cut(s)) == least]
        self.share = min(shares, key=lambda s: (self._permutes(s) / s, s))
        self.windows = self._cut(self.share)

    def _whole(self, words: int) -> bool:
        return self.work.channels % (4 * words) == 0

    def _cut(self, share: int) -> list[tuple[int, ...]]:
        """The rows that `share` outputs need, by fours."""
        stride, dilation = self.work.strides[1], self.work.dilations[1]
        rows = sorted(
            {p * stride + k * dilation for p in range(share) for k in range(self.part[0])}
        )
        return [tuple(rows[i : i + 4]) for i in range(0, len(rows), 4)]

    def _permutes(self, share: int) -> int:
        return sum(_PERMUTES[len(rows)] for rows in self._cut(share))

    @cached_property
    def uses(self) -> list[Use]:
        """Of a column of the kernel."""
        stride, dilation = self.work.strides[1], self.work.dilations[1]
        known = {k * dilation: k for k in range(self.part[0])}
        out = []
        for place in range(self.share):
            for window, rows in enumerate(self.windows):
                taps = tuple(known.get(row - place * stride, -1) for row in rows)
                if max(taps) >= 0:
                    out.append(Use(window, place, rows, taps))
        return out

    @cached_property
    def columns(self) -> dict[int, list[tuple[int, int]]]:
        """For every column of A that a part needs: the outputs, and what tap it is for them."""
        stride, dilation = self.work.strides[2], self.work.dilations[2]
        out: dict[int, list[tuple[int, int]]] = {}
        for x in range(self.across):
            for k in range(self.part[1]):
                out.setdefault(x * stride + k * dilation, []).append((x, k))
        return dict(sorted(out.items()))

    @property
    def parts(self) -> tuple[int, int, int]:
        """Parts of the kernel, by dimension."""
        kd, kh, kw = self.work.kernel
        return kd, kh // self.part[0], kw // self.part[1]

    @property
    def channels(self) -> int:
        """Of a thread."""
        return 4 * self.words

    @property
    def strips(self) -> Strips:
        units = ceil_div(self.work.channels, self.channels)
        return Strips(self.work, self.across, self.down, units)

    @property
    def slots(self) -> int:
        """Channels in W."""
        return self.strips.units * self.channels

    @property
    def column_bytes(self) -> int:
        """Of W, for a column of a part."""
        return 4 * len(self.uses) * self.slots

    @property
    def weight_bytes(self) -> int:
        return prod(self.parts) * self.part[1] * self.column_bytes

    @property
    def registers(self) -> int:
        """Of a thread, at most: weights, sums, a column of A, its windows, and the rest."""
        weights = self.part[1] * len(self.uses) * self.channels
        whole = prod(self.parts) > 1 or self.part[1] > self.across
        sums = self.across if whole else self.part[1]
        pixels = self.down * self.work.strides[1] + self.part[0] + 4
        return weights + (sums * self.down + 3) * self.channels + pixels * self.words + 20

    @property
    def instructions(self) -> float:
        """Of a thread, about: loads, permutes, dp4a, and the end of every output."""
        groups = self.down // self.share
        rows = len(
            {
                g * self.share * self.work.strides[1] + r
                for g in range(groups)
                for window in self.windows
                for r in window
            }
        )
        outputs = self.across * self.down * self.channels
        column = 2 * rows + groups * self._permutes(self.share) * self.words
        products = len(self.uses) * groups * self.across * self.part[1] * self.channels
        loads = self.part[1] * len(self.uses) * self.words
        part = len(self.columns) * column + products + loads + 10
        each = 9 + (7 if self.work.residual is not None else 0)
        return prod(self.parts) * part + each * outputs + 60

    def encode(self, b: np.ndarray) -> np.ndarray:
        """W's weights of B (kd, kh, kw, channels)."""
        nd, nh, nw = self.parts
        high, wide = self.part
        cut = b.reshape(nd, nh, high, nw, wide, -1).transpose(0, 1, 3, 4, 2, 5)
        cut = cut.reshape(nd * nh * nw, wide, high, -1)
        out = np.zeros((len(cut), wide, len(self.uses), self.slots, 4), np.int8)
        channels = b.shape[-1]
        for n, use in enumerate(self.uses):
            for i, tap in enumerate(use.taps):
                if tap < 0:
                    continue
                for lane in range(min(4, channels)):
                    byte = {1: lane, 2: 2 * (lane % 2) + i}.get(len(use.rows), i)
                    out[:, :, n, lane:channels:4, byte] = cut[:, :, tap, lane::4]
        return out.view(np.uint8).reshape(-1)
