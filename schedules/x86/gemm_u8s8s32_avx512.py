"""GEMM u8 x s8 -> s32, AVX-512 without VNNI, exact for all 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...machine import Machine
from ...workload import Gemm
from ._gemm_int import IntegerGemm
from ._ir import T, bits, intrinsic, ramp, splat

_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}


@dataclass(frozen=True)
class Params:
    mr: int = 4  # rows of C kept in registers
    nr: int = 4  # vectors of columns kept in registers
    wide: bool = False  # B stored as s16: twice the memory, no widening


class Gemm16(IntegerGemm):
    """Both operands widened to 16 bits."""

    Params: Any = Params
    staged = True

    def registers(self, params: Any) -> int:
        return params.mr * params.nr + 2 * params.nr + 3

    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        pairs = quads.reshape(*quads.shape[:-1], 2, 2)  # of k: (0, 1), (2, 3)
        parts = np.moveaxis(pairs, -2, -3)  # first pairs of all lanes, then second pairs
        if params.wide:
            parts = parts.astype(np.int16)
        return np.ascontiguousarray(parts).view(np.uint8).reshape(*quads.shape[:-2], -1)

    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        size = (4 if params.wide else 2) * lanes
        raw = [w[ramp(offset + part * size, size)] for part in range(2)]
        if params.wide:
            return [T.Bind(bits(f"int16x{2 * lanes}", part)) for part in raw]
        narrow = [bits(f"int8x{size}", part) for part in raw]
        return [T.Bind(part.astype(f"int16x{2 * lanes}")) for part in narrow]

    def constant(self, quad: tuple[int, ...], lanes: int) -> list[Any]:
        words = (quad[0] | quad[1] << 16, quad[2] | quad[3] << 16)
        return [bits(f"int16x{2 * lanes}", splat(word, "int32", lanes)) for word in words]

    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        even, odd = (
            intrinsic(f"int32x{lanes}", _MADD[lanes], x, y) for x, y in zip(a, b, strict=True)
        )
        return acc + even + odd


class GemmAvx512(Gemm16):
    name = "gemm_u8s8s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE = {"mr": (1, 2, 4, 5, 6, 8), "nr": (1, 2, 3, 4), "wide": (False, True)}
    bits = 512
    gops = 170.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        return Params()


KERNEL = GemmAvx512()
