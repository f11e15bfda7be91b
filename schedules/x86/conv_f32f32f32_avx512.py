"""Convolution f32 x f32 -> f32, AVX-512.

C[n,p,o] = activation(sum_tap,c A[n,p+tap,c] * B[o/16, tap, c, o%16] + bias[o] + R[n,p,o])

A (n, d, h, w, c) f32 · W: panels of nr vectors, see `_float_conv`, then bias · C (n, d, h, w, o).
A 7 x 3 tile: 21 accumulators, 3 of B, 1 broadcast of A = 25 of 32 registers; a step of k is 21
FMAs in 21 cycles, 3 loads, 7 broadcasts and 9 bytes of W a cycle, which the second-level cache
gives three times over. Taller tiles (14 x 2) lose where pixels of A are 4 KiB apart: 75 % of the
peak at 14x14x1024, with 7 rows 98 %.
Zen 4, 1 thread, % of the FMA peak of 118.2 Gop/s, taps in the padding not counted: 3x3 97 to 99
(7x7x512 95), 1x1 93 to 98, with residual 94 to 97, first layer 96; ResNet-50's layers 68.7 ms in
all, the floor of the taps computed is 66.8, of all taps 69.2; run in a row, each with weights of
its own, 71.5. MobileNetV2's without depthwise 5.2 ms (4.7).
"""

from __future__ import annotations

from typing import ClassVar

from ._float_conv import FloatConv


class ConvF32Avx512(FloatConv):
    name = "conv_f32f32f32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {
        "mr": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 20, 24),
        "nr": (1, 2, 3, 4),
        "lanes": (8, 16),
        "chunk": (0, 512),
        "ahead": (False, True),
    }


KERNEL = ConvF32Avx512()
