"""Convolution u8 x s8 -> s32, tensor cores (mma.sync m16n8k32), sm_80 and later.

C[p,o] = sum over taps t, channels c of A[p*stride + t, c] * B[t, c, o], as a GEMM: rows are output
pixels, columns filters, K taps x channels; the matrix of rows is never made, its pieces are copied
from A where they are. A block computes bm x bn of C, bm = wm*m, bn = wn*n:

    for every 32*each*k bytes of K:                        `stages` of them are under way
        A  bm x depth -> shared memory, 16, 8 or 4 bytes a copy, chunks swizzled
        B  bn x depth -> shared memory, as packed
        warp: `each` times 32 of its own K: ldmatrix of A and of B, mma

Which bytes a thread copies is looked up: an entry of a table in W says for a piece of K how far
from the first tap of a row it lies and which taps it needs, every row has bits of those that are
inside of A. Elsewhere the byte of A's zero point is stored, with which taps add what they would
not have: the correction for it is the same for all pixels. 1x1 convolutions have no table: they
are a GEMM whose rows may be strided. Nine taps read a pixel nine times: from L1, not L2.

With channels not a multiple of 4 bytes are loaded one by one, 4 for a store of a word: the first
layer of most models, whose K of 49 taps x 4 has little else to do.

Expected, not measured on a GPU; as for `gemm_u8s8s32_mma` an mma takes 6.2 clocks on sm_90, 62 %
of 1979 Tops, and 8 on sm_80, and L2 gives 24 bytes a clock to each multiprocessor. At 1.755 GHz:

    3x3 56x56x64, batch 32: 392 tiles of 256 x 64, 3 rounds. 9 steps of 64 take 397 clocks of mma
    each, and as many for (256/3 + 64) * 64 bytes from L2; the end of a tile 2700, half of it under
    the mma of the block beside it: 3 * 5100 clocks, 9.5 us, 0.78 Pop/s
    1x1 56x56 64 -> 256 + residual, batch 32: 400 clocks of mma a tile of 128 x 128, its end 2700,
    15 us in all; memory, where L2 does not hold it, 6.4 + 25.7 + 25.7 MB, 17 us
    3x3 7x7x512, batch 1: 49 rows, K 4608. 128 tiles of 16 x 16, whose 4 warps share K: 18 steps
    whose latency is what counts, 800 clocks / (stages - 1) each, 4 us
    7x7x3 224x224 stride 2, batch 32: 18 instructions a piece, 49 for each of 401408 rows: 21 us
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Gpu, Machine
from ...workload import Conv, ConvWeights
from ._conv_int import Layout, pack
from ._conv_shape import Shape
from ._ir import ceil_div

_BATCHES = (1, 8, 32)  # what stands for an open one


@dataclass(frozen=True)
class Params:
    wm: int = 64  # rows of C of a warp
    wn: int = 64  # columns of C of a warp
    m: int = 2  # warps one below the other,
    n: int = 2  # beside each other,
    k: int = 1  # and with parts of K, whose sums are added at the end
    each: int = 2  # k of 32 bytes that a warp has in a stage
    stages: int = 3  # of A and B in shared memory

    @property
    def bm(self) -> int:
        return self.wm * self.m

    @property
    def bn(self) -> int:
        return self.wn * self.n

    @property
    def depth(self) -> int:
        """Bytes of K in a stage."""
        return 32 * self.each * self.k

    @property
    def threads(self) -> int:
        return 32 * self.m * self.n * self.k

    @property
    def shared(self) -> int:
        """Bytes of shared memory: stages, and later the sums of warps that share K."""
        sums = (self.k - 1) * self.bm * self.bn * 4
        return max(self.stages * (self.bm + self.bn) * self.depth, sums)

    def run(self, codes: bool) -> int:
        """Filters beside each other that a thread ends up with: 16 bytes where it has so many."""
        return min(16 if codes else 4, self.wn // 4)


class ConvMma(Kernel):
    name = "conv_u8s8s32_mma"
    features = ("sm_80",)
    Params: Any = Params
    SPACE: ClassVar = {
        "wm": (16, 32, 64),
        "wn": (16, 32, 64),
        "m": (1, 2, 4),
        "n": (1, 2, 4),
        "k": (1, 2, 4),
        "each": (1, 2),
        "stages": (2, 3, 4),
    }

    def refuses(self, workload: Conv) -> str | None:
        if workload.a != "u8" or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 x s8"
        if workload.groups > 65535:
            return f"{workload.groups} groups, a grid has room for 65535"
        shape = _shape(workload)
        if max(shape.reach(256), 2 * workload.filters * shape.depth) >= 1 << 31:
            return "offsets within 2 images of A, or in the weights, do not fit 32 bits"
        if (
            max((k - 1) * d for k, d in zip(workload.kernel, workload.dilations, strict=True))
            > 32767
        ):
            return "taps are more than 32767 pixels apart"
        return None

    def registers(self, params: Params) -> int:
        """Sums, fragments of two k of 32, and what addresses take.

        In the largest tiles compilers use the rest too, to load a residual ahead.
        """
        count = params.wm * params.wn // 32 + params.wm // 2 + params.wn // 2 + 48
        return 255 if count > 200 else count

    def legal(self, params: Params, machine: Machine) -> bool:
        """Whether a block fits: threads, shared memory, and all of its threads' registers."""
        limit = machine.shared if isinstance(machine, Gpu) else 48 << 10
        registers = params.threads * self.registers(params)
        few = params.threads <= 512 and params.depth <= 256
        return few and params.shared <= limit and registers <= 65536

    def candidates(self, machine: Machine, workload: Conv | None = None) -> Iterator[Any]:
        for params in super().candidates(machine, workload):
            if self.legal(params, machine):
                yield params

    def default(self, workload: Conv, machine: Machine) -> Params:
        """The best by `estimate` of some points that suit many shapes."""
        return _default(self, workload, machine)

    def effect(self, workload: Conv, params: Params) -> Hashable:
        """Stages beyond the number of steps along K change nothing."""
        return replace(params, stages=min(params.stages, self._stages(workload, params)))

    def _stages(self, workload: Conv, params: Params) -> int:
        """The most that are of use."""
        return max(2, ceil_div(_shape(workload).depth, params.depth))

    def estimate(self, workload: Conv, params: Params, machine: Machine) -> float:
        """Nanoseconds; for an open batch the geometric mean over some, of an image."""
        assert isinstance(machine, Gpu)
        if not self.legal(params, machine):
            return float("inf")
        sizes = _BATCHES if workload.batch is None else (workload.batch,)
        shape = _shape(workload)
        each = [self._nanoseconds(shape, size, params, machine) for size in sizes]
        if workload.batch is not None:
            return each[0]
        return prod(t / size for t, size in zip(each, sizes, strict=True)) ** (1 / len(each))

    def _nanoseconds(self, shape: Shape, batch: int, params: Params, machine: Gpu) -> float:
        """The slower of tensor cores, shared memory, L2 and copies for a tile, times the tiles of
        the busiest multiprocessor; start, end and latency, which tiles beside each other hide."""
        work, threads = shape.work, params.threads
        panels = ceil_div(work.filters // work.groups, params.bn)
        blocks = ceil_div(batch * shape.pixels, params.bm) * panels * work.groups
        warps = threads // 32
        resident = min(
            65536 // (threads * self.registers(params)),
            machine.shared // params.shared,
            2048 // threads,
        )
        rounds = ceil_div(blocks, machine.multiprocessors)
        together = max(1, min(rounds, resident))
        steps = ceil_div(shape.depth, params.depth)
        mma = params.each * (params.wm // 16) * (params.wn // 8) * warps  # of a stage
        rate = 6.2 if int(machine.arch[3:]) >= 90 else 8.0
        tensor = mma / 4 * rate / min(1.0, warps * together / 8)  # 2 warps keep one busy
        fragments = warps * 32 * params.each * (params.wm + params.wn)
        copied = (params.bm + params.bn) * params.depth
        fresh = params.bm / (1 if shape.linear else 3) + params.bn  # not in L1
        pieces = params.bm * params.depth / shape.unit
        each = 10 if not shape.single else 16 if shape.span <= 4 else 39  # instructions
        issued = pieces * each / 128  # 4 warps a clock
        stage = max(
            tensor,
            (fragments + copied) / 128,
            fresh * params.depth / 24,
            issued,
            800 / (params.stages - 1) / together,
            150 / together,
        )
        stage += 30 / together  # the barrier
        wide = 1 + 0.3 * (params.k - 1)
        end = 900 + params.bm * params.bn / 9 * wide
        return (rounds * (steps * stage + end / together) + 1500) / machine.clock

    def pack(self, workload: Conv, weights: ConvWeights, params: Params) -> np.ndarray:
        return pack(workload, weights, params)

    def build(self, workload: Conv, params: Params, machine: Machine) -> Any:
        from ._conv_loops import Builder

        params = replace(params, stages=min(params.stages, self._stages(workload, params)))
        return Builder(self.name, workload, params, Layout(workload, params)).function()


_shape = lru_cache(maxsize=64)(Shape)


@lru_cache(maxsize=512)
def _default(kernel: ConvMma, workload: Conv, machine: Machine) -> Params:
    tiles = [
        (64, 64, 2, 4, 1),
        (64, 64, 4, 2, 1),
        (64, 64, 4, 1, 1),
        (64, 64, 2, 2, 1),
        (64, 32, 4, 1, 1),
        (64, 32, 2, 2, 1),
        (64, 16, 2, 1, 1),
        (32, 64, 2, 2, 1),
        (32, 32, 2, 2, 1),
        (32, 32, 1, 2, 2),
        (32, 16, 2, 1, 2),
        (32, 16, 1, 1, 4),
        (16, 32, 1, 1, 4),
        (16, 16, 1, 1, 4),
        (16, 16, 2, 1, 4),
    ]
    points = [Params(*t, each, s) for t, each, s in product(tiles, (1, 2), (3, 4))]
    points = [p for p in points if kernel.legal(p, machine)]
    return min(points, key=lambda p: (kernel.estimate(workload, p, machine), p.shared))


KERNEL = ConvMma()
