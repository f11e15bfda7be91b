"""Convolution u8 x s8 -> s32, AVX2, for weights within +-64 (7 bits).

The micro-kernel of conv_u8s7s32_avx512 on 8 filters per vector and 16 registers. Zen 4 at 3.7 GHz,
1 thread, to u8; limit 237 Gop/s: 3x3 56x56x64 979 us = 231, 7x7x512 840 us = 225, 1x1 56x56 256->64
453 us = 227, 64->256 + residual 580 us = 177.
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Conv
from .conv_u8s7s32_avx512 import Conv7, Params


class ConvAvx2(Conv7):
    name = "conv_u8s7s32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {
        "mr": (1, 2, 3, 4, 5, 6, 8),
        "nr": (1, 2, 3, 4),
        "prefetch": (False, True),
        "defer": (False, True),
        "chunk": (0, 256, 1024),
        "ahead": (False, True),
    }
    bits = 256
    gops = 225.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        nr, mr = self.tile(workload, {2: 5, 1: 8})
        return Params(mr, nr)


KERNEL = ConvAvx2()
