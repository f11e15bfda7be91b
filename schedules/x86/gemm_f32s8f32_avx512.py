"""GEMM f32 x s8 -> f32, AVX-512.   C[m,n] = act(sum_k A[m,k] B[n/16, k, n%16] scale[n] + bias[n])

A (m, k) f32 · W: panels of s8, see `_coded_gemm`, then scale (n,), bias (n,) f32 · C (m, n) f32.
Zen 4, 1 thread: peak 118.2 Gop/s; 16x256x512 118, 64x512x512 118, 6x512x512 114 Gop/s.
1x4096x1024: 138 us from L3 (f32 252, f16 93), 157 us from memory (f32 728, f16 294) = 27 GB/s.
"""

from __future__ import annotations

from typing import ClassVar

from ._coded_gemm import CodedGemm


class GemmS8Avx512(CodedGemm):
    name = "gemm_f32s8f32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {
        "mr": (1, 2, 3, 4, 5, 6, 8, 10, 12),
        "nr": (1, 2, 3, 4, 5, 6, 8),
        "lanes": (8, 16),
    }


KERNEL = GemmS8Avx512()
