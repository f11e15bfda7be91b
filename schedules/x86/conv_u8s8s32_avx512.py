"""Convolution u8 x s8 -> s32, AVX-512 without VNNI, exact for all 8 bits of both operands.

Tiles as in conv_u8s8s32_vnni, multiplication as in gemm_u8s8s32_avx512: A is widened to 16 bits
once, image after image, vpmaddwd sums pairs of products in s32. A k-step of 4 channels:

    B panel   per vector: channels (0, 1) of 16 filters, then (2, 3); s16, or s8 and vpmovsxbw
    A         both pairs of every pixel, each broadcast to all lanes
    C         per register 2 vpmaddwd and 2 vpaddd

Zen 4 at 3.7 GHz, 1 thread, to u8; limit 237 Gop/s, GEMM reaches 188: 3x3 56x56x64 1317 us = 171 (of
the taps inside), 7x7x512 1100 us = 172, 1x1 56x56 256->64 625 us = 164, 64->256 + residual 687 us =
150. All tiles from 4x4 to 10x2 are alike; B as s8 is 3 to 5 % slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Conv
from ._conv_int import IntegerConv
from ._dot import Dot16


@dataclass(frozen=True)
class Params:
    mr: int = 4  # neighbouring pixels kept in registers
    nr: int = 4  # vectors of filters kept in registers
    wide: bool = True  # B stored as s16: twice the memory, nothing to widen
    prefetch: bool = False  # of the next panel of weights to L2
    defer: bool = False  # store a tile during the k-steps of the next
    chunk: int = 1024  # KiB of A, R and C that stay in L2 while panels pass; 0: all by each panel
    ahead: bool = False  # prefetch what tiles of the next chunk read and write


class Conv16(Dot16, IntegerConv):
    """The micro-kernel on operands of 16 bits, for both vector widths."""

    Params: Any = Params

    def registers(self, params: Params) -> int:
        # C tile, a step of B, a broadcast of A, a product
        return params.mr * params.nr + 2 * params.nr + 2


class ConvAvx512(Conv16):
    name = "conv_u8s8s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {
        "mr": (1, 2, 4, 5, 6, 7, 8),
        "nr": (1, 2, 3, 4),
        "wide": (False, True),
        "prefetch": (False,),
        "defer": (False, True),
        "chunk": (0, 256, 1024),
        "ahead": (False, True),
    }
    bits = 512
    gops = 185.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        nr, mr = self.tile(workload, {4: 4, 3: 5, 2: 7, 1: 8})
        return Params(mr, nr)


KERNEL = ConvAvx512()
