"""Depthwise convolution u8 x s8 -> s32, AVX-512 without VNNI, exact for all 8 bits.

vpmaddubsw would saturate (2*255*128 > 2**15), so pixels are widened to 16 bits and vpmaddwd sums
products of two neighbouring columns in s32:

    pixel x    c0 c1 c2 ..   vpunpckbw with 0   c0 | c1 | ..   vpunpckwd   c0: x0 x1 | c1: x0 x1
    pixel x+1  c0 c1 c2 ..   ---------------->  c0 | c1 | ..   -------->   ..

Once per row of A; a kernel of width 3 uses two such windows, the same for two outputs (weights
w0 w1, w2 0 and 0 w0, w1 w2). Instructions for 64 outputs of a 3x3, stride 1: 24 vpmaddwd, 24
vpaddd, 4 unpacks and 15 of the epilogue: 67, at 2 a cycle 33.5 cycles, 127 Gop/s.

Zen 4 at 3.7 GHz, 1 thread, to u8: 28x28x192 30.5 us = 89 Gop/s = 48 cycles, stride 2 9.7 us = 70;
5x5 28x28x240 97 us = 97; 3x3x3 8x14x14x256 209 us = 104.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...machine import Machine
from ...workload import Conv
from ._depthwise import Depthwise
from ._depthwise_cell import unpack
from ._ir import bits, intrinsic, splat

_MADD = {
    64: "llvm.x86.avx512.pmaddw.d.512",
    32: "llvm.x86.avx2.pmadd.wd",
    16: "llvm.x86.sse2.pmadd.wd",
}


@dataclass(frozen=True)
class Params:
    pixels: int = 8  # outputs whose sums are in registers at a time
    strip_bytes: int = 24 << 10  # of A unpacked, to stay in L1
    unroll: int = 4  # windows made at a time


class Depthwise16(Depthwise):
    """Windows of two columns, widened to 16 bits, for both vector widths."""

    Params: Any = Params
    taps = 2

    def encode(self, windows: np.ndarray) -> np.ndarray:
        return windows.astype(np.int16).view(np.uint8)

    def windows(
        self, columns: list[int], pixel: Callable[[int], Any], made: dict[Any, Any], width: int
    ) -> list[Any]:
        """Two columns in the words of the dwords of four vectors."""
        parts = []
        for column in columns:
            key = (column, "wide")
            if key not in made:
                value, zero = pixel(column), splat(0, "int8", width)
                made[key] = [unpack(value, zero, high, 1, width) for high in (False, True)]
            parts.append(made[key])
        first, second = parts
        return [
            unpack(first[half], second[half], high, 2, width)
            for half in (0, 1)
            for high in (False, True)
        ]

    def multiply_add(self, acc: Any, window: Any, weight: Any, width: int) -> Any:
        words = f"int16x{width // 2}"
        operands = bits(words, window), bits(words, weight)
        return acc + intrinsic(f"int32x{width // 4}", _MADD[width], *operands)


class DepthwiseAvx512(Depthwise16):
    name = "depthwise_u8s8s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {
        "pixels": (4, 6, 8),
        "strip_bytes": (16 << 10, 24 << 10, 40 << 10),
        "unroll": (4,),
    }
    bits = 512
    gops = 90.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        return Params()


KERNEL = DepthwiseAvx512()
