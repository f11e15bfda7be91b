"""GEMM u8 x s8 -> s32, AVX-512 VNNI.   C[m,n] = sum_k A[m,k] * B[n/16, k/4, n%16, k%4]

vpdpbusd adds to each of 16 s32 lanes the sum of 4 products u8 x s8, exactly. A k-step of a tile of
mr rows and nr vectors of columns:

    B panel   nr vectors of 64 bytes, one after the other:  n0: k0 k1 k2 k3 | n1: k0 .. k3 | .. n15
    A row     4 bytes, broadcast to all lanes               k0 k1 k2 k3 | k0 .. k3 | ..
    C         mr x nr registers, one vpdpbusd each

so mr*nr cycles on a machine with one 512-bit vpdpbusd per cycle, where mr + nr loads take
(mr+nr)/2: from 4x2 on, arithmetic is the limit. 4 accumulators hide the latency of 4 cycles.
N <= 8 uses 256-bit registers, two per cycle, in which half a vector is not wasted.

Zen 4 at 3.7 GHz, 1 thread: peak = 3.7 * 128 = 473 Gop/s measured. With requantisation to u8:
64x512x512 73 us = 459 Gop/s = 97 %; 10x512x512 11.4 us = 98 %; 128x1024x1024 578 us = 98 %.
One row is bound by the weights: 1x1024x1024 10.6 us = 98 GB/s from L2 and L3.
Software prefetch was tried for one row: 0 to 35 % slower at any distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Gemm
from ._dot import DotVnni
from ._gemm_int import IntegerGemm


@dataclass(frozen=True)
class Params:
    mr: int = 4  # rows of C kept in registers
    nr: int = 4  # vectors of columns kept in registers


class GemmVnni(DotVnni, IntegerGemm):
    name = "gemm_u8s8s32_vnni"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
    Params: Any = Params
    SPACE: ClassVar = {"mr": (1, 2, 3, 4, 5, 6, 8, 12), "nr": (1, 2, 3, 4, 8)}
    gops = 450.0

    def registers(self, params: Params) -> int:
        return params.mr * params.nr + params.nr + 1  # C tile, a step of B, one broadcast of A

    def default(self, workload: Gemm, machine: Machine) -> Params:
        one_row = 8 if workload.n * workload.k > machine.l2 else 4
        rows = {4: (6, 5, 4), 3: (8, 7, 6), 2: (8, 6), 1: (8, 4)}
        return Params(*self.tile(workload, rows, one_row))


KERNEL = GemmVnni()
