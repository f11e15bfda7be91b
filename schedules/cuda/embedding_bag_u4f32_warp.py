"""Embedding bag of 4-bit rows on a GPU.   out[b] = sum_i f32(code[i]) * scale[i] + bias[i]

A row of 64 codes is 40 bytes, at a multiple of 8: a lane loads 16 codes, and all 4 lanes the scale
and bias, from 2 sectors of 32 bytes, 62 % of which are wanted; rows of 128 want 72 of 96 bytes.

A code n at bit p of a word is masked and put under the exponent of 2**23 (one lop3), which is
2**23 + n * 2**p; a multiply-add makes n of it, and one more the product: 3 instructions, 15 codes
a cycle and multiprocessor take 34 % of its issue slots. Rows under way are 8, not 16: compilers
dequantize many of them early, and 16 took 254 registers.

4096 bags of 20 rows of 64: 5.2 MB of sectors, 0.7 MB of indices, 1.0 MB of output, 2.1 us at the
3.35 TB/s of an H100. 8 bags x 8 rows of a warp are 4 KB under way; 5300 bags at a time are enough.
Expected from data sheets, not measured on a GPU.
"""

from __future__ import annotations

from ._embedding import WarpKernel


class EmbeddingU4Warp(WarpKernel):
    name = "embedding_bag_u4f32_warp"
    features = ("sm_80",)
    storage = "u4"


KERNEL = EmbeddingU4Warp()
