"""GEMM f32 x f16 -> f32, AVX2.   C[m,n] = activation(sum_k A[m,k] * B[n/8, k, n%8] + bias[n])
"""

from __future__ import annotations

from ._float_gemm import FloatGemm


class GemmF16Avx2(FloatGemm):
    name = "gemm_f32f16f32_avx2"
    features = ("avx2", "fma", "f16c")
    SPACE = {"mr": (1, 2, 3, 4, 5, 6, 8, 10, 12), "nr": (1, 2, 3, 4, 5, 6), "lanes": (8,)}
    weights = "f16"


KERNEL = GemmF16Avx2()
