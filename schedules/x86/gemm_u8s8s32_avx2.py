"""GEMM u8 x s8 -> s32, AVX2, exact for all 8 bits."""

from __future__ import annotations

from ...machine import Machine
from ...workload import Gemm
from .gemm_u8s8s32_avx512 import Gemm16, Params


class GemmAvx2(Gemm16):
    name = "gemm_u8s8s32_avx2"
    features = ("avx2",)
    SPACE = {"mr": (1, 2, 3, 4, 6), "nr": (1, 2, 3), "wide": (False, True)}
    bits = 256
    gops = 170.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        return Params(4, 2, True)


KERNEL = GemmAvx2()
