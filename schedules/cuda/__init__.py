"""Kernels for NVIDIA GPUs, sm_80 and later. Read `gemm_u8s8s32_mma` first."""
