"""The list of kernels: one line gives a kernel its selection, tests, bench and tuning."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernel import Kernel

# In order of preference among those that a machine can run and that do not refuse a workload.
KERNELS: tuple[str, ...] = (
    "x86.gemm_u8s8s32_vnni",
    "x86.gemm_u8s8s32split_avx512",
    "x86.gemm_u8s7s32_avx512",
    "x86.gemm_u8s8s32_avx512",
    "x86.gemm_u8s8s32split_avx2",
    "x86.gemm_u8s7s32_avx2",
    "x86.gemm_u8s8s32_avx2",
    "x86.gemm_f32f32f32_avx512",
    "x86.gemm_f32f32f32_avx2",
    "x86.gemm_f32f16f32_avx512",
    "x86.gemm_f32f16f32_avx2",
    "x86.gemm_f32s8f32_avx512",
    "x86.gemm_f32s8f32_avx2",
    "x86.embedding_bag_f32f32_avx512",
    "x86.embedding_bag_f32f32_avx2",
    "x86.embedding_bag_f16f32_avx512",
    "x86.embedding_bag_f16f32_avx2",
    "x86.embedding_bag_u8f32_avx512",
    "x86.embedding_bag_u8f32_avx2",
    "x86.embedding_bag_u4f32_avx512",
    "x86.embedding_bag_u4f32_avx2",
    "x86.interaction_f32f32f32_avx512",
    "x86.interaction_f32f32f32_avx2",
    "x86.depthwise_u8s8s32_vnni",
    "x86.depthwise_u8s8s32_avx512",
    "x86.depthwise_u8s8s32_avx2",
    "x86.groupconv_u8s8s32_vnni",
    "x86.groupconv_u8s8s32_avx512",
    "x86.groupconv_u8s8s32_avx2",
    "x86.conv_u8s8s32_vnni",
    "x86.depthwise_f32f32f32_avx512",
    "x86.depthwise_f32f32f32_avx2",
    "x86.conv_u8s7s32_avx512",
    "x86.conv_u8s8s32_avx512",
    "x86.conv_u8s7s32_avx2",
    "x86.conv_u8s8s32_avx2",
    "x86.groupconv_f32f32f32_avx512",
    "x86.groupconv_f32f32f32_avx2",
    "x86.conv_f32f32f32_avx512",
    "x86.conv_f32f32f32_avx2",
    "cuda.gemm_u8s8s32_dp4a",
    "cuda.gemm_u8s8s32_mma",
    "cuda.depthwise_u8s8s32_dp4a",
    "cuda.depthwise_f32f32f32_simt",
    "cuda.groupconv_u8s8s32_dp4a",
    "cuda.groupconv_f32f32f32_simt",
    "cuda.conv_u8s8s32_mma",
    "cuda.gemm_f32f32f32_simt",
    "cuda.gemm_f32f16f32_mma",
    "cuda.gemm_f32s8f32_simt",
    "cuda.conv_f32f32f32_simt",
    "cuda.embedding_bag_f32f32_warp",
    "cuda.embedding_bag_f16f32_warp",
    "cuda.embedding_bag_u8f32_warp",
    "cuda.embedding_bag_u4f32_warp",
    "cuda.interaction_f32f32f32_simt",
)


@lru_cache(maxsize=1)
def load() -> tuple[Kernel, ...]:
    """All kernels, in order of preference. Imports TVM."""
    return tuple(import_module(f".{name}", __name__).KERNEL for name in KERNELS)
