"""Convolution f32 x f32 -> f32 on the FMA units, dense or grouped, of one to three dims.

C[n,p,o] = act(sum_tap,c A[n, p*stride + tap*dilation - pad, g*cg + c] B[tap,c,o] + bias[o] + R)

A (n, d, h, w, c) f32 · W: tiles of bk x bn per group, see `_float_layout`, then bias · C and R
(n, d, h, w, o) f32. Rows are gathered as they are copied (`_float_conv`), tiles are those of
`gemm_f32f32f32_simt`. A block of 128 x 64 copies 24 to 32 bytes a thread and k-step of 16, for 512
FMAs: the numbers of a copy's tap take 10 to 15 instructions, 5 % of the time, where 16 bytes are
copied; with 3 channels, 4 bytes a copy, some 20 %. 1x1 with a few pixels in all: `_float_rows`.

Expected, not measured on a GPU: 65 to 75 % of the FMA units at batch 32 (H100 at 1.755 GHz 39 to 44
Tflop/s of 59), ResNet-50's 3x3 layers 160 to 180 us each; batch 1 is short of blocks, k is divided
among the warps of one: 10 us for 56x56x64 3x3, 30 us for 7x7x512.
"""

from __future__ import annotations

from typing import ClassVar

from ._float_conv import FloatConv
from ._float_gemm import PRODUCTS


class ConvF32Simt(FloatConv):
    name = "conv_f32f32f32_simt"
    features = ("sm_80",)
    SPACE: ClassVar = PRODUCTS


KERNEL = ConvF32Simt()
