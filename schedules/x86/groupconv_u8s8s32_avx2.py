"""Group convolution u8 x s8 -> s32, AVX2, exact for all 8 bits of both operands.

The micro-kernel of groupconv_u8s8s32_avx512 on 8 lanes and 16 registers: 14 accumulators, an
operand of A and a product; weights are read from memory where they are used. The end of a cell
overlaps the next one only where that gains most, 10 % at 4 a group: its sums wait on the stack,
and stores there were seen to collide with loads of A 4 KB apart, at twice the time.

1 thread of Zen 4 at 3.7 GHz, u8 to u8, 3x3, Gop/s with taps in the padding (vpmaddwd alone: 237):

    56x56x128, 4 a group    217 us  133      56x56x256 /2, 8 a group    230 us  125
    28x28x256, 8            196     147      28x28x512 /2, 16           205     141
    14x14x512, 16           176     164      14x14x1024 /2, 32          187     155
    7x7x1024, 32            154     188      56x56x64, 2                120      60
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Conv
from ._groupconv import pixels
from .groupconv_u8s8s32_avx512 import GroupConv16, Params


class GroupConvAvx2(GroupConv16):
    name = "groupconv_u8s8s32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {
        "pixels": (4, 5, 6, 7),
        "vectors": (1, 2),
        "blocks": (4, 8, 16),
        "overlap": (True, False),
    }
    lanes = 8
    gops = 160.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        overlap = workload.filters // workload.groups <= 4 and workload.strides[2] == 1
        return Params(pixels(workload.outputs[2], (7, 6, 5)), 1, 8, overlap)


KERNEL = GroupConvAvx2()
