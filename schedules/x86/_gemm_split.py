"""GEMM with 16-bit sums: weights split into main and outliers, see ``dccompile.outliers``.

W holds panels of *windows* in the place of panels of k-steps, then what other integer GEMMs have
(`_gemm_int`), then the outliers as a list for every vector of columns:

    window of a vector   step 0 | .. | step P-1 | offsets     `lanes` columns x 4 k each; offsets
                                                              are s16, of 2 halves
    ends                 s32 per vector, after a 0: where its runs end in the list of all
    run                  per weight: s32 place of its k in turned A, plus in the first the column's
                         lane; s16 the weight, twice

With `workload.spill` there are neither offsets nor outliers: calibration found that sums over that
many k-steps stay in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...machine import Machine
from ...outliers import PERIODS, RUN, Runs, runs, split, steps
from ...workload import Gemm, GemmWeights
from ._dot import Dot7
from ._gemm_int import IntegerGemm, Layout, ceil_div

_FEW = 4  # rows below which reading W takes longer than multiplying


@dataclass(frozen=True)
class Params:
    mr: int = 16  # rows of C kept in registers
    nr: int = 1  # vectors of columns kept in registers
    period: int = 4  # k-steps summed in 16 bits


@dataclass(frozen=True)
class Speed:
    """Measured cycles, on Zen 4.

    `steps`: of a row, vector and k-step by period; `free`: without offsets; `wide`: of the kernel
    that widens to 16 bits. `run`: of a run of outliers on `tiles` tiles; `block`: of what else
    is done for outliers there.
    """

    steps: dict[int, float]
    free: float
    wide: float
    run: float
    block: float


@dataclass(frozen=True)
class SplitLayout(Layout):
    """`steps` are windows and `step_bytes` those of a window of a vector."""

    period: int
    offsets: bool  # a window has them
    runs: int  # most in all vectors; 0: there is no list
    ends: int  # byte offsets
    first: int


class SplitGemm(Dot7, IntegerGemm):
    """The micro-kernel on windows of k-steps, for both vector widths."""

    Params: Any = Params
    seven_bits = False
    plain: ClassVar[IntegerGemm]  # the kernel for weights without outliers: its constants, tiles
    speed: ClassVar[Speed]
    rows: ClassVar[dict[int, tuple[int, ...]]]  # by nr, good mr where nothing is an outlier
    tiles: ClassVar[int]  # of rows, to which outliers are added at once
    fewest: ClassVar[int]  # rows for which that pays
    longest: ClassVar[int]  # period, of those that calibration allows, that is the fastest

    def group(self, workload: Gemm) -> int:
        """Tiles of a block of rows with outliers: an even number, of as many rows as there are."""
        pairs = ceil_div(workload.m or 1, 2 * self.lanes(workload))
        return min(self.tiles, 2 * pairs)

    def refuses(self, workload: Gemm) -> str | None:
        if refused := super().refuses(workload):
            return refused
        if workload.m is not None and workload.m < _FEW:
            return f"{workload.m} rows are bound by memory: 16-bit sums gain nothing"
        if workload.spill:
            return None
        if not workload.outliers:
            return "the outliers of the weights are not known"
        period = self._best(workload)
        if workload.m is None or workload.m < self.fewest:
            if self.runs(workload, period):
                return "weights have outliers, which are slow where rows are few"
            if workload.m is None:
                return None
        vectors, count = ceil_div(workload.n, self.lanes(workload)), ceil_div(workload.k, 4)
        # the alternative, which for 7 bits is the same without outliers
        step = self.speed.wide if workload.b_bits > 7 else self.speed.steps[1]
        wide = step * workload.m * vectors * count
        gain = wide / self._cycles(workload, workload.m, period)
        if gain < 1:
            share = self.share(workload, period)
            return f"{share:.1%} outliers: {1 / gain:.2f}x the time of the kernel without"
        return None

    def narrowed(self, workload: Gemm) -> Gemm:
        return workload

    def period(self, workload: Gemm, params: Params) -> int:
        """K-steps of a window: at most those for which the workload has facts."""
        return min(params.period, workload.spill or max(PERIODS))

    def runs(self, workload: Gemm, period: int) -> int:
        """Most runs of outliers that the weights have."""
        if workload.spill or not workload.outliers:
            return 0
        return workload.outliers[PERIODS.index(period)]

    def share(self, workload: Gemm, period: int) -> float:
        """Outliers as a part of all weights, at most."""
        return self.runs(workload, period) * RUN / (workload.n * workload.k)

    def remark(self, workload: Gemm, params: Params) -> str:
        period = self.period(workload, params)
        if workload.spill:
            return f"16-bit sums of {period} k-steps by calibration, not for any input"
        share = self.share(workload, period)
        return f"16-bit sums of {period} k-steps, at most {share:.2%} outliers apart: exact"

    def registers(self, params: Params) -> int:
        # C tile, a window of B with its offsets, a broadcast of A, sums, the ones
        return params.mr * params.nr + params.nr * (params.period + 1) + 3

    def default(self, workload: Gemm, machine: Machine) -> Params:
        period = self._best(workload)
        if self.runs(workload, period):
            return Params(self.lanes(workload), 1, period)
        mr, nr = self.tile(workload, self.rows, 4)
        return Params(mr, nr, period)

    def _best(self, workload: Gemm) -> int:
        """The period that is estimated to be the fastest."""
        if workload.spill:
            return min(workload.spill, self.longest)
        m = workload.m or 64
        return min(PERIODS, key=lambda period: self._cycles(workload, m, period))

    def _cycles(self, workload: Gemm, m: int, period: int) -> float:
        lanes = self.lanes(workload)
        vectors, count = ceil_div(workload.n, lanes), ceil_div(workload.k, 4)
        step = self.speed.steps[min(period, max(PERIODS))]
        total = m * vectors * count * (step - self.speed.free * bool(workload.spill))
        if most := self.runs(workload, period):
            blocks = ceil_div(m, self.tiles * lanes)
            total += blocks * (most * self.speed.run + vectors * self.speed.block)
        return total

    def estimate(self, workload: Gemm, params: Params, machine: Machine) -> float:
        period = self.period(workload, params)
        plain = replace(workload, outliers=(), spill=0)
        used = self.settled(workload, params)
        tile = self.plain.Params(mr=used.mr, nr=used.nr)
        tiles = self.plain.estimate(plain, tile, machine)
        best = min(
            self.plain.estimate(plain, self.plain.Params(mr=mr, nr=nr), machine)
            for nr, rows in self.rows.items()
            for mr in rows
        )
        return self._cycles(workload, workload.m or 64, period) * max(tiles / best, 1.0)

    def effect(self, workload: Gemm, params: Params) -> Any:
        found: Any = super().effect(workload, self.settled(workload, params))
        return found

    def settled(self, workload: Gemm, params: Params) -> Params:
        """The parameters as they are used: of outliers a tile takes one vector of columns."""
        period = self.period(workload, params)
        if self.runs(workload, period):
            return Params(min(params.mr, self.lanes(workload)), 1, period)
        return replace(params, period=period)

    def layout(self, workload: Gemm, params: Params) -> SplitLayout:
        params = self.settled(workload, params)
        plain = self.plain.layout(workload, params)
        period = self.period(workload, params)
        most = self.runs(workload, period)
        offsets = period > 1 and not workload.spill
        windows = ceil_div(plain.steps, period)
        nbytes = (period + offsets) * plain.step_bytes
        moved = ceil_div(plain.vectors * windows * nbytes, 64) * 64 - plain.base
        ends = plain.nbytes + moved
        first = ends + (ceil_div(plain.vectors + 1, 16) * 64 if most else 0)
        return SplitLayout(
            lanes=plain.lanes,
            nr=plain.nr,
            vectors=plain.vectors,
            steps=windows,
            step_bytes=nbytes,
            base=plain.base + moved,
            scale=plain.scale + moved,
            bias=plain.bias + moved,
            b_zero=plain.b_zero + moved,
            b_sum=plain.b_sum + moved,
            flip=plain.flip + moved,
            nbytes=first + ceil_div(8 * RUN * most, 64) * 64,
            period=period,
            offsets=offsets,
            runs=most,
            ends=ends,
            first=first,
        )

    def pack(self, workload: Gemm, weights: GemmWeights, params: Params) -> np.ndarray:
        lay, plain = self.layout(workload, params), self.plain.layout(workload, params)
        out = np.zeros(lay.nbytes, np.uint8)
        constants = self.plain.pack(workload, weights, params)[plain.base :]
        out[lay.base : lay.base + constants.size] = constants
        columns = lay.vectors * lay.lanes
        quads = np.zeros((plain.steps, 4, columns), np.int8)
        quads[..., : workload.n] = steps(weights.b)
        main = np.zeros((lay.steps * lay.period, 4, columns), np.int8)
        main[: plain.steps] = quads
        if not workload.spill:
            cut = split(quads, lay.period)
            main[: plain.steps] = cut.main
            if lay.runs:
                found = runs(cut.outliers, workload.k)
                self._pack_runs(out, lay, found, self.group(workload))
        # (window, step, k, vector, lane) -> (vector, window, step, lane, k)
        steps_of = main.reshape(lay.steps, lay.period, 4, lay.vectors, lay.lanes)
        bytes_of = np.ascontiguousarray(steps_of.transpose(3, 0, 1, 4, 2)).view(np.uint8)
        parts = [bytes_of.reshape(lay.vectors, lay.steps, -1)]
        if lay.offsets:
            shift = cut.offsets.reshape(lay.steps, 2, lay.vectors, lay.lanes)
            shift = np.ascontiguousarray(shift.transpose(2, 0, 3, 1)).view(np.uint8)
            parts.append(shift.reshape(lay.vectors, lay.steps, -1))
            base = out[lay.base : lay.base + 4 * columns].view(np.int32)
            base -= cut.offsets.sum(axis=(0, 1), dtype=np.int32)
        windows = np.concatenate(parts, axis=2)
        for first in range(0, lay.vectors, lay.nr):
            panel = windows[first : first + lay.nr].transpose(1, 0, 2)
            start = first * lay.steps * lay.step_bytes
            out[start : start + panel.size] = panel.reshape(-1)
        return out

    def _pack_runs(self, out: np.ndarray, lay: SplitLayout, found: Runs, group: int) -> None:
        """Writes the list, of each vector's runs the first of every column first."""
        assert len(found.columns) <= lay.runs, "more outliers than the workload says"
        rank = np.arange(len(found.columns)) - np.searchsorted(found.columns, found.columns)
        vector, lane = found.columns // lay.lanes, found.columns % lay.lanes
        order = np.lexsort((lane, rank, vector))
        ends = np.searchsorted(vector[order], np.arange(lay.vectors + 1)).astype(np.int32)
        out[lay.ends : lay.ends + ends.nbytes] = ends.view(np.uint8)
        words = np.empty((len(order), RUN, 2), np.int32)
        words[..., 0] = found.k[order] * (group * lay.lanes)
        words[:, 0, 0] += lane[order].astype(np.int32)
        twice = np.repeat(found.values[order][..., None], 2, axis=2)
        words[..., 1] = twice.view(np.int32)[..., 0]
        out[lay.first : lay.first + words.nbytes] = words.reshape(-1).view(np.uint8)

    def build(self, workload: Gemm, params: Params, machine: Machine) -> Any:
        from ._split_loops import SplitBuilder

        return SplitBuilder(self, workload, self.settled(workload, params), machine).function()
