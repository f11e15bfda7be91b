"""A warp's tile of C of `gemm_u8s8s32_mma`: which lane has what, where sums start and how they end.

The numbers of a lane: for each 16 rows two rows, 8 apart, and of each `groups` of consecutive
columns, `run` of them (`column_order`). They are accumulators 4j to 4j + 3 of mma number j.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...workload import Gemm
from ._epilogue import narrow, word
from ._gemm_int import Operands
from ._ir import T, address, barrier, call, do, i32, local, tirx, when

if TYPE_CHECKING:
    from .gemm_u8s8s32_mma import Params


class Tile:
    """To be used within the open function of a kernel, after `place`."""

    def __init__(self, workload: Gemm, params: Params, run: int) -> None:
        self.work, self.p, self.run = workload, params, run
        self.tiles, self.fragments = params.wm // 16, params.wn // 8
        self.groups = 2 * self.fragments // run
        self.width = next(w for w in (16, 8, 4, 2, 1) if w <= run and not workload.n % w)
        self.early: list[tuple[list[Any], list[Any]]] = []  # `factors` of all groups, if read

    first_row: Any  # of C, of the block
    panel: Any  # number of the block's columns

    def place(self, io: Operands, smem: Any, thread: Any) -> None:
        """Where a thread is in its block."""
        p = self.p
        self.io, self.smem, self.thread = io, smem, thread
        self.lane = T.Bind(thread % 32)
        warp = T.Bind(thread // 32)
        self.column = T.Bind(warp % p.columns)
        self.row = T.Bind(warp // p.columns % p.rows)
        self.part = T.Bind(warp // (p.columns * p.rows))
        self.acc = local(4 * self.tiles * self.fragments, "int32")
        if self.work.b_zero:
            self.sums = local(2 * self.tiles, "int32")  # of rows of A

    def first_column(self, group: int) -> Any:
        """The first column of C of a lane's group of consecutive ones; of W's padded columns."""
        p = self.p
        base = self.panel * p.bn + self.column * p.wn
        return T.Bind(base + group * 4 * self.run + self.lane % 4 * self.run)

    def at(self, tile: int, half: int, group: int, t: int) -> int:
        """Accumulator of row `half` of a tile of 16 rows, number t of a group of columns."""
        fragment = group * (self.run // 2) + t // 2
        return (tile * self.fragments + fragment) * 4 + half * 2 + t % 2

    def start(self) -> None:
        """Accumulators of the first part of K begin with what belongs to their column."""
        size = self.run
        if self.work.b_zero:
            for i in range(2 * self.tiles):
                T.buffer_store(self.sums, i32(0), [i])
        for group in range(self.groups):
            column = self.first_column(group)
            for t in range(0, size, 4):
                count = min(size, 4)
                values = self.io.starts(column + t, count)
                if self.p.split > 1:
                    values = [tirx.Select(tirx.EQ(self.part, 0), v, i32(0)) for v in values]
                values = [T.Bind(v) for v in values]
                for i, value in enumerate(values):
                    for tile in range(self.tiles):
                        for half in range(2):
                            T.buffer_store(self.acc, value, [self.at(tile, half, group, t + i)])

    def factors(self, group: int) -> tuple[list[Any], list[Any]]:
        """Scales and biases of a group of columns."""
        column = self.first_column(group)
        scale: list[Any] = []
        bias: list[Any] = []
        for t in range(0, self.run, 4):
            scale += self.io.scales(column + t, min(self.run, 4))
            bias += self.io.biases(column + t, min(self.run, 4))
        return scale, bias

    def correct(self) -> None:
        """Takes the zero points of B, times the sums of A's rows, off the accumulators.

        4 lanes have read a row together; afterwards each has the sum of its rows.
        """
        for i in range(2 * self.tiles):
            for mask in (1, 2):
                other = call("int32", "shuffle_xor", self.sums[i], i32(mask))
                T.buffer_store(self.sums, self.sums[i] + other, [i])
        size = self.run
        for group in range(self.groups):
            column = self.first_column(group)
            for t in range(0, size, 4):
                zeros = self.io.zeros(column + t, min(size, 4))
                for i, zero in enumerate(zeros):
                    for tile in range(self.tiles):
                        for half in range(2):
                            at = self.at(tile, half, group, t + i)
                            value = self.acc[at] - self.sums[2 * tile + half] * zero
                            T.buffer_store(self.acc, value, [at])

    def add_up(self) -> None:
        """Adds the accumulators of all parts of K to those of the first."""
        p = self.p
        size = 4 * self.tiles * self.fragments
        together = p.rows * p.columns * 32
        peer = T.Bind(self.thread % together)
        barrier()
        with T.If(self.part > 0), T.Then():
            base = T.Bind((self.part - 1) * (size * together) + peer)
            for i in range(size):
                value = tirx.Cast("uint32", self.acc[i])
                T.buffer_store(self.smem, value, [base + i * together])
        barrier()
        with T.If(tirx.EQ(self.part, 0)), T.Then():
            for other in range(p.split - 1):
                for i in range(size):
                    found = self.smem[peer + (other * size + i) * together]
                    T.buffer_store(self.acc, self.acc[i] + tirx.Cast("int32", found), [i])

    def finish(self) -> None:
        """From accumulators to C."""
        p, io, size = self.p, self.io, self.run
        first = T.Bind(self.first_row + io.cast(self.row * p.wm + self.lane // 4))
        for group in range(self.groups):
            column = self.first_column(group)
            scale, bias = self.early[group] if self.early else self.factors(group)
            for tile in range(self.tiles):
                for half in range(2):
                    row = T.Bind(first + (tile * 16 + half * 8))
                    with T.If(row < io.m), T.Then():
                        values = [
                            io.epilogue.value(
                                self.acc[self.at(tile, half, group, t)], scale[t], bias[t]
                            )
                            for t in range(size)
                        ]
                        self._store(values, row, column)

    def _store(self, values: list[Any], row: Any, column: Any) -> None:
        """Consecutive numbers of a row, in the widest pieces to which every row is aligned."""
        io, n, out = self.io, self.work.n, self.work.out
        first = T.Bind(io.cast(column))
        codes = out in ("u8", "s8")
        for t in range(0, len(values), self.width):
            piece = values[t : t + self.width]
            inside = column + t < n if n % self.p.bn else None
            with when(inside):
                size = len(piece) * (1 if codes else 4)
                if size < 4 or len(piece) == 1:
                    for i, value in enumerate(piece):
                        T.buffer_store(io.c, narrow(value, out), [row, first + (t + i)])
                    continue
                words = local(size // 4, "uint32")
                for i in range(size // 4):
                    if codes:
                        value = word(piece[4 * i : 4 * i + 4])
                    elif out == "f32":
                        value = call("uint32", "as_uint", piece[i])
                    else:
                        value = tirx.Cast("uint32", piece[i])
                    T.buffer_store(words, value, [i])
                where = address(io.c, row, first + t)
                if size == 4:
                    do("store4", where, words[0])
                else:
                    do(f"store{size}", where, address(words, 0))
