"""GEMM u8 x s8 -> s32, AVX2, for weights within +-64 (7 bits).

The micro-kernel of gemm_u8s7s32_avx512 on 8 columns per vector and 16 registers: two 256-bit
multiplies per cycle, so the same limit of 237 Gop/s on Zen 4 at 3.7 GHz. 1 thread, to u8:
336x512x512 770 us = 228 Gop/s = 96 %.
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Gemm
from .gemm_u8s7s32_avx512 import Gemm7, Params


class GemmAvx2(Gemm7):
    name = "gemm_u8s7s32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {"mr": (1, 2, 3, 4, 5, 6), "nr": (1, 2, 3, 4)}
    bits = 256
    gops = 225.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        rows = {2: (5, 4), 1: (8, 4)}
        return Params(*self.tile(workload, rows, 4))


KERNEL = GemmAvx2()
