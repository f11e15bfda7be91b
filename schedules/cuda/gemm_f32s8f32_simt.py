"""GEMM f32 x s8 -> f32 on the FMA units.   C[m,n] = act(sum_k A[m,k] B[k,n] * scale[n] + bias[n])

A (m, k) f32 · W: tiles of codes, see `_float_layout`, then scale, bias f32 · C (m, n) f32.
A code becomes f32, exactly, in three operations: its bit of sign flipped, put below the exponent
of 2**23, 2**23 + 128 subtracted. Tiles do so on the way to shared memory, once for all rows of a
block: 2 % of the time. A pass over the weights does it for every code, with m FMAs each.

Expected, not measured on a GPU: many rows as `gemm_f32f32f32_simt` less 2 %. One row of 4096 x
4096, 17 MB: 7 us on an H100, a fourth of f32's bytes. 16 bytes are 16 codes, 40 instructions and
16 for every row: at 8 rows these take as long as the bytes (3.35 TB/s), beyond they are the bound.
"""

from __future__ import annotations

from typing import ClassVar

from ._float_gemm import PRODUCTS, FloatGemm


class GemmS8Simt(FloatGemm):
    name = "gemm_f32s8f32_simt"
    features = ("sm_80",)
    weights = "s8"
    SPACE: ClassVar = PRODUCTS


KERNEL = GemmS8Simt()
