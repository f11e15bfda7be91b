"""GEMM f32 x s8 -> f32, AVX2.   C[m,n] = act(sum_k A[m,k] B[n/8, k, n%8] scale[n] + bias[n])

A (m, k) f32 · W: panels of s8, see `_coded_gemm`, then scale (n,), bias (n,) f32 · C (m, n) f32.
Zen 4, 1 thread: peak 118.2 Gop/s; 16x512x1024 110 Gop/s.
1x1024x1024: 34 us from L3 (f32 42, f16 25), 45 us from memory (f32 179, f16 76) = 24 GB/s.
"""

from __future__ import annotations

from typing import ClassVar

from ._coded_gemm import CodedGemm


class GemmS8Avx2(CodedGemm):
    name = "gemm_f32s8f32_avx2"
    features = ("avx2", "fma")
    SPACE: ClassVar = {
        "mr": (1, 2, 3, 4, 5, 6, 8, 10, 12),
        "nr": (1, 2, 3, 4, 5, 6),
        "lanes": (8,),
    }


KERNEL = GemmS8Avx2()
