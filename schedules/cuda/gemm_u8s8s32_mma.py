"""GEMM u8/s8 x s8 -> s32, tensor cores (mma.sync m16n8k32), sm_80 and later.

A block computes bm x bn of C, bm = rows*wm, bn = columns*wn; a warp wm x wn of it, in registers.

    for every 64*split of K:                               `stages` of them are under way
        A  bm x 64 x split -> shared memory, 16 bytes a cp.async, chunks swizzled
        B  bn x 64 x split -> shared memory, as packed
        warp (row, column, part): 2 k-steps of 32: ldmatrix of A, 16 bytes of B a lane, mma

B is packed in the order of the fragments: of 8 columns and 64 of K every lane has 16 consecutive
bytes, its words of two mma. Nothing of B has to be rearranged, reading it has no bank conflict.
Which columns of C those 8 are is free too: a warp's columns are dealt so that the numbers of C
that a lane holds of a row are consecutive, 16 bytes where there are as many. C goes from registers
to memory by 16 bytes a lane, whole sectors, with no detour over shared memory.

A's 16-byte chunk c of row r lies at c ^ (r/2 % 4): 8 rows of ldmatrix are 8 different groups of
banks, and so are the 8 chunks that neighbouring lanes copy.

`split` > 1: groups of warps each take their own 64 of K out of every split*64, and are added up
through shared memory in the end. It gives small M, whose few tiles would each be one long chain of
loads, the parallel loads that the memory wants.

Expected, not measured on a GPU. mma.sync reaches some 62 % of the 1979 Tops of H100's wgmma, 6.2
clocks an mma and tensor core. A warp tile of 64 x 32 reads 3 KiB of shared memory for 16 mma: with
one warp on each of 4 tensor cores 12 KiB in 99 clocks, 97 % of the 128 bytes a clock that there
are; 64 x 64 reads 4 KiB for 32 mma: 65 %. So large tiles are of 64 x 64. Blocks of 128 x 128 do 128
operations for a byte: 132 SMs at 1227 Tops would read 9.6 TB/s, more than L2 gives (5.5); of 128 x
256, 7.2. Blocks side by side run at the same time and share A's lines on the way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...machine import Gpu, Machine
from ...workload import Gemm, GemmWeights
from ._gemm_int import Constants, IntegerGemm, pack
from ._ir import ceil_div

_ITEM = {"u8": 1, "s8": 1, "s32": 4, "f32": 4}


@dataclass(frozen=True)
class Params:
    wm: int = 64  # rows of C that a warp keeps in registers
    wn: int = 32  # columns of them
    rows: int = 2  # warps of a block, one below the other
    columns: int = 2  # warps side by side
    split: int = 1  # groups of such warps that divide K among them
    stages: int = 3  # tiles of A and B in shared memory

    @property
    def bm(self) -> int:
        return self.wm * self.rows

    @property
    def bn(self) -> int:
        return self.wn * self.columns

    @property
    def threads(self) -> int:
        return 32 * self.rows * self.columns * self.split

    @property
    def shared(self) -> int:
        """Bytes of shared memory: tiles, and later the sums of all groups but the first."""
        tiles = self.stages * self.split * (self.bm + self.bn) * 64
        return max(tiles, (self.split - 1) * self.bm * self.bn * 4)


@dataclass(frozen=True)
class Layout:
    """Where everything is in W: for every bn columns, for every 64 of K, bn * 64 bytes."""

    blocks: int
    steps: int  # of 64 of K, a multiple of split
    at: Constants


def run(params: Params, out: str) -> int:
    """Consecutive columns of C that a lane holds."""
    return min(params.wn // 4, 16 // _ITEM[out])


def column_order(params: Params, out: str) -> np.ndarray:
    """(wn,): which of a warp's columns of C is column f of the 8 of its mma number j, at 8j + f."""
    size = run(params, out)
    j, f = np.divmod(np.arange(params.wn), 8)
    lane, e = f // 2, f % 2
    group, pair = np.divmod(j, size // 2)
    return group * 4 * size + lane * size + pair * 2 + e


class GemmMma(IntegerGemm):
    name = "gemm_u8s8s32_mma"
    features = ("sm_80",)
    Params: Any = Params
    SPACE: ClassVar = {
        "wm": (16, 32, 64),
        "wn": (8, 16, 32, 64),
        "rows": (1, 2),
        "columns": (1, 2, 4),
        "split": (1, 2, 4, 8),
        "stages": (2, 3, 4),
    }

    def registers(self, params: Params) -> int:
        """Sums, words of A and B of two steps, and what addresses take."""
        tiles, fragments = params.wm // 16, params.wn // 8
        return 4 * tiles * fragments + 8 * tiles + 4 * fragments + 56

    def legal(self, params: Params, machine: Machine) -> bool:
        """Whether a block fits the machine, and its parts each other.

        Warps that keep much of C have no registers for many copies, so there must be 4 of them;
        sums of parts of K go through shared memory, for which large tiles are too large.
        """
        shared = machine.shared if isinstance(machine, Gpu) else 48 << 10
        return (
            64 <= params.threads <= 256
            and params.shared <= shared
            and params.threads * self.registers(params) <= 65536
            and (params.wm * params.wn < 2048 or params.threads >= 128)
            and (params.split == 1 or params.bm * params.bn <= 4096)
        )

    def candidates(self, machine: Machine, workload: Gemm | None = None) -> Iterator[Any]:
        for params in super().candidates(machine, workload):
            if self.legal(params, machine):
                yield params

    def default(self, workload: Gemm, machine: Machine) -> Params:
        """The best by `estimate` of some points that suit many shapes."""
        points = [Params(64, 32, 2, 2, 1, 3), Params(32, 32, 2, 2, 1, 4)]  # for any m
        if workload.m is not None:
            points += [Params(64, 64, 2, 2, 1, 3), Params(64, 64, 2, 4, 1, 3)]
            points += [Params(32, 32, 1, 2, 2, 3), Params(16, 32, 1, 2, 4, 3)]
            points += [Params(16, 16, 1, 1, 8, 2), Params(16, 8, 1, 1, 8, 3)]
            points += [Params(16, 16, 1, 2, 4, 3), Params(16, 8, 1, 2, 4, 4)]
        points = [p for p in points if self.legal(p, machine)]
        return min(points, key=lambda p: self.estimate(workload, p, machine))

    def effect(self, workload: Gemm, params: Params) -> Hashable:
        """Stages beyond the number of tiles of K, and parts of K beyond its 64s, are the same."""
        tiles = ceil_div(ceil_div(workload.k, 64), params.split)
        return replace(params, stages=min(params.stages, max(2, tiles)))

    def estimate(self, workload: Gemm, params: Params, machine: Machine) -> float:
        """Nanoseconds; for an open m the geometric mean over some m.

        The slower of tensor cores, shared memory and L2 for the tiles that are computed at a
        time, times the rounds in which all tiles get their turn, plus start, end and latency.
        """
        assert isinstance(machine, Gpu)
        if not self.legal(params, machine):
            return float("inf")
        sizes = (64, 256, 1024, 4096) if workload.m is None else (workload.m,)
        each = [self._nanoseconds(m, workload, params, machine) for m in sizes]
        return prod(each) ** (1 / len(each))

    def _nanoseconds(self, m: int, work: Gemm, params: Params, machine: Gpu) -> float:
        blocks = ceil_div(m, params.bm) * ceil_div(work.n, params.bn)
        warps = params.threads // 32
        resident = max(
            1,
            min(
                65536 // (params.threads * self.registers(params)),
                machine.shared // params.shared,
                2048 // params.threads,
            ),
        )
        rounds = ceil_div(blocks, machine.multiprocessors)  # tiles of the busiest multiprocessor
        together = min(rounds, resident)
        steps = ceil_div(ceil_div(work.k, 64), params.split)
        mma = 2 * (params.wm // 16) * (params.wn // 8) * warps  # a stage's
        rate = 6.2 if int(machine.arch[3:]) >= 90 else 8.0
        # tensor cores idle where there are fewer warps than 2 for each
        busy = min(1.0, warps * together / 8)
        tensor = mma / 4 * rate / busy
        reads = (
            warps * 64 * (params.wm + params.wn) / 128
            + params.split * 64 * (params.bm + params.bn) / 128
        )
        l2 = params.split * 64 * (params.bm + params.bn) / 24  # bytes a clock and multiprocessor
        latency = 800 / (params.stages - 1) / together
        stage = max(tensor, reads, l2, latency)
        end = 900 + 12 * params.bm * params.bn / 128 * (1 + 0.3 * (params.split - 1))
        return (rounds * (steps * stage + end / together) + 1500) / machine.clock

    def layout(self, workload: Gemm, params: Params) -> Layout:
        blocks = ceil_div(workload.n, params.bn)
        steps = ceil_div(ceil_div(workload.k, 64), params.split) * params.split
        size = blocks * steps * params.bn * 64
        return Layout(blocks, steps, Constants.after(size, blocks * params.bn, workload))

    def pack(self, workload: Gemm, weights: GemmWeights, params: Params) -> np.ndarray:
        """B as (block, 64 of K, warp, mma, lane, 2 k-steps x 2 words x 4 of K)."""
        lay = self.layout(workload, params)
        full = np.zeros((lay.steps * 64, lay.blocks * params.bn), np.int8)
        full[: workload.k, : workload.n] = weights.b
        full = full.reshape(lay.steps, 64, lay.blocks, params.columns, params.wn)
        full = full[..., column_order(params, workload.out)]
        # k of a step: 2 k-steps, 2 words, 4 lanes, 4 bytes; columns: warps, mma, 8 lanes
        full = full.reshape(lay.steps, 2, 2, 4, 4, lay.blocks, params.columns, params.wn // 8, 8)
        tiles = np.ascontiguousarray(full.transpose(5, 0, 6, 7, 8, 3, 1, 2, 4))
        return pack(workload, weights, tiles, lay.at)

    def build(self, workload: Gemm, params: Params, machine: Machine) -> Any:
        from ._gemm_mma import Builder

        return Builder(self, workload, params, run(params, workload.out)).function()


KERNEL = GemmMma()
