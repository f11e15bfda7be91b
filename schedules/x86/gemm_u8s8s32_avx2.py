"""GEMM u8 x s8 -> s32, AVX2, exact for all 8 bits of both operands.

The micro-kernel of gemm_u8s8s32_avx512 on 8 columns per vector and 16 registers: two 256-bit
vpmaddwd and four operations in all per cycle, so the same limit of 237 Gop/s on Zen 4 at 3.7 GHz.
1 thread, to u8: 336x512x512 1007 us = 175 Gop/s, 10x512x512 30.0 us; 1x1024x1024 18.2 us with B
as s8, 21.5 as s16. Tails of bytes are stored in pieces of 16, 8, 4 and 1: AVX2 has no byte masks.
"""

from __future__ import annotations

from typing import ClassVar

from ...machine import Machine
from ...workload import Gemm
from .gemm_u8s8s32_avx512 import Gemm16, Params


class GemmAvx2(Gemm16):
    name = "gemm_u8s8s32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {"mr": (1, 2, 3, 4, 6), "nr": (1, 2, 3, 4), "wide": (False, True)}
    bits = 256
    gops = 170.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        rows = {2: (4, 3), 1: (6, 4)}
        return Params(*self.tile(workload, rows, 4), wide=workload.m is None or workload.m > 4)


KERNEL = GemmAvx2()
