"""GEMM u8 x s8 -> s32, AVX-512 without VNNI, exact for all 8 bits of both operands: 16-bit sums.

As gemm_u8s7s32_avx512, but vpmaddwd only after `period` k-steps, up to which vpaddw sums in 16
bits. What of the weights does not fit is multiplied apart: `_gemm_split` has the layout,
`_split_loops` the loops, ``dccompile.outliers`` the proof. A window of 4 k-steps for a row and a
vector of columns, 512 operations:

    4 vpmaddubsw · 4 vpaddw, one of them of the offsets · vpmaddwd · vpaddd · 4 broadcasts of A

Multiplies share one 512-bit pipe: 5 cycles, a limit of 379 Gop/s on Zen 4 at 3.7 GHz. All vector
operations share two, and a broadcast from memory takes half of one: 6 cycles. Measured without
outliers 279 Gop/s, by calibration, without offsets and with 8 k-steps, 343. 1 thread, weights as
trained, 0.5 % beyond +-64, to u8: 336x512x512 682 us = 258 Gop/s, 1.55 times the speed of widening
to 16 bits; with L2-optimal scales, of which 6 % are beyond, 240 Gop/s, 1.45 times. A run of up to
4 outliers costs 11 cycles for 32 rows: most of these are conversions, and loads of two 256-bit
halves. A tile is one vector wide, as then its rows are the lanes of outliers' sums, which reach
the accumulators by a transposition in registers.
"""

from __future__ import annotations

from typing import ClassVar

from ._gemm_split import Speed, SplitGemm
from .gemm_u8s7s32_avx512 import KERNEL as PLAIN


class GemmAvx512(SplitGemm):
    name = "gemm_u8s8s32split_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {"mr": (4, 8, 16), "nr": (1, 2, 4), "period": (1, 3, 4, 8)}
    bits = 512
    gops = 270.0
    plain = PLAIN
    speed = Speed({1: 2.04, 2: 2.02, 3: 1.77, 4: 1.70}, free=0.28, wide=2.6, run=11.0, block=200)
    tiles = 2
    fewest = 10
    longest = 8
    rows: ClassVar = {1: (16, 12, 8)}


KERNEL = GemmAvx512()
