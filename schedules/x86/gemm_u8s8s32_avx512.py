"""GEMM u8 x s8 -> s32, AVX-512 without VNNI, exact for all 8 bits of both operands.

vpmaddubsw would saturate (2*255*128 > 2**15), so both operands are widened to 16 bits and
vpmaddwd sums pairs of products in s32. A k-step of 4 for a tile of mr rows and nr vectors:

    B panel   per vector: k pairs (0, 1) of 16 columns, then (2, 3); s16, or s8 and vpmovsxbw
    A row     widened once for all columns (see _gemm_loops); each pair broadcast to all lanes
    C         per register 2 vpmaddwd and 2 vpaddd

One 512-bit vpmaddwd and two operations in all per cycle: 64 op/cycle, half of what vpmaddubsw
or a quarter of what VNNI could do. Zen 4 at 3.7 GHz, 1 thread: limit 237 Gop/s; 336x512x512 to u8
936 us = 188 Gop/s, 10x512x512 27.8 us = 189. B as s16 gains 5 % over s8 where it is used for many
rows and loses a third in one row, which is bound by memory: 1x1024x1024 16.2 us with s8, 22.1 with
s16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Gemm
from ._dot import Dot16
from ._gemm_int import IntegerGemm


@dataclass(frozen=True)
class Params:
    mr: int = 4  # rows of C kept in registers
    nr: int = 4  # vectors of columns kept in registers
    wide: bool = True  # B stored as s16: twice the memory, nothing to widen


class Gemm16(Dot16, IntegerGemm):
    """The micro-kernel on operands of 16 bits, for both vector widths."""

    Params: Any = Params

    def registers(self, params: Params) -> int:
        # C tile, a step of B, a broadcast of A, a product
        return params.mr * params.nr + 2 * params.nr + 2


class GemmAvx512(Gemm16):
    name = "gemm_u8s8s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {"mr": (1, 2, 4, 5, 6, 8), "nr": (1, 2, 3, 4), "wide": (False, True)}
    bits = 512
    gops = 185.0

    def default(self, workload: Gemm, machine: Machine) -> Params:
        rows = {4: (5, 4), 3: (6, 5), 2: (8, 6), 1: (8, 4)}
        return Params(*self.tile(workload, rows, 4), wide=workload.m is None or workload.m > 4)


KERNEL = GemmAvx512()
