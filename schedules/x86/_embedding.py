"""Pooled embedding gather: what the kernels of all storages and vector widths share.

W:  per table 128 bytes: offset of its first row in W, number of rows, bytes of its name, s64 each,
    its name | table 0 | table 1 | ...                          every table 64-byte aligned

After the last table come 64 bytes, so that a vector wider than what is left of a row may be read
anywhere: its other lanes are computed and not stored.

A bag:  1. its indices are compared with the rows of the table, a vector at a time; only if one is
           wrong they are searched one by one for the error message
        2. its rows are added up in registers. While row i is read, the lines of row i + distance,
           be it of this bag or a later one, are prefetched
        3. mean, bias and store, once

The columns of a row are vectors v0, v1, ..; the last one is moved up to end with the row, and
overlaps the one before:  |  v0  |  v1  |  v2 |v3|  v2 |.  Codes of 4 bits: a vector of bytes
gives one vector of even and one of odd columns, which are interleaved before they are stored.
Rows of more columns than registers hold are gathered in passes over blocks of columns.

Bags of one table follow each other, table by table: a table's pages stay in the TLB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import EmbeddingBag, EmbeddingTables

HEADER = 128  # bytes per table
NAME = 24  # where the name begins in it
SLACK = 64  # bytes after the last table


@dataclass(frozen=True)
class Params:
    far: int = 128  # rows between the one read and the one prefetched into level 2; 0: none
    near: int = 16  # the same, for level 1


def layout(workload: EmbeddingBag) -> tuple[list[int], int]:
    """Byte offsets of the tables in W, and the size of W."""
    at = HEADER * workload.tables
    starts = []
    for rows in workload.rows:
        starts.append(at)
        at += -(-rows * workload.row_bytes // 64) * 64
    return starts, at + SLACK


class EmbeddingKernel(Kernel[EmbeddingBag, EmbeddingTables]):
    """out = sum or mean of rows stored as `storage`, dequantized on the way."""

    storage: ClassVar[str]
    bits: ClassVar[int]  # of a vector
    Params: ClassVar[type] = Params
    SPACE: ClassVar = {"far": (0, 64, 96, 128, 192), "near": (0, 8, 16, 24)}

    @property
    def accumulators(self) -> int:
        """Vectors of a bag in registers: all but those for a row, its scale and constants."""
        return 24 if self.bits == 512 else 12

    def refuses(self, workload: EmbeddingBag) -> str | None:
        if workload.storage != self.storage:
            return f"rows are {workload.storage}, not {self.storage}"
        if max(workload.rows) >= 2**31:
            return f"a table of {max(workload.rows)} rows, 2**31 - 1 are the most"
        return None

    def registers(self, params: Any) -> int:
        return self.accumulators + 4

    def default(self, workload: EmbeddingBag, machine: Machine) -> Any:
        return Params()

    def nbytes(self, workload: EmbeddingBag) -> int:
        """Size of W."""
        return layout(workload)[1]

    def pieces(
        self,
        workload: EmbeddingBag,
        tables: Iterable[Iterable[np.ndarray]],
        names: Sequence[str] = (),
    ) -> Iterator[np.ndarray]:
        """W in pieces: a table comes as blocks of rows, as stored, and is never held whole."""
        starts, end = layout(workload)
        head = np.zeros((workload.tables, HEADER), np.uint8)
        for t, start in enumerate(starts):
            name = (names[t] if names else str(t)).encode()[: HEADER - NAME]
            name = name.decode(errors="ignore").encode()  # without the half of a character
            head[t, :NAME].view(np.int64)[:] = start, workload.rows[t], len(name)
            head[t, NAME : NAME + len(name)] = np.frombuffer(name, np.uint8)
        yield head
        for rows, blocks, start, after in zip(
            workload.rows, tables, starts, [*starts[1:], end], strict=True
        ):
            done = 0
            for block in blocks:
                yield block
                done += block.nbytes
            if done != rows * workload.row_bytes:
                raise ValueError(f"a table of {rows} x {workload.row_bytes} bytes gave {done}")
            yield np.zeros(after - start - done, np.uint8)

    def pack(self, workload: EmbeddingBag, weights: EmbeddingTables, params: Any) -> np.ndarray:
        out = np.empty(self.nbytes(workload), np.uint8)
        at = 0
        for piece in self.pieces(workload, ([t] for t in weights.tables), weights.names):
            raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            out[at : at + raw.size] = raw
            at += raw.size
        return out

    def build(self, workload: EmbeddingBag, params: Any, machine: Machine) -> Any:
        from ._embedding_loops import Builder

        return Builder(self, workload, params).function()


@dataclass(frozen=True)
class Columns:
    """How the columns of a row are cut into vectors.

    `lanes` columns make a vector; `starts` are those of the vectors, in bytes of codes for 4-bit
    storage and else in columns; `blocks` are ranges of vectors that share a pass.
    """

    lanes: int
    starts: tuple[int, ...]
    blocks: tuple[range, ...]


def columns(workload: EmbeddingBag, lanes: int, accumulators: int) -> Columns:
    units, each = workload.dim, 1
    if workload.storage == "u4":
        units, each = (workload.dim + 1) // 2, 2  # accumulators of a vector
    if units < lanes:
        lanes = 8
    starts = [*range(0, units - lanes + 1, lanes)] or [0]
    if starts[-1] + lanes < units:
        starts.append(units - lanes)
    passes = -(-len(starts) * each // accumulators)
    cuts = [len(starts) * p // passes for p in range(passes + 1)]
    blocks = tuple(range(a, b) for a, b in pairwise(cuts))
    return Columns(lanes, tuple(starts), blocks)


def lines(low: int, high: int, row_bytes: int) -> list[int]:
    """Byte offsets whose lines are all that hold bytes low..high-1 of a row, in any row.

    Rows begin at multiples of gcd(row_bytes, 64): 72 bytes at any multiple of 8 are in two lines.
    """
    grain = math.gcd(row_bytes, 64)
    most = max((phase + high - 1) // 64 - (phase + low) // 64 for phase in range(0, 64, grain))
    return [*(low + 64 * j for j in range(most)), high - 1]
