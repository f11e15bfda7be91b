"""Pooled embedding gather on a GPU: what the kernels of all storages share.

W, and what is refused, are those of the x86 kernels: an artifact for both holds the tables once.

A bag is summed by a group of 4 to 32 lanes of a warp, so many that a row is one load of each:

    lane          0      1      2    ..  L - 1   | of the next bag
    row 0      | unit | unit | unit |    |       |
    row 1      | unit | unit | unit |    |       |      all `rows` of them under way at once
    ..

A unit is 16, 8, 4, 2 or 1 bytes, the most that every row begins at a multiple of. Wider rows give
a lane several units, and still wider ones are cut into passes, which are blocks of their own.

A step of a bag, `rows` terms:
    1. each lane checks an index that it fetched a step ago, and fetches one of the next step: the
       latencies of an index and of the row that it names are never waited for one after the other
    2. row by row, lanes learn of each other's by a shuffle: row i of the step before is added up,
       in the order of the terms, and row i of this step loaded in its place
What a loop carries round it has to load in time. Where loads and sums are in one stretch of code,
ptxas 13.0 puts every load off until its row is needed, one at a time, to save registers.

A row that is skipped, or past the end of the bag, is not loaded: it counts as -0, and y + -0 is y
for every y. So nothing branches.

Bandwidth x latency has to be under way: 3.35 TB/s x 0.7 us = 2.3 MB on an H100, 18 KB on each of
its 132 multiprocessors. Groups of a warp have 512 bytes x 16 rows = 8 KB under way in units of 16
bytes, so 3 warps are enough, and registers (56 to 150 a lane, of 65536) let 12 be there. Fewer
bags than that are bound by latency: 100 terms take 100 / 16 x 0.7 us. All this is expected from
data sheets, not measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import EmbeddingBag
from ..x86._embedding import EmbeddingKernel

SIZES = {"f32": 4, "f16": 2, "u8": 1, "u4": 1}  # bytes of a column, or of two
_LEAST = 4  # lanes of a bag
_WORDS = 64  # of rows under way, in the registers of a lane
_FEWER = 32  # where lengths are added up, which takes registers too
_DECODED = 128  # columns under way: compilers dequantize many rows early
_SUMS = 32  # columns of a lane, at most
_SCAN = 8  # warps of a block where lengths are added up first


@dataclass(frozen=True)
class Params:
    lanes: int = 32  # of a bag, at most: no more than a row has units
    rows: int = 16  # of a bag under way, at most: what fits the registers
    warps: int = 2  # of a block


@dataclass(frozen=True)
class Plan:
    """How a workload's rows are cut; all of a row's `units` have `unit` bytes, `columns` columns.

    A lane has `each` units of a row in a pass; `pieces` loads of `piece` bytes give it the scale
    and bias.
    """

    unit: int
    columns: int
    units: int
    lanes: int
    each: int
    passes: int
    rows: int
    warps: int
    piece: int
    pieces: int

    @property
    def words(self) -> int:
        """32-bit registers of a unit."""
        return max(1, self.unit // 4)

    @property
    def bags(self) -> int:
        """Bags of a block at a time."""
        return self.warps * 32 // self.lanes


def codes(work: EmbeddingBag) -> int:
    """Bytes of a row before its scale."""
    return (work.dim + 1) // 2 if work.storage == "u4" else work.dim * SIZES[work.storage]


def plan(work: EmbeddingBag, params: Params) -> Plan:
    """The cut of a workload's rows that is nearest to the parameters."""
    width, tail = codes(work), work.row_bytes - codes(work)
    unit = math.gcd(width, work.row_bytes, 16)
    columns = 2 * unit if work.storage == "u4" else unit // SIZES[work.storage]
    units, words = width // unit, max(1, unit // 4)
    lanes = max(_LEAST, min(params.lanes, 1 << (units - 1).bit_length()))
    each = min(-(-units // lanes), max(1, 8 // words), max(1, _SUMS // columns))
    piece = math.gcd(width, 8 if tail == 8 else 4) if tail else 0
    pieces = tail // piece if tail else 0
    room = _FEWER if work.layout == "lengths" else _WORDS
    most = min(room // (each * words + max(tail // 4, pieces)), _DECODED // (each * columns))
    rows = min(params.rows, max(1, most))
    if work.layout == "fixed":
        terms = max(1, work.pooling or 0)
        rows = -(-terms // -(-terms // rows))
    warps = _SCAN if work.layout == "lengths" else params.warps
    passes = -(-units // (lanes * each))
    return Plan(unit, columns, units, lanes, each, passes, rows, warps, piece, pieces)


class WarpKernel(EmbeddingKernel):
    """out = sum or mean of rows stored as `storage`, dequantized on the way."""

    Params: ClassVar[type] = Params
    SPACE: ClassVar = {"lanes": (4, 8, 16, 32), "rows": (4, 8, 16), "warps": (1, 2, 4)}

    def registers(self, params: Any) -> int:
        """Rows under way, their sums, addresses and what is left of a loop."""
        return params.rows * _WORDS // 16 + _SUMS + 56

    def default(self, workload: EmbeddingBag, machine: Machine) -> Any:
        return Params()

    def effect(self, workload: EmbeddingBag, params: Any) -> Hashable:
        return plan(workload, params)

    def build(self, workload: EmbeddingBag, params: Any, machine: Machine) -> Any:
        from ._embedding_bags import Builder

        return Builder(self, workload, params, machine).function()
