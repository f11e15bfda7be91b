"""Group convolution u8 x s8 -> s32, AVX-512 VNNI.

C[h, w, g*F + f] = sum over kh, kw, c of A[h*s + kh, w*s + kw, g*G + c] * B[kh, kw, c, g*F + f]

vpdpbusd adds 4 channels of A times their weights to each of 16 s32 lanes. 2 groups of 2 channels
count as one of 4, with zeros between. What one operand of A, and the lanes that it meets, hold:

    4 a group    16 bytes  g0 g1 g2 g3              4 filters x 4 groups    1 vector; two operands
    8 a group    16 bytes  g0 lo, g0 hi, g1 lo, ..  4 filters x 2 groups x 2 halves      2 vectors
    16, 32       4 bytes of one group               16 filters                      1 or 2 vectors

A cell is 4 to 14 pixels of a row: an operand of A is loaded once for all kw, a vector of weights
once for all pixels. Per 16 filters 3x3 takes 9, 18, 36 or 72 vpdpbusd, the port of one cycle each;
the end of a cell one cycle for vmulps on the same ports, and conversions and shuffles on others, if
they are spread between the multiply-adds (see _groupconv_loops). A register is best stored by
vextract: a plain store of 16 bytes costs half a cycle of vpdpbusd, one of 64 bytes 1.3, and
vpaddsw one, which is why the zero point is added by vpminsw and vpaddw.

Zen 4 at 3.7 GHz, 1 thread, u8 to u8, 3x3, Gop/s with taps in the padding (vpdpbusd alone: 474, and
2, 5, 10, 22 % more at 56, 28, 14, 7 pixels, where taps are left out). Times faster than the best
of ONNX Runtime, OpenVINO and torch, geometric mean 2.85, are of another run, with zero points of
A and C, which take 8 % at 4 a group and 0 to 2 % else:

    56x56x128, 4 a group     77 us  377  5.1      56x56x256 /2, 8 a group    71 us  408  3.2
    28x28x256, 8             66     438  2.0      28x28x512 /2, 16           61     474  2.1
    14x14x512, 16            58     501  1.5      14x14x1024 /2, 32          57     506  2.3
    7x7x1024, 32             51     563  2.3      56x56x64, 2                38     189  7.5

Tried and left: prefetch of the next rows of A and C, no gain; vpmovusdb instead of packs, 2 %
slower; kh unrolled with the weights kept in registers, no gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...machine import Machine
from ...workload import Conv
from ._groupconv import IntegerGroupConv, Scheme, merge_groups, one_group, pixels, repeated
from ._ir import T, bits, intrinsic


@dataclass(frozen=True)
class Params:
    pixels: int = 8  # at most, of a row of C kept in registers
    vectors: int = 1  # at most, of 16 filters kept in registers
    blocks: int = 4  # that a row of C is computed for before the next row
    overlap: bool = True  # the end of a cell goes between the multiply-adds of the next one


class GroupConvVnni(IntegerGroupConv):
    name = "groupconv_u8s8s32_vnni"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
    Params: Any = Params
    SPACE: ClassVar = {
        "pixels": (4, 7, 8, 14),
        "vectors": (1, 2),
        "blocks": (2, 4, 8),
        "overlap": (True, False),
    }
    gops = 420.0

    def registers(self, params: Params) -> int:
        # cell, weights of 3 taps, A
        return params.pixels * params.vectors + 3 * params.vectors + 2

    def default(self, workload: Conv, machine: Machine) -> Params:
        group, filters, *_ = merge_groups(workload)
        choices: tuple[int, ...]
        if group <= 8:
            choices, vectors = ((7, 8, 6, 5), 2) if group == 4 else ((4, 7, 5), 1)
        else:
            choices, vectors = ((7, 6, 5), 2) if filters % 32 == 0 else ((14, 13, 12, 11, 10), 1)
        return Params(pixels(workload.outputs[2], choices), vectors)

    def scheme(self, work: Conv, params: Params) -> Scheme | None:
        sizes = merge_groups(work)
        group, filters, groups, merged = sizes
        if group == filters and group in (4, 8):
            span, parts = 16 // group, group // 4
            if groups < span:
                return None
            many = params.vectors if groups >= params.vectors * span else 1
            return Scheme(16, 4, span, parts, many * parts, group, filters, groups, merged, many)
        return one_group(16, 4, 1, params.vectors, sizes)

    def encode(self, lanes: np.ndarray) -> np.ndarray:
        return lanes.view(np.uint8).reshape(-1)

    def a_operand(self, raw: Any, scheme: Scheme) -> Any:
        return T.Bind(bits("int8x64", repeated(raw, scheme.a_bytes, 64)))

    def multiply_add(self, acc: Any, a: Any, w: Any, scheme: Scheme) -> Any:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return intrinsic("int32x16", name, acc, a, bits("int8x64", w))


KERNEL = GroupConvVnni()
