"""Embedding bag of 8-bit rows on a GPU.   out[b] = sum_i f32(code[i]) * scale[i] + bias[i]

A row of 64 codes is 72 bytes, at a multiple of 8: a lane loads 8 codes, and all 8 lanes the scale
and bias, from 3 sectors of 32 bytes, 75 % of which are wanted; rows of 128 want 136 of 160 bytes.
Rows of a width that is no multiple of 8 are loaded by 4, 2 or 1 bytes.

A code is put under the exponent of 2**23 (prmt), 2**23 is taken away and one multiply-add follows,
3 instructions at full speed where a conversion has a quarter or half of it: 10 codes a cycle and
multiprocessor take 23 % of its issue slots.

4096 bags of 20 rows of 64: 7.9 MB of sectors, 0.7 MB of indices, 1.0 MB of output, 2.9 us at the
3.35 TB/s of an H100. 4 bags x 16 rows of a warp are 6 KB under way; 1600 bags at a time are enough.
Expected from data sheets, not measured on a GPU.
"""

from __future__ import annotations

from ._embedding import WarpKernel


class EmbeddingU8Warp(WarpKernel):
    name = "embedding_bag_u8f32_warp"
    features = ("sm_80",)
    storage = "u8"


KERNEL = EmbeddingU8Warp()
