"""Depthwise convolution u8 x s8 -> s32, AVX-512 VNNI.

C[y, x, c] = sum over ky, kx of A[y + ky, x + kx, c] * B[ky, kx, c]

vpdpbusd adds to each of 16 s32 lanes, here channels, the sum of 4 products u8 x s8: neighbouring
columns of a row. Bytes, then words of 4 pixels of 64 channels are unpacked to 4 vectors of dwords,
once per row of A; kernels of width 3 use each for two outputs (weights w0 w1 w2 0 and 0 w0 w1 w2):

    pixel x    c0 c1 c2 ..              c0: x0 x1 | c1: x0 x1            c0: x0 x1 x2 x3 | c1: ..
    pixel x+1  c0 c1 c2 ..   vpunpckbw  ..                     vpunpckwd ..
    pixel x+2, x+3           ------->   c0: x2 x3 | c1: x2 x3  ------->

vpackssdw and vpackuswb put the sums back in order. Instructions for 64 outputs of a 3x3, stride 1:
12 vpdpbusd, 3 unpacks, 4 x (vcvtdq2ps, vmulps, vcvtps2dq), 3 packs: 30, at 2 a cycle 15 cycles;
but 16 of them, vpdpbusd and vmulps, go to the same pipes, 1 a cycle: 16 cycles, 266 Gop/s. Stride
2 stores pairs of columns instead, joined when used: 12 + 16 + 15 instructions, 21.5 cycles.

Zen 4 at 3.7 GHz, 1 thread, to u8: 28x28x192 12.6 us = 214 Gop/s = 20 cycles, 14x14x576 10.4 us =
196, 7x7x960 5.0 us = 169, stride 2 28x28x192 5.1 us = 133; 5x5 28x28x240 54 us = 173; 3x3x3
8x14x14x256 110 us = 197. Channels that are no multiple of 64 lose: pixels straddle cache lines,
16 that are left take 12.5 cycles a pixel, 32 take 11.2 (56x56x144 62 us = 131). Cells of 4 outputs
instead of 8 win 15 % where pairs are joined, lose 4 % elsewhere.
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
from ._ir import intrinsic


@dataclass(frozen=True)
class Params:
    pixels: int = 8  # outputs whose sums are in registers at a time
    strip_bytes: int = 24 << 10  # of A unpacked, to stay in L1
    unroll: int = 4  # windows made at a time


class DepthwiseVnni(Depthwise):
    name = "depthwise_u8s8s32_vnni"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
    Params: Any = Params
    SPACE: ClassVar = {
        "pixels": (4, 6, 8, 10),
        "strip_bytes": (16 << 10, 24 << 10, 40 << 10),
        "unroll": (4,),
    }
    taps = 4
    bits = 512
    gops = 180.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        # joining pairs takes registers, and code
        return Params(pixels=4 if self.plan(workload, Params()).paired else 8)

    def encode(self, windows: np.ndarray) -> np.ndarray:
        return windows.view(np.uint8)

    def windows(
        self, columns: list[int], pixel: Callable[[int], Any], made: dict[Any, Any], width: int
    ) -> list[Any]:
        """Two columns in the words of two vectors, or four in the dwords of four."""
        pairs = []
        for first, second in zip(columns[::2], columns[1::2], strict=True):
            key = (first, second)
            if key not in made:
                a, b = pixel(first), pixel(second)
                made[key] = [unpack(a, b, high, 1, width) for high in (False, True)]
            pairs.append(made[key])
        if len(pairs) == 1:
            return pairs[0]
        return [
            unpack(pairs[0][half], pairs[1][half], high, 2, width)
            for half in (0, 1)
            for high in (False, True)
        ]

    def multiply_add(self, acc: Any, window: Any, weight: Any, width: int) -> Any:
        name = f"llvm.x86.avx512.vpdpbusd.{8 * width}"
        return intrinsic(f"int32x{width // 4}", name, acc, window, weight)


KERNEL = DepthwiseVnni()
