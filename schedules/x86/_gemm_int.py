"""What the integer GEMM kernels share: packed layout, row blocks, panels, threads.

W holds, each part 64-byte aligned: the panels, then one value per column (padded to whole vectors)
of: base s32 · scale f32 · bias f32 · b_zero s32 · b_sum s32, then 64 bytes 0x80 that flip the top
bits of s8 activations (all but base only where used).

    panel 0              panel 1              ...   last panel: the nr that are left
    +-------------------+-------------------+
    | step 0: v0 .. v(nr-1) | step 1: ...   |       a vector: `lanes` columns x 4 k
    +-------------------+-------------------+

A k-step reads 4 bytes of a row of A. Where K % 4 != 0 the last step reads the last 4 bytes of the
row again and the weights of those already used are 0, so nothing past a row is ever read.

s8 activations are read as a + 128 (the top bit flipped), which makes them u8 with a zero point
that is 128 higher:  sum (a-az)(b-bz) = sum a*b - az*(sum b - K*bz) - bz * sum a.
The part without A's row sum is where the accumulators start.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Gemm, GemmWeights
from ._dot import Dot


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """Where everything is in W. `lanes` columns per vector, `vectors` of them in panels of `nr`."""

    lanes: int
    nr: int
    vectors: int
    steps: int
    step_bytes: int  # of one vector in one k-step
    base: int  # the rest: byte offsets
    scale: int
    bias: int
    b_zero: int
    b_sum: int
    flip: int
    nbytes: int

    @property
    def panels(self) -> int:
        return ceil_div(self.vectors, self.nr)


class IntegerGemm(Dot, Kernel):
    """C = epilogue(A x B) for u8 or s8 A and s8 B; a vocabulary says how 4 bytes of A meet B."""

    def refuses(self, workload: Gemm) -> str | None:
        if workload.a not in ("u8", "s8") or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 or s8 x s8"
        if self.seven_bits and workload.b_bits > 7:
            return "weights beyond +-64 overflow the 16-bit sums of products"
        return None

    def flips(self, workload: Gemm) -> bool:
        """Whether A is read with its top bits flipped."""
        return workload.a == "s8" and not self.staged

    def lanes(self, workload: Gemm) -> int:
        """Columns per vector: half vectors where they hold all of N."""
        return 8 if workload.n <= 8 else self.bits // 32

    def tile(
        self, workload: Gemm, rows: Mapping[int, tuple[int, ...]], one_row: int
    ) -> tuple[int, int]:
        """(mr, nr) of an analytic default: `rows` has by nr the good mr, the best first.

        Panels are made equal. Tiles are too, where M is a multiple of some mr: that saves a
        second variant of the code. An open M needs a variant for every smaller M: the least mr.
        One row is bound by memory: `one_row` vectors in flight.
        """
        m, vectors = workload.m, ceil_div(workload.n, self.lanes(workload))
        if m == 1:
            return 1, min(vectors, one_row)
        nr = ceil_div(vectors, ceil_div(vectors, max(rows)))
        choices = rows[nr]
        if m is None:
            return min(choices), nr
        if m <= max(choices):
            return m, nr
        return next((mr for mr in choices if m % mr == 0), choices[0]), nr

    def effect(self, workload: Gemm, params: Any) -> Hashable:
        vectors = ceil_div(workload.n, self.lanes(workload))
        mr = params.mr
        if workload.m is not None:
            mr = ceil_div(workload.m, ceil_div(workload.m, mr))
        return replace(params, mr=mr, nr=min(params.nr, vectors))

    def estimate(self, workload: Gemm, params: Any, machine: Machine) -> float:
        """Cycles, weights in the second-level cache; for an open m per row, of some m."""
        lanes = self.lanes(workload)
        vectors, steps = ceil_div(workload.n, lanes), ceil_div(workload.k, 4)
        whole, rest = divmod(vectors, params.nr)
        total = 0.0
        for m in (1, 4, 16, 64) if workload.m is None else (workload.m,):
            blocks = ceil_div(m, params.mr)
            rows = m / blocks

            def tile(nr: int, rows: float = rows) -> float:
                end = 20 + 2 * rows * nr * lanes / 8
                return end + steps * self.step_cycles(rows, nr, lanes, params)

            total += (whole * tile(params.nr) + (tile(rest) if rest else 0.0)) * blocks / m
        return total

    def layout(self, workload: Gemm, params: Any) -> Layout:
        lanes = self.lanes(workload)
        vectors, steps = ceil_div(workload.n, lanes), ceil_div(workload.k, 4)
        step_bytes = self.encode(np.zeros((lanes, 4), np.int8), params).size
        row = ceil_div(vectors * lanes * 4, 64) * 64
        offsets = [ceil_div(vectors * steps * step_bytes, 64) * 64]
        scaled, biased = workload.out != "s32", workload.bias == "f32"
        for used in (True, scaled, biased, workload.b_zero, workload.runtime):
            offsets.append(offsets[-1] + (row if used else 0))
        offsets.append(offsets[-1] + (64 if self.flips(workload) else 0))
        return Layout(lanes, params.nr, vectors, steps, step_bytes, *offsets)

    def pack(self, workload: Gemm, weights: GemmWeights, params: Any) -> np.ndarray:
        lay = self.layout(workload, params)
        n, k = workload.n, workload.k
        columns = lay.vectors * lay.lanes
        quads = np.zeros((lay.steps * 4, columns), np.int8)
        whole = k // 4 * 4
        quads[:whole, :n] = weights.b[:whole]
        if k % 4:  # right-aligned, as the last step reads the last 4 bytes of a row
            end = lay.steps * 4 if k >= 4 else k
            quads[end - k % 4 : end, :n] = weights.b[whole:]
        quads = quads.reshape(lay.steps, 4, lay.vectors, lay.lanes).transpose(2, 0, 3, 1)
        steps = self.encode(np.ascontiguousarray(quads), params)
        steps = steps.reshape(lay.vectors, lay.steps, lay.step_bytes)
        out = np.zeros(lay.nbytes, np.uint8)
        for first in range(0, lay.vectors, lay.nr):
            panel = steps[first : first + lay.nr].transpose(1, 0, 2)
            start = first * lay.steps * lay.step_bytes
            out[start : start + panel.size] = panel.reshape(-1)

        def put(offset: int, values: np.ndarray, dtype: str) -> None:
            raw = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
            out[offset : offset + raw.size] = raw

        sums = weights.b.astype(np.int64).sum(axis=0)
        if workload.b_zero:
            assert weights.b_zero is not None
            sums = sums - k * weights.b_zero.astype(np.int64)
            put(lay.b_zero, weights.b_zero, "int32")
        base = np.zeros(n, np.int64)
        if workload.bias == "s32":
            assert weights.bias is not None
            base += weights.bias
        if workload.runtime:
            put(lay.b_sum, sums, "int32")
        else:
            base -= (weights.a_zero + (128 if self.flips(workload) else 0)) * sums
        out[lay.flip :] = 0x80
        put(lay.base, base.astype(np.int32), "int32")
        if workload.out != "s32":
            assert weights.scale is not None
            put(lay.scale, weights.scale, "float32")
        if workload.bias == "f32":
            assert weights.bias is not None
            put(lay.bias, weights.bias, "float32")
        return out

    def build(self, workload: Gemm, params: Any, machine: Machine) -> Any:
        from ._gemm_loops import Builder

        return Builder(self, workload, params, machine).function()
