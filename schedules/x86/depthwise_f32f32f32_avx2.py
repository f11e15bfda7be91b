"""Depthwise convolution f32 x f32 -> f32, AVX2.

C[n,p,c] = activation(sum_tap A[n,p+tap,c] * B[tap,c] + bias[c] + R[n,p,c])

A (n, d, h, w, c) f32 · W: vectors of 8 channels, see `_float_depthwise`, then bias · C as A.
A tile of 7 pixels of 8 channels: 7 accumulators, a row of 3 weights, a pixel of A; a row of 3 taps
is 21 FMAs and 12 loads, two of each in a cycle.
Zen 4, 1 thread: 112x112x32 66 % of the FMA peak, 14x14x576 65 %, 7x7x960 69 %; stride 2 40 to 47 %.
"""

from __future__ import annotations

from typing import ClassVar

from ._float_depthwise import FloatDepthwise


class DepthwiseF32Avx2(FloatDepthwise):
    name = "depthwise_f32f32f32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {"mr": (1, 2, 3, 4, 5, 6, 7, 8), "nr": (1,), "lanes": (8,)}


KERNEL = DepthwiseF32Avx2()
