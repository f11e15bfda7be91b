"""GEMM u8 x s8 -> s32, AVX-512 VNNI.   C[m,n] = sum_k A[m,k] * B[n/16, k/4, n%16, k%4]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...machine import Machine
from ...workload import Gemm
from ._gemm_int import IntegerGemm, ceil_div, even_rows
from ._ir import T, bits, intrinsic, ramp, splat


@dataclass(frozen=True)
class Params:
    mr: int = 6  # rows of C kept in registers
    nr: int = 4  # vectors of columns kept in registers


class GemmVnni(IntegerGemm):
    name = "gemm_u8s8s32_vnni"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
    Params = Params
    SPACE = {"mr": (1, 2, 4, 5, 6, 8, 12), "nr": (1, 2, 3, 4, 8)}
    bits = 512
    gops = 450.0

    def registers(self, params: Any) -> int:
        return params.mr * params.nr + params.nr + 1

    def default(self, workload: Gemm, machine: Machine) -> Params:
        lanes = self.lanes(workload)
        vectors = ceil_div(workload.n, lanes)
        if workload.m == 1:
            streams = workload.n * workload.k > machine.l2
            return Params(1, min(vectors, 8 if streams else 4))
        nr = ceil_div(vectors, ceil_div(vectors, 4))  # equal panels
        return Params(even_rows(workload.m, {4: (6, 5, 4), 3: (8, 7, 6), 2: (8,), 1: (8,)}[nr]), nr)

    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        return quads.view(np.uint8).reshape(*quads.shape[:-2], -1)

    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        return [T.Bind(bits(f"int8x{4 * lanes}", w[ramp(offset, 4 * lanes)]))]

    def constant(self, quad: tuple[int, ...], lanes: int) -> list[Any]:
        word = sum(value << (8 * t) for t, value in enumerate(quad))
        return [bits(f"int8x{4 * lanes}", splat(word, "int32", lanes))]

    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return intrinsic(f"int32x{lanes}", name, acc, a[0], b[0])


KERNEL = GemmVnni()
