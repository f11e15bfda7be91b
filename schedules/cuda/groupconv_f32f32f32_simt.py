"""Convolution of f32 with groups.

C[y, x, g*F + f] = activation(bias[g*F + f] + R[y, x, g*F + f]
    + sum over ky, kx, c of A[y + ky, x + kx, g*G + c] * B[ky, kx, c, g*F + f])

As `groupconv_u8s8s32_dp4a`, with one channel in a word instead of 4: a thread has 4 or 8 filters of
a group for up to 8 outputs side by side. A step of 3 taps and one channel takes, per warp and
multiprocessor and 8 x 4 outputs, 96 multiply-adds = 24 clocks, 10 loads of A and 3 of 16 bytes of
weights = 22 clocks of L1; of 4 channels in one load of A as many clocks of L1 for weights and A.

Expected on an H100, not measured on a GPU: at 128 multiply-adds a clock and multiprocessor 59
Tflop/s at most. Of G channels a group, an output takes 9G of them for 8 bytes of memory: bound by
memory below 4 channels a group, by arithmetic above. Groups of 64 and more channels and filters,
as a convolution with one group, are left to `conv_f32f32f32_simt`, which shares what it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...machine import Machine
from ...workload import Conv, ConvWeights
from ._depthwise_float import pack_floats
from ._groupconv import GroupConv
from .conv_f32f32f32_simt import KERNEL as DENSE

_LARGE = 64  # channels and filters of a group that fill a block's tile


@dataclass(frozen=True)
class Params:
    across: int = 8  # outputs of a thread, side by side
    quads: int = 1  # of 4 filters, of a thread
    deep: int = 4  # channels loaded at once, where they are a multiple


class GroupConvSimt(GroupConv):
    name = "groupconv_f32f32f32_simt"
    features = ("sm_80",)
    Params: Any = Params

    def refuses(self, workload: Conv) -> str | None:
        if workload.dtypes != "f32f32f32":
            return f"operands are {workload.a} x {workload.b}, not f32 x f32"
        each = workload.group_channels, workload.filters // workload.groups
        if (workload.groups == 1 or min(each) >= _LARGE) and DENSE.refuses(workload) is None:
            return f"groups of {each[0]} to {each[1]} channels, enough for tiles in shared memory"
        return None

    def registers(self, params: Params) -> int:
        """Of rows of 3 taps: sums, weights, a column of A, bias, addresses."""
        filters = 4 * params.quads
        return filters * (params.across + 3 * params.deep + 1) + 4 * params.deep + 28

    def pack(self, workload: Conv, weights: ConvWeights, params: Params) -> np.ndarray:
        plan = self.plan(workload, params)
        encoded = plan.encode(weights.b.astype(np.float32, copy=False))
        return pack_floats(workload, weights, encoded, plan.slots, plan.slots_of_filters())

    def build(self, workload: Conv, params: Params, machine: Machine) -> Any:
        from ._groupconv_loops import FloatGrouped

        return FloatGrouped(self.name, workload, self.plan(workload, params)).function()


KERNEL = GroupConvSimt()
