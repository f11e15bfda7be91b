"""GEMM u8 x s8 -> s32, AVX2, exact for all 8 bits of both operands: 16-bit sums.

The micro-kernel of gemm_u8s8s32split_avx512 on 8 columns per vector and 16 registers. A window of
4 k-steps has 14 vector operations, 4 a cycle: a limit of 271 Gop/s on Zen 4 at 3.7 GHz; measured
without outliers 257, by calibration, without offsets, 288. 1 thread, weights as trained, 0.5 %
beyond +-64, to u8: 336x512x512 773 us = 228 Gop/s, 1.31 times the speed of widening to 16 bits;
with L2-optimal scales 207 Gop/s, 1.21 times. A run of up to 4 outliers costs 8 cycles for 16 rows,
so 32 rows share the loads of its weights.
"""

from __future__ import annotations

from typing import ClassVar

from ._gemm_split import Speed, SplitGemm
from .gemm_u8s7s32_avx2 import KERNEL as PLAIN


class GemmAvx2(SplitGemm):
    name = "gemm_u8s8s32split_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {"mr": (4, 6, 8), "nr": (1, 2), "period": (1, 2, 3, 4, 8)}
    bits = 256
    gops = 240.0
    plain = PLAIN
    speed = Speed({1: 1.09, 2: 1.02, 3: 0.93, 4: 0.92}, free=0.1, wide=1.34, run=8.2, block=120)
    tiles = 4
    fewest = 12
    longest = 4
    rows: ClassVar = {1: (8, 6, 5, 4)}


KERNEL = GemmAvx2()
