"""Convolution f32 x f32 -> f32, AVX2.

C[n,p,o] = activation(sum_tap,c A[n,p+tap,c] * B[o/8, tap, c, o%8] + bias[o] + R[n,p,o])

A (n, d, h, w, c) f32 · W: panels of nr vectors, see `_float_conv`, then bias · C (n, d, h, w, o).
A 6 x 2 tile: 12 accumulators, 2 of B, 1 broadcast of A = 15 of 16 registers; a step of k is 12
FMAs in 6 cycles and 8 loads in 4. 4 x 3 takes all 16.
Zen 4, 1 thread, % of the FMA peak of 118.2 Gop/s: 1x1 90 to 96, 3x3 83 to 95, 7x7x512 72 (W from
the third-level cache).
"""

from __future__ import annotations

from typing import ClassVar

from ._float_conv import FloatConv


class ConvF32Avx2(FloatConv):
    name = "conv_f32f32f32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {
        "mr": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12),
        "nr": (1, 2, 3, 4),
        "lanes": (8,),
        "chunk": (0, 512),
        "ahead": (False, True),
    }


KERNEL = ConvF32Avx2()
