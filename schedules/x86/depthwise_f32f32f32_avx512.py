"""Depthwise convolution f32 x f32 -> f32, AVX-512.

C[n,p,c] = activation(sum_tap A[n,p+tap,c] * B[tap,c] + bias[c] + R[n,p,c])

A (n, d, h, w, c) f32 · W: vectors of 16 channels, see `_float_depthwise`, then bias · C as A.
A tile of 7 pixels of 16 channels: 7 accumulators, a row of 3 weights, a pixel of A; a row of 3
taps is 21 FMAs and 12 loads, of which one of 512 bits starts in a cycle, like an FMA.
Zen 4, 1 thread: 112x112x32 90 Gop/s = 76 % of the peak, 56x56x144 75 %, 14x14x576 70 %; with
stride 2 (17 loads) 45 %; where A and C come from L3, as in a model, half of that. Tiles of 4 and
14 pixels and prefetching the next row were no faster.
"""

from __future__ import annotations

from typing import ClassVar

from ._float_depthwise import FloatDepthwise


class DepthwiseF32Avx512(FloatDepthwise):
    name = "depthwise_f32f32f32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {"mr": (1, 2, 4, 5, 6, 7, 8, 10, 12, 14), "nr": (1,), "lanes": (8, 16)}


KERNEL = DepthwiseF32Avx512()
