"""Convolution u8 x s8 -> s32, AVX-512 without VNNI, for weights within +-64 (7 bits).

Tiles and panels as in conv_u8s8s32_vnni, vpmaddubsw, vpmaddwd and vpaddd as in gemm_u8s7s32_avx512
in place of vpdpbusd. Zen 4 at 3.7 GHz, 1 thread, to u8; limit 237 Gop/s: 3x3 56x56x64 963 us = 234
= 99 % of the taps inside, 7x7x512 804 us = 236, 1x1 56x56 256->64 443 us = 232, 64->256 + residual
522 us = 197, 7x7x3 stride 2 1184 us = 199.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Conv
from ._conv_int import IntegerConv
from ._dot import Dot7


@dataclass(frozen=True)
class Params:
    mr: int = 6  # neighbouring pixels kept in registers
    nr: int = 4  # vectors of filters kept in registers
    prefetch: bool = False  # of the next panel of weights to L2
    defer: bool = False  # store a tile during the k-steps of the next
    chunk: int = 1024  # KiB of A, R and C that stay in L2 while panels pass; 0: all by each panel
    ahead: bool = False  # prefetch what tiles of the next chunk read and write


class Conv7(Dot7, IntegerConv):
    """The micro-kernel for both vector widths."""

    Params: Any = Params

    def registers(self, params: Params) -> int:
        # C tile, a step of B, a broadcast of A, a product, the ones
        return params.mr * params.nr + params.nr + 3


class ConvAvx512(Conv7):
    name = "conv_u8s7s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {
        "mr": (1, 2, 4, 5, 6, 7, 8),
        "nr": (1, 2, 3, 4),
        "prefetch": (False, True),
        "defer": (False, True),
        "chunk": (0, 256, 1024),
        "ahead": (False, True),
    }
    bits = 512
    gops = 230.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        nr, mr = self.tile(workload, {4: 6, 3: 7, 2: 8, 1: 8})
        return Params(mr, nr)


KERNEL = ConvAvx512()
