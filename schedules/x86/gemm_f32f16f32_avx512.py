"""GEMM f32 x f16 -> f32, AVX-512.   C[m,n] = activation(sum_k A[m,k] * B[n/16, k, n%16] + bias[n])
"""

from __future__ import annotations

from ._float_gemm import FloatGemm


class GemmF16Avx512(FloatGemm):
    name = "gemm_f32f16f32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE = {"mr": (1, 2, 3, 4, 5, 6, 8, 10, 12), "nr": (1, 2, 3, 4, 5, 6, 8), "lanes": (8, 16)}
    weights = "f16"


KERNEL = GemmF16Avx512()
