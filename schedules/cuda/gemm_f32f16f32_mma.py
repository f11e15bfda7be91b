"""GEMM f32 x f16 -> f32 on the tensor cores.   C[m,n] = act(sum_k A[m,k] B[k,n] + bias[n])

A (m, k) f32 · W: tiles in the order of fragments, see `_float_layout`, then bias · C (m, n) f32.
Many rows, `_split_tile`: A = high + low, two mma.m16n8k8.tf32 a product. Few, `_float_rows`: FMAs.

Accuracy, against float64, in units of 2**-24 sum |a||b| (a plain f32 sum's bound is k + 2): the
split at most 2; with the sums of a tensor core modelled as cut off, not rounded, at 24 bits, 3 to 4
for k up to 64, below 2 for long sums of both signs, of one sign 7 to 10 at k 512, 17 at 4096.

Expected, not measured on a GPU: mma.sync reaches some 62 % of H100's 495 Tflop/s in tf32, half of
it is 150: a warp tile of 32 x 64 has 32 mma for 8 of k, 200 cycles of its tensor core, and 140
instructions. 110 to 130 Tflop/s in useful operations, twice the FMA units' peak; on an A100 (156
in tf32) 60 to 70, three times. One row of 4096 x 4096, 34 MB: 12 us on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ._float_cost import split_us
from ._float_gemm import FloatGemm
from ._float_layout import Layout
from ._float_loops import Output
from ._float_tile import Source
from ._split_tile import SplitBlock, split_tile


@dataclass(frozen=True)
class SplitTile(SplitBlock):
    """Parameters: a block of many rows, and of few."""

    few: int = 8  # rows up to which the weights just pass
    columns: int = 16  # of C that a block of few rows has


class GemmF16Mma(FloatGemm):
    name = "gemm_f32f16f32_mma"
    features = ("sm_80",)
    weights = "f16"
    Params: ClassVar[type] = SplitTile
    SPACE: ClassVar = {
        "wm": (1, 2, 4),
        "wn": (1, 2, 4),
        "fm": (1, 2, 4),
        "fn": (1, 2, 4),
        "bk": (16, 32),
        "stages": (2, 3, 4),
        "few": (8, 16),
        "columns": (16, 32, 64),
    }

    def _tile_us(self, params: Any, m: int, lay: Layout, machine: Any) -> float:
        return split_us(params, m, lay, machine)

    def _tile(
        self,
        params: Any,
        lay: Layout,
        source: Source,
        out: Output,
        at: tuple[Any, Any, Any],
        thread: Any,
        m: Any,
    ) -> None:
        split_tile(params, lay, source, out, at[1:], thread, m)


KERNEL = GemmF16Mma()
