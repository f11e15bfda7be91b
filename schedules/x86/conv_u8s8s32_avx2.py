"""Convolution u8 x s8 -> s32, AVX2, exact for all 8 bits of both operands.

The micro-kernel of conv_u8s8s32_avx512 on 8 filters per vector and 16 registers. Zen 4 at 3.7 GHz,
1 thread, to u8; limit 237 Gop/s: 3x3 56x56x64 1292 us = 175, 7x7x512 1216 us = 156, 1x1 56x56
256->64 620 us = 166, 64->256 + residual 713 us = 144 with 5x2 tiles (LLVM spills with 4x2: 990 us).
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Conv
from .conv_u8s8s32_avx512 import Conv16, Params


class ConvAvx2(Conv16):
    name = "conv_u8s8s32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {
        "mr": (1, 2, 3, 4, 5, 6),
        "nr": (1, 2, 3, 4),
        "wide": (False, True),
        "prefetch": (False,),
        "defer": (False, True),
        "chunk": (0, 256, 1024),
        "ahead": (False, True),
    }
    bits = 256
    gops = 170.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        nr, mr = self.tile(workload, {2: 5 if workload.residual else 4, 1: 6})
        return Params(mr, nr)


KERNEL = ConvAvx2()
