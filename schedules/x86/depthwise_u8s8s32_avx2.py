"""Depthwise convolution u8 x s8 -> s32, AVX2, exact for all 8 bits of both operands.

The windows of depthwise_u8s8s32_avx512 on blocks of 32 channels, cells of 4 outputs in 16
registers. Zen 4 at 3.7 GHz, 1 thread, to u8: 28x28x192 34.6 us = 78 Gop/s, stride 2 10.7 us = 63;
5x5 28x28x240 88 us = 107; 3x3x3 8x14x14x256 263 us = 82.
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Conv
from .depthwise_u8s8s32_avx512 import Depthwise16, Params


class DepthwiseAvx2(Depthwise16):
    name = "depthwise_u8s8s32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {
        "pixels": (2, 4, 6),
        "strip_bytes": (16 << 10, 24 << 10, 40 << 10),
        "unroll": (4,),
    }
    bits = 256
    gops = 80.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        return Params(pixels=4)


KERNEL = DepthwiseAvx2()
