"""Group convolution u8 x s8 -> s32, AVX-512 without VNNI, exact for all 8 bits of both operands.

vpmaddwd sums products of pairs of channels in s32: weights are stored as s16, and A is widened as
it is loaded, a broadcast and a vpmovzxbw for all kw and filters. What one operand of A holds, as
in groupconv_u8s8s32_vnni, and the lanes that it meets; pairs of the same group are added up last:

    2, 4 a group    16 bytes    4 groups x 2 pairs    2 filters                   2 vectors
    8 a group       4 bytes     2 pairs               4 filters of 256 bits       2 vectors
    16, 32          4 bytes     2 pairs               8 filters                   2 vectors

Per 16 filters 3x3 takes 18 to 144 vpmaddwd and as many vpaddd: the limit on Zen 4 at 3.7 GHz is
that of one vpmaddwd per cycle, 237 Gop/s. 1 thread, u8 to u8, 3x3, Gop/s with taps in the padding:

    56x56x128, 4 a group    182 us  159      56x56x256 /2, 8 a group    223 us  130
    28x28x256, 8            184     157      28x28x512 /2, 16           164     176
    14x14x512, 16           144     201      14x14x1024 /2, 32          153     188
    7x7x1024, 32            126     229      56x56x64, 2                 90      80
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...machine import Machine
from ...workload import Conv
from ._groupconv import IntegerGroupConv, Scheme, merge_groups, one_group, pixels, repeated
from ._ir import T, bits, intrinsic, tirx

_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}


@dataclass(frozen=True)
class Params:
    pixels: int = 4  # at most, of a row of C kept in registers
    vectors: int = 1  # of filters of a group kept in registers, if it has as many
    blocks: int = 4  # that a row of C is computed for before the next row
    overlap: bool = True  # the end of a cell goes between the multiply-adds of the next one


class GroupConv16(IntegerGroupConv):
    """The micro-kernel on operands of 16 bits, for both vector widths."""

    Params: Any = Params
    lanes: ClassVar[int]

    def registers(self, params: Params) -> int:
        # cell, A, a product; weights are read where they are used
        return 2 * params.pixels * params.vectors + 2

    def scheme(self, work: Conv, params: Params) -> Scheme | None:
        sizes = merge_groups(work)
        group, filters, groups, merged = sizes
        if group == filters == 4:
            span = self.lanes // 4
            if groups < span:
                return None
            return Scheme(self.lanes, 2, span, 2, 2, group, filters, groups, merged)
        return one_group(8 if filters == 8 else self.lanes, 2, 2, params.vectors, sizes)

    def encode(self, lanes: np.ndarray) -> np.ndarray:
        return lanes.astype(np.int16).view(np.uint8).reshape(-1)

    def a_operand(self, raw: Any, scheme: Scheme) -> Any:
        size = 2 * scheme.lanes
        return T.Bind(tirx.Cast(f"int16x{size}", repeated(raw, scheme.a_bytes, size)))

    def multiply_add(self, acc: Any, a: Any, w: Any, scheme: Scheme) -> Any:
        lanes = scheme.lanes
        return acc + intrinsic(f"int32x{lanes}", _MADD[lanes], a, bits(f"int16x{2 * lanes}", w))


class GroupConvAvx512(GroupConv16):
    name = "groupconv_u8s8s32_avx512"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    SPACE: ClassVar = {
        "pixels": (4, 5, 7, 8, 14),
        "vectors": (1, 2),
        "blocks": (2, 4, 8),
        "overlap": (True, False),
    }
    lanes = 16
    gops = 180.0

    def default(self, workload: Conv, machine: Machine) -> Params:
        filters, dense = workload.filters // workload.groups, workload.strides[2] == 1
        choices = (7, 8, 6, 5) if dense or filters <= 8 else (14, 13, 12, 11, 10)
        blocks = 8 if filters == 8 else 4
        return Params(pixels(workload.outputs[2], choices), 1, blocks, overlap=dense)


KERNEL = GroupConvAvx512()
