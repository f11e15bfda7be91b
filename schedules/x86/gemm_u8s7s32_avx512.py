"""GEMM u8 x s8 -> s32, AVX-512 without VNNI, for weights within +-64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...machine import Machine
from ...workload import Gemm
from ._gemm_int import IntegerGemm
from ._ir import T, bits, intrinsic, ramp, splat

_MADDUBS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}


@dataclass(frozen=True)
class Params:
    mr: int = 6  # rows of C kept in registers
    nr: int = 4  # vectors of columns kept in registers


class Gemm7(IntegerGemm):
    """Pairs of products summed in 16 bits, pairs of those in 32."""

    Params: Any = Params
    seven_bits = True

    def registers(self, params: Any) -> int:
        return params.mr * params.nr + params.nr + 3

    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        return quads.view(np.uint8).reshape(*quads.shape[:-2], -1)

    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        return [T.Bind(bits(f"int8x{4 * lanes}", w[ramp(offset, 4 * lanes)]))]

    def constant(self, quad: tuple[int, ...], lanes: int) -> list[Any]:
        word = sum(value << (8 * t) for t, value in enumerate(quad))
        return [bits(f"int8x{4 * lanes}", splat(word, "int32", lanes))]

    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        pairs = intrinsic(f"int16x{2 * lanes}", _MADDUBS[lanes], a[0], b[0])
        ones = splat(1, "int16", 2 * lanes)
        return acc + intrinsic(f"int32x{lanes}", _MADD[lanes], pairs, ones)


class GemmAvx512(Gemm7):
    name = "gemm_u8s7s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE = {"mr": (1, 2, 4, 5, 6, 8), "nr": (1, 2, 3, 4)}
    bits = 512
    gops = 230.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        return Params()


KERNEL = GemmAvx512()
