"""GEMM f32 x f32 -> f32 on the FMA units.   C[m,n] = act(sum_k A[m,k] B[k,n] + bias[n])

A (m, k) f32 · W: tiles of bk x bn, see `_float_layout`, then bias · C (m, n) f32. Sums by fma.
Many rows, `_float_tile`: 128 x 128 of C by 256 threads of 8 x 8. A block reads 1 KiB for 32768
operations of a k, so H100's peak takes 1.9 TB/s from L2 (of some 5.5). Four k of a warp are 256
FMAs, 16 loads from shared memory and some 15 other instructions: 128 registers, none spilled.
Few rows, `_float_rows`: W once; 1 x 4096 x 4096 is 67 MB.

Expected, not measured on a GPU: 75 to 80 % of the FMA units, which is 45 to 48 Tflop/s at H100's
1.755 GHz (peak 59; 67 at its highest clock) and 15 on an A100 (19.5); 4096^3 in 2.9 ms. One row of
4096 x 4096 24 us (80 to 85 % of 3.35 TB/s), on an A100 40 us.
"""

from __future__ import annotations

from typing import ClassVar

from ._float_gemm import PRODUCTS, FloatGemm


class GemmF32Simt(FloatGemm):
    name = "gemm_f32f32f32_simt"
    features = ("sm_80",)
    weights = "f32"
    SPACE: ClassVar = PRODUCTS


KERNEL = GemmF32Simt()
