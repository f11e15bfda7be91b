"""Convolution of small groups f32 x f32 -> f32, AVX2.

C[n,p,o] = activation(sum_tap,c A[n,p+tap,g*s+c] * B[tap,c,o] + bias[o] + R[n,p,o]), g = o / s

A (n, d, h, w, c) f32 · W: rotated vectors, see `_float_groupconv`, then bias · C as A.
Groups of s = 2 or 4 channels; those of 8 fill a vector of `conv_f32f32f32_avx2`. A tile of 2
pixels x 4 rotations: 8 accumulators, 2 pixels, a vector of weights; with 3 pixels all 16 registers
were taken and strided layers fell from 83 to 61 % of the peak.
Zen 4, 1 thread: 78 % of the peak at 56x56x128, 4 a group, 83 % with stride 2.
"""

from __future__ import annotations

from typing import ClassVar

from ._float_groupconv import FloatGroupConv


class GroupConvF32Avx2(FloatGroupConv):
    name = "groupconv_f32f32f32_avx2"
    features = ("avx2", "fma")
    sizes = (2, 4)
    SPACE: ClassVar = {"mr": (1, 2), "nr": (2, 4), "lanes": (8,)}


KERNEL = GroupConvF32Avx2()
