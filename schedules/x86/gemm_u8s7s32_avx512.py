"""GEMM u8 x s8 -> s32, AVX-512 without VNNI, for weights within +-64 (7 bits).

vpmaddubsw sums pairs of products u8 x s8 in s16, where 2*255*64 = 32640 still fits, vpmaddwd by
ones sums pairs of those in s32, vpaddd accumulates: exact. Panels as in gemm_u8s8s32_vnni, three
operations instead of one:

    B panel   nr vectors of 64 bytes:          n0: k0 k1 k2 k3 | n1: k0 .. k3 | .. n15
    A row     4 bytes, broadcast to all lanes  k0 k1 k2 k3 | k0 .. k3 | ..

Both multiplies share one 512-bit pipe: 64 op/cycle. Zen 4 at 3.7 GHz, 1 thread: limit 237 Gop/s;
336x512x512 to u8 755 us = 233 Gop/s = 98 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Gemm
from ._dot import Dot7
from ._gemm_int import IntegerGemm


@dataclass(frozen=True)
class Params:
    mr: int = 6  # rows of C kept in registers
    nr: int = 4  # vectors of columns kept in registers


class Gemm7(Dot7, IntegerGemm):
    """The micro-kernel for both vector widths."""

    Params: Any = Params

    def registers(self, params: Params) -> int:
        # C tile, a step of B, a broadcast of A, a product, the ones
        return params.mr * params.nr + params.nr + 3


class GemmAvx512(Gemm7):
    name = "gemm_u8s7s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {"mr": (1, 2, 4, 5, 6, 8), "nr": (1, 2, 3, 4)}
    bits = 512
    gops = 230.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        rows = {4: (6, 5, 4), 3: (8, 6, 5), 2: (8, 6), 1: (8, 4)}
        return Params(*self.tile(workload, rows, 4))


KERNEL = GemmAvx512()
