"""Embedding bag of 32-bit float rows, AVX-512.   out[b] = sum_i row[i]

16 columns are one vaddps. 100 bags of 100 random rows of a million, one thread of a shared Zen 4,
medians and ratio to torch's embedding_bag: dim 64: 156 us in 4-KB pages (2.3x), 180 in huge ones
(1.9x); dim 128: 661 (1.5x) and 421 (1.9x). Their lines alone take 90 % of that and more.
"""

from __future__ import annotations

from ._embedding import EmbeddingKernel


class EmbeddingF32Avx512(EmbeddingKernel):
    name = "embedding_bag_f32f32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    storage = "f32"
    bits = 512


KERNEL = EmbeddingF32Avx512()
