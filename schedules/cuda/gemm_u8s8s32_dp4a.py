"""GEMM u8/s8 x s8 -> s32 of few rows by dp4a, sm_80 and later: as fast as the weights come.

A block computes all rows of `columns` columns of C, its warps take turns in K.

    lane = part * columns + column, 32/columns parts:       a step is 32/columns * 16 of K
        B  16 bytes a lane, packed so that a warp reads 512 consecutive ones, each byte once
        A  16 bytes of every row, the same for all lanes of a part: from L1, one address a part
        M x 4 dp4a
    parts are added up by shuffles, warps through shared memory

No tile has to be filled and nothing is staged: all loads of a warp's first `ahead` steps leave
before the first number is needed.

Expected, not measured on a GPU. N x K bytes at H100's 3.35 TB/s: 1024 x 1024 0.3 us, 4096 x 4096 5
us (from L2, where they fit and stay, about 1.6 times as fast); an A100 2.0 TB/s: 0.5 and 8.4 us.
Both need 2.3 MB under way for HBM's latency of 0.7 us, 17 KiB a multiprocessor: 9 warps with 4
steps each. 512 bytes are 35 clocks of a multiprocessor's share of HBM; a step takes 4*M clocks for
A (16 bytes for 32 lanes) and 2*M for 4*M dp4a: up to 5 rows the weights are the limit, with 8 rows
the two are about equal. Beyond, tensor cores do it with less: this kernel refuses.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...machine import Gpu, Machine
from ...workload import Gemm, GemmWeights
from ._gemm_int import Constants, IntegerGemm, pack
from ._ir import ceil_div

_MOST_ROWS = 8


@dataclass(frozen=True)
class Params:
    columns: int = 8  # of a block: 8, 16 or 32
    warps: int = 8  # that divide K among them
    ahead: int = 2  # steps of a warp whose loads are under way together

    @property
    def step(self) -> int:
        """How much of K a warp takes at a time."""
        return 512 // self.columns


@dataclass(frozen=True)
class Layout:
    """Where everything is in W: for every block, for every step, 16 bytes of every lane."""

    blocks: int
    steps: int
    at: Constants


class GemmDp4a(IntegerGemm):
    name = "gemm_u8s8s32_dp4a"
    features = ("sm_80",)
    Params: Any = Params
    SPACE: ClassVar = {"columns": (8, 16, 32), "warps": (1, 2, 4, 8, 16), "ahead": (1, 2, 4)}

    def refuses(self, workload: Gemm) -> str | None:
        if workload.m is None or workload.m > _MOST_ROWS:
            rows = "as many rows as come" if workload.m is None else f"{workload.m} rows"
            return f"{rows}, more than {_MOST_ROWS} are work for tensor cores"
        return super().refuses(workload)

    def registers(self, params: Params) -> int:
        """Sums, words of B, of a row of A, addresses."""
        return 2 * _MOST_ROWS + 4 * params.ahead + 4 * _MOST_ROWS + 24

    def default(self, workload: Gemm, machine: Machine) -> Params:
        """The best by `estimate` of some points, with loads for all warps."""
        points = []
        for columns in (32, 16, 8):
            steps = ceil_div(workload.k, 512 // columns)
            for most in (4, 8, 16):
                warps = next((w for w in (16, 8, 4, 2) if w <= most and steps >= 2 * w), 1)
                ahead = next((a for a in (4, 2) if steps >= a * warps), 1)
                points.append(Params(columns, warps, ahead))
        return min(points, key=lambda p: self.estimate(workload, p, machine))

    def effect(self, workload: Gemm, params: Params) -> Hashable:
        """Warps and steps ahead beyond the number of steps are idle."""
        steps = ceil_div(workload.k, params.step)
        warps = min(params.warps, steps)
        return replace(params, warps=warps, ahead=min(params.ahead, ceil_div(steps, warps)))

    def estimate(self, workload: Gemm, params: Params, machine: Machine) -> float:
        """Nanoseconds: latencies of one warp after the other, or what memory and dp4a take."""
        assert isinstance(machine, Gpu)
        m = workload.m or 1
        steps = ceil_div(workload.k, params.step)
        turns = ceil_div(steps, params.warps * params.ahead)  # waits for memory of a warp
        blocks = ceil_div(workload.n, params.columns)
        each = ceil_div(blocks, machine.multiprocessors)
        rounds = ceil_div(each * params.warps, 48)  # warps that a multiprocessor has at a time
        latency = rounds * (turns * 800 + 300 + 60 * params.warps**0.5)
        issue = each * steps * 6 * m + each * params.warps * m * 16
        bytes_of = each * (steps * 512 + m * workload.k / 2)
        memory = bytes_of * machine.multiprocessors / machine.bandwidth * machine.clock
        return (max(latency, issue, memory) + 1500) / machine.clock

    def layout(self, workload: Gemm, params: Params) -> Layout:
        blocks = ceil_div(workload.n, params.columns)
        steps = ceil_div(workload.k, params.step)
        columns = blocks * params.columns
        return Layout(blocks, steps, Constants.after(blocks * steps * 512, columns, workload))

    def pack(self, workload: Gemm, weights: GemmWeights, params: Params) -> np.ndarray:
        """B as (block, step, part, column, 16 of K)."""
        lay = self.layout(workload, params)
        full = np.zeros((lay.steps * params.step, lay.blocks * params.columns), np.int8)
        full[: workload.k, : workload.n] = weights.b
        full = full.reshape(lay.steps, params.step // 16, 16, lay.blocks, params.columns)
        return pack(workload, weights, np.ascontiguousarray(full.transpose(3, 0, 1, 4, 2)), lay.at)

    def build(self, workload: Gemm, params: Params, machine: Machine) -> Any:
        from ._gemm_dp4a import Builder

        return Builder(self, workload, params).function()


KERNEL = GemmDp4a()
