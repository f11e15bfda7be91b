"""The geometry of a convolution as a GEMM: what its rows, columns and steps along K are.

Rows are output pixels in the order of C, columns the filters of a group, and K the channels of
every tap, taps in the order of the weights. K is cut into pieces, each of one tap and as wide as
one copy can be: 16, 8 or 4 bytes where channels are a multiple of that, else 4 bytes that are read
one by one, the last ones of a tap padded. What a thread has to know of a piece does not depend on
the row and is in a table in W: how far from the first tap it lies, and which taps it needs inside
of A. Each row has bits that say which taps are: x, then y, then z, of the dims that are padded.

    kernel 3x3, C = 64, pieces of 16:   0  1  2  3 | 4  5  6  7 | ...       | 32 33 34 35
    tap (ky, kx)                            (0, 0) |     (0, 1) | ...       |      (2, 2)

Where the taps of a row are one run of bytes of A, all inside, there is no table: K is that run.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

import numpy as np

from ...workload import Conv
from ._ir import ceil_div

__all__ = ["COUNT_BIT", "ROW_BIT", "Shape"]

ROW_BIT = 28  # of a row's bits: the row exists; 29 is never set
COUNT_BIT = 30  # of a piece: bytes of it less 1, where they are read one by one
_NEVER = 1 << 29
_FAR = -(1 << 30)  # a coordinate that is outside


class Shape:
    """What the loops of a convolution need to know of `work`.

    - linear: a row's taps are one run of bytes, all inside
    - uniform: bytes from the run of one row to that of the next, of linear ones; 0: not constant
    - unit: bytes of a piece; `single`: they are read one by one
    - run: bytes of K that are one after the other, padded to pieces, and `runs` their number
    - masked: rows have bits for taps; otherwise, kernels being too large, coordinates are compared
    """

    def __init__(self, work: Conv) -> None:
        self.work = work
        self.pixels = prod(work.outputs)
        self.image = prod(work.size) * work.channels
        ones = (1, 1, 1)
        self.padded = tuple(
            before > 0 or (outputs - 1) * stride - before + (kernel - 1) * dilation >= size
            for (before, _), outputs, stride, kernel, dilation, size in zip(
                work.pads,
                work.outputs,
                work.strides,
                work.kernel,
                work.dilations,
                work.size,
                strict=True,
            )
        )
        width = work.kernel[2]
        in_a_row = work.kernel[:2] == (1, 1) and work.groups == 1 and work.dilations[2] == 1
        self.linear = not any(self.padded) and (work.kernel == ones or in_a_row)
        same = not any(p for pair in work.pads for p in pair) and work.strides[:2] == (1, 1)
        own_row = width == work.size[2]  # then x has one output
        self.uniform = 0
        if self.linear and same and (own_row or (width == 1 and work.strides[2] == 1)):
            self.uniform = width * work.channels
        depth = work.group_channels * (width if self.linear else 1)
        common = np.gcd(work.group_channels, work.channels)
        self.unit = next((u for u in (16, 8, 4) if common % u == 0), 4)
        self.single = common % 4 != 0
        self.span = depth  # bytes of a run that are not padding
        self.run = ceil_div(depth, self.unit) * self.unit
        self.runs = 1 if self.linear else prod(work.kernel)
        self.depth = self.run * self.runs
        bits = sum(k for k, padded in zip(work.kernel, self.padded, strict=True) if padded)
        self.masked = bits <= ROW_BIT
        self.entry = 0 if self.linear else 8 if self.masked else 16

    @cached_property
    def taps(self) -> list[tuple[int, int, int]]:
        """Of every run the tap, as kz, ky, kx; (0, 0, 0) where the run is all of them."""
        return [(0, 0, 0)] if self.linear else list(np.ndindex(*self.work.kernel))

    def bit(self, dim: int, tap: int) -> int:
        """Which of a row's bits says that a tap of a padded dim (z, y, x: 0, 1, 2) is inside."""
        later = range(dim + 1, 3)
        return tap + sum(self.work.kernel[d] for d in later if self.padded[d])

    def table(self, pieces: int) -> np.ndarray:
        """Entries of the first pieces of K, those past its end needing what no row has.

        uint32 (pieces, 2): bytes from the first tap, what it needs. Or (pieces, 4): bytes; from
        the first tap along z; along y << 16 | along x; bytes of the piece.
        """
        out = np.zeros((pieces, self.entry // 4), np.int64)
        out[:] = (0, _NEVER) if self.masked else (0, _FAR, 0, 0)
        work = self.work
        each = self.run // self.unit
        for run, tap in enumerate(self.taps):
            z, y, x = (t * d for t, d in zip(tap, work.dilations, strict=True))
            start = ((z * work.size[1] + y) * work.size[2] + x) * work.channels
            need = 1 << ROW_BIT
            for dim in range(3):
                need |= (1 << self.bit(dim, tap[dim])) if self.padded[dim] else 0
            for i in range(each):
                at, count = i * self.unit, min(self.unit, self.span - i * self.unit)
                more = (count - 1) << COUNT_BIT if self.single else 0
                far = (z, y << 16 | x, count)
                out[run * each + i] = (start + at, *((need | more,) if self.masked else far))
        return out.astype(np.uint32)

    def reach(self, rows: int) -> int:
        """Largest distance in bytes between what `rows` rows one after the other read."""
        return ((rows - 1) // self.pixels + 2) * self.image
