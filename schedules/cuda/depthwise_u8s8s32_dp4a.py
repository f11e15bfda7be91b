"""Depthwise convolution u8 x s8 -> s32, dp4a.

C[y, x, c] = sum over ky, kx of A[y + ky, x + kx, c] * B[ky, kx, c]

A thread has 4 to 16 channels of a few outputs side by side, and one below the other. Words of A,
4 channels of a pixel, are turned by byte permutes to windows of 4 rows of one channel (see
`_depthwise`); a column of A serves all taps of a row of the kernel, and pairs of output rows share
windows, so that 3x3 takes 3 dp4a an output and few permutes. Windows along the row instead of
down the column, as on x86, need 14 permutes for 16 outputs and row of A, this 8 a column.

Instructions for an output of 3x3, all of them, across x down x channels a thread:

                              stride 1                                  stride 2
    4 x 1 x 4    3 dp4a, 2.25 permutes, 1.1 loads: 21.1    3 dp4a, 3.4 permutes, 1.7 loads: 23.3
    4 x 2 x 4    3       1.5            0.75       17.4    3       3.4           1.4        20.5
    8 x 2 x 4    3       1.25           0.6        15.7                                     19.0
    4 x 2 x 8    3       1.5            0.4        15.5    3       3.4           0.7        18.0

of which 9 are the end of an output (see `_conv_epilogue`), 2 to 4 where a thread is and what it
loads once; 5x5 takes 7 to 12 more. Bytes extracted one by one, at 4 x 1 x 4, would take 9 multiply-
adds and 4.5 extractions where this takes 3 dp4a and 2.25 permutes. The compiler's PTX of 4 x 2 x 4
has 550 instructions for 32 outputs, 64 registers (CUDA 12.8, sm_80).

Expected on an H100, not measured on a GPU: 132 multiprocessors at 1.755 GHz start 128 instructions
of lanes a clock, at 15.5 an output 1.9 T outputs/s = 34 Top/s. An output moves 2 bytes (stride 2:
5), which 3.35 TB/s bring 1.68 T times a second: about equal where A and C come from memory, bound
by instructions where they are in L2. 56x56x144 of 64 images 21 us, of one image 0.4 us and what a
launch and its first loads take: its strips are small, so that all multiprocessors have some.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Conv, ConvWeights
from ._conv_epilogue import Constants, starts
from ._depthwise import Windows
from ._depthwise_strips import clocks

_ROOMY = 168  # registers with which 12 warps fit a multiprocessor


@dataclass(frozen=True)
class Params:
    across: int = 4  # outputs of a thread, side by side
    down: int = 2  # and one below the other
    words: int = 1  # of 4 channels, where these are a multiple


class DepthwiseDp4a(Kernel):
    name = "depthwise_u8s8s32_dp4a"
    features = ("sm_80",)
    Params: Any = Params
    SPACE: ClassVar = {"across": (1, 2, 4, 8), "down": (1, 2, 4), "words": (1, 2, 4)}

    @property
    def op(self) -> str:
        return "conv"

    def refuses(self, workload: Conv) -> str | None:
        if workload.a != "u8" or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 x s8"
        if not workload.depthwise:
            return f"{workload.groups} groups of {workload.channels} -> {workload.filters} channels"
        return None

    def registers(self, params: Params) -> int:
        """Of 3x3: weights, sums of 3 columns, a column of A and its windows, scales, addresses."""
        share = 2 if params.down > 1 else 1
        sums = min(params.across, 3) * params.down
        each = 3 * share + sums + 2
        rows = params.down + 2
        return 4 * params.words * each + (rows + 4) * params.words + 2 * rows + 30

    def plan(self, workload: Conv, params: Params) -> Windows:
        return Windows(workload, params.across, params.down, params.words)

    def default(self, workload: Conv, machine: Machine) -> Params:
        """The quickest of the space, as estimated."""
        points = (
            p
            for p in self.candidates(machine)
            if self.plan(workload, p).registers <= _ROOMY or p == Params(1, 1, 1)
        )
        best: Params = min(points, key=lambda p: self.estimate(workload, p, machine))
        return best

    def effect(self, workload: Conv, params: Params) -> Hashable:
        plan = self.plan(workload, params)
        return plan.across, plan.down, plan.words

    def estimate(self, workload: Conv, params: Params, machine: Machine) -> float:
        plan = self.plan(workload, params)
        return clocks(plan.strips, plan.instructions, machine)

    def pack(self, workload: Conv, weights: ConvWeights, params: Params) -> np.ndarray:
        plan = self.plan(workload, params)
        constants = Constants(workload, plan.slots, plan.weight_bytes)
        out = np.zeros(constants.nbytes, np.uint8)
        out[: plan.weight_bytes] = plan.encode(weights.b[:, :, :, 0])
        start = starts(workload, weights)
        constants.pack(out, weights, np.arange(workload.channels), start)
        return out

    def build(self, workload: Conv, params: Params, machine: Machine) -> Any:
        from ._depthwise_loops import Depthwise

        return Depthwise(self.name, workload, self.plan(workload, params)).function()


KERNEL = DepthwiseDp4a()
