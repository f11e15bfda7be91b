"""Group convolution u8 x s8 -> s32, dp4a.

C[y, x, g*F + f] = sum over ky, kx, c of A[y + ky, x + kx, g*G + c] * B[ky, kx, c, g*F + f]

dp4a adds 4 channels of a group times their weights. A thread has 4 or 8 filters for up to 8
outputs side by side: a word of A is loaded once for all taps of a row of the kernel and all its
filters, 16 bytes of weights once for all outputs. See `_groupconv` for groups that do not fit.

Of a 3x3 with 8 x 4 outputs a step of 4 channels and 3 taps takes, per warp and multiprocessor, 96
dp4a = 48 clocks, 10 loads of A and 3 of weights, 16 bytes a lane = 22 clocks of L1, and 130
instructions = 33 clocks: dp4a bound, 4 x 64 multiply-adds a clock.

Expected on an H100, not measured on a GPU: 132 multiprocessors at 1.755 GHz, 119 Top/s at most. An
output of G channels a group takes 9G/4 dp4a and about 8 instructions at its end; 4 a group are as
quick as 3.35 TB/s of memory bring 2 bytes for each. 64 images, u8 to u8: 56x56x128, 4 a group 31 us
= 59 Top/s, 28x28x256, 8 a group 22 us = 83. From 16 channels and filters a group on tensor cores
are far ahead, and the kernel leaves those to `conv_u8s8s32_mma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...machine import Machine
from ...workload import Conv, ConvWeights
from ._conv_epilogue import Constants, starts
from ._groupconv import GroupConv
from .conv_u8s8s32_mma import KERNEL as DENSE

_LARGE = 16  # channels and filters of a group from which on tensor cores are used well


@dataclass(frozen=True)
class Params:
    across: int = 8  # outputs of a thread, side by side
    quads: int = 1  # of 4 filters, of a thread
    deep: int = 1  # words of 4 channels loaded at once


class GroupConvDp4a(GroupConv):
    name = "groupconv_u8s8s32_dp4a"
    features = ("sm_80",)
    Params: Any = Params

    def refuses(self, workload: Conv) -> str | None:
        if workload.a != "u8" or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 x s8"
        each = workload.group_channels, workload.filters // workload.groups
        if (workload.groups == 1 or min(each) >= _LARGE) and DENSE.refuses(workload) is None:
            return f"groups of {each[0]} to {each[1]} channels, enough for tensor cores"
        return None

    def registers(self, params: Params) -> int:
        """Of rows of 3 taps: sums, weights, a column of A, values per filter, addresses."""
        filters = 4 * params.quads
        return filters * (params.across + 3 * params.deep + 3) + 4 * params.deep + 28

    def pack(self, workload: Conv, weights: ConvWeights, params: Params) -> np.ndarray:
        plan = self.plan(workload, params)
        constants = Constants(workload, plan.slots, plan.weight_bytes)
        out = np.zeros(constants.nbytes, np.uint8)
        out[: plan.weight_bytes] = plan.encode(weights.b)
        constants.pack(out, weights, plan.slots_of_filters(), starts(workload, weights))
        return out

    def build(self, workload: Conv, params: Params, machine: Machine) -> Any:
        from ._groupconv_loops import IntegerGrouped

        return IntegerGrouped(self.name, workload, self.plan(workload, params)).function()


KERNEL = GroupConvDp4a()
