"""GEMM u8 x s8 -> s32, AVX2, for weights within +-64."""

from __future__ import annotations

from ...machine import Machine
from ...workload import Gemm
from .gemm_u8s7s32_avx512 import Gemm7, Params


class GemmAvx2(Gemm7):
    name = "gemm_u8s7s32_avx2"
    features = ("avx2",)
    SPACE = {"mr": (1, 2, 3, 4, 5, 6), "nr": (1, 2, 3, 4)}
    bits = 256
    gops = 230.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        return Params(4, 2)


KERNEL = GemmAvx2()
