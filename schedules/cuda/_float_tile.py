"""One tile of a float matrix product on the FMA units: bm x bn of C by a block of threads.

    warp: 4 x 8 threads, of tm x tn of C each: rows 4 i + r, columns 32 j + 4 c .. 32 j + 4 c + 3
    shared memory, twice: A (bm, bk + 4) | B (bk, bn), all f32

While a block computes with one half it fills the other. A comes by cp.async, 16 bytes at a time
where rows of A allow it and 4 where not; what lies outside becomes zeros without being read. B as
f32 comes the same way; narrower weights pass through registers, where they are widened, once for
all rows of the block.

Four k take tm + tn loads of 16 bytes and 4 tm tn FMAs: with 8 x 8, 16 loads and 256 FMAs. Rows of
A are 4 floats longer than bk, so that four of them lie in different banks, and lanes are numbered
so that every 8 of them read 2 rows and 4 quads of columns.

With slices, threads beyond those of a tile compute the same tile from other k: small C's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ._float_layout import Layout
from ._float_loops import Output, as_float, copies, each, quad
from ._ir import T, address, barrier, call, ceil_div, do, i32, local, shared, tirx

__all__ = ["Block", "Source", "tile"]

_SHARED = 48 << 10
_AHEAD = 4  # floats that rows of A are longer than bk
_TO_FLOAT = 0x4B000000  # bits of 2**23: with a byte in the lowest place, 2**23 + that byte


@dataclass(frozen=True)
class Block:
    """A block of threads and its part of C."""

    wm: int = 4  # warps along m
    wn: int = 2  # warps along n
    tm: int = 8  # rows of a thread
    tn: int = 8  # columns of a thread
    bk: int = 16  # k in shared memory
    slices: int = 1  # of k, each a group of warps

    @property
    def bm(self) -> int:
        return 4 * self.wm * self.tm

    @property
    def bn(self) -> int:
        return 8 * self.wn * self.tn

    @property
    def threads(self) -> int:
        return 32 * self.wm * self.wn * self.slices

    @property
    def pitch(self) -> int:
        """Floats of a row of A in shared memory."""
        return self.bk + _AHEAD

    @property
    def stage(self) -> int:
        """Floats of one half of shared memory."""
        return self.bm * self.pitch + self.bk * self.bn

    @property
    def pool(self) -> int:
        """Floats of shared memory; sums of slices take the place of the halves."""
        return max(2 * self.stage, (self.slices - 1) * self.bm * self.bn)

    @property
    def tall(self) -> Block:
        """The highest block that reads the same tiles of W."""
        blocks = (replace(self, wm=wm, tm=8, slices=1) for wm in (4, 2))
        return next((b for b in blocks if b.fits and b.bm > self.bm), self)

    @property
    def registers(self) -> int:
        """Sums, four k of A, one of B, addresses."""
        return self.tm * self.tn + 4 * self.tm + self.tn + 32

    @property
    def fits(self) -> bool:
        whole = self.bk // 4 % self.slices == 0
        resident = self.threads * self.registers <= 65536 and self.threads <= 1024
        return whole and resident and 4 * self.pool <= _SHARED


class Source(Protocol):
    """Rows of A, gathered or not, of which a block reads some."""

    @property
    def width(self) -> int:
        """Floats of a copy: 4 or 1."""

    def prepare(self, passes: int, row: Callable[[Any], Any]) -> None:
        """Before the loop over k: row(p) of A is what this thread copies from in pass p."""

    def piece(self, index: Any, row: Any, k: Any) -> tuple[Any, Any]:
        """A pointer to A at k of a row, that of this pass, and the bytes to read there."""


def tile(
    block: Block,
    lay: Layout,
    source: Source,
    out: Output,
    at: tuple[Any, Any, Any],
    thread: Any,
    rows: Any,
) -> None:
    """C's tile at = (group, tile along m, tile along n), of `rows` rows; emitted in `pragmas`."""
    group, m_tile, n_tile = at
    _Tile(block, lay, source, out, thread).run(
        T.Bind(tirx.Cast("int64", m_tile) * block.bm), n_tile, group, rows
    )


class _Tile:
    def __init__(self, block: Block, lay: Layout, source: Source, out: Output, thread: Any) -> None:
        self.block, self.lay, self.source, self.out = block, lay, source, out
        self.pool = shared(block.pool, "float32")
        self.acc = local(block.tm * block.tn, "float32")
        self.thread = thread
        warps = block.wm * block.wn
        warp = thread // 32
        self.slice = T.Bind(warp // warps)
        inner = thread % 32
        # lane: one bit of the row, three of the column, the other bit of the row
        row, column = inner % 2 + inner // 16 * 2, inner // 2 % 8
        self.row = T.Bind(warp % warps // block.wn * (4 * block.tm) + row)
        self.column = T.Bind(warp % block.wn * (8 * block.tn) + column * 4)

    def run(self, first: Any, n_tile: Any, group: Any, rows: Any) -> None:
        block, lay = self.block, self.lay
        units = block.bk // self.source.width
        per = block.threads // units

        def row_of(index: Any) -> Any:
            return first + self.thread // units + index * per

        self.source.prepare(ceil_div(block.bm, per), row_of)
        tiles = tirx.Cast("int64", group * lay.tiles + n_tile) * lay.k_tiles
        self.weights = T.Bind(tiles * lay.tile)
        with each(block.tm * block.tn) as i:
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        self._fetch(i32(0), i32(0), row_of)
        with T.serial(0, lay.k_tiles) as k:
            half = T.Bind(k % 2 * block.stage)
            other = T.Bind(block.stage - half)
            do("wait0")
            barrier()
            with T.If(k + 1 < lay.k_tiles), T.Then():
                self._fetch(k + 1, other, row_of)
            self._multiply(half)
            if lay.kind != "f32":
                with T.If(k + 1 < lay.k_tiles), T.Then():
                    self._widen(other)
        if block.slices > 1:
            self._add_slices()
            with T.If(tirx.EQ(self.slice, 0)), T.Then():
                self._store(first, n_tile, rows)
        else:
            self._store(first, n_tile, rows)

    # ---- into shared memory ----
    def _fetch(self, k: Any, half: Any, row_of: Callable[[Any], Any]) -> None:
        """Starts the copies of step `k` to `half`; the first one's weights are widened at once."""
        block, lay, width = self.block, self.lay, self.source.width
        units = block.bk // width

        def of_a(index: Any, e: Any) -> None:
            place, count = self.source.piece(index, row_of(index), k * block.bk + e % units * width)
            to = address(self.pool, half + e // units * block.pitch + e % units * width)
            do(f"copy{4 * width}", to, place, count)

        copies(block.bm * units, block.threads, self.thread, of_a)
        start = T.Bind(self.weights + tirx.Cast("int64", k) * lay.tile)

        def of_b(index: Any, e: Any) -> None:
            place = address(self.out.w, start + e * 16)
            if lay.kind == "f32":
                do("copy16", address(self.pool, half + block.bm * block.pitch + e * 4), place, 16)
            else:
                do("load16", address(self.words, index * 4), place)

        if lay.kind != "f32" and isinstance(k, tirx.IntImm):
            self.words = local(4 * ceil_div(lay.tile // 16, block.threads), "uint32")
        copies(lay.tile // 16, block.threads, self.thread, of_b)
        do("commit")
        if lay.kind != "f32" and isinstance(k, tirx.IntImm):
            self._widen(half)

    def _widen(self, half: Any) -> None:
        """Codes in registers, words of 4 k of a column, to f32 in shared memory."""
        block, lay = self.block, self.lay
        line = block.bn // 4

        def one(index: Any, e: Any) -> None:
            to = T.Bind(half + block.bm * block.pitch + e // line * (4 * block.bn) + e % line * 4)
            values = local(4, "float32")
            with each(4) as i:
                with each(4) as c:
                    T.buffer_store(values, code(self.words[index * 4 + c], i), [c])
                T.buffer_store(self.pool, values[quad(0)], [quad(to + i * block.bn)])

        copies(lay.tile // 16, block.threads, self.thread, one)

    # ---- sums ----
    def _multiply(self, half: Any) -> None:
        block, pool = self.block, self.pool
        tm, tn = block.tm, block.tn
        a, b = local(4 * tm, "float32"), local(tn, "float32")
        from_a = T.Bind(half + self.row * block.pitch)
        from_b = T.Bind(half + block.bm * block.pitch + self.column)
        with T.unroll(0, block.bk // 4 // block.slices) as step:
            k = T.Bind((step * block.slices + self.slice) * 4)
            with each(tm) as i:
                T.buffer_store(a, pool[quad(from_a + i * (4 * block.pitch) + k)], [quad(i * 4)])
            with each(4) as kk:
                with each(tn // 4) as j:
                    where = from_b + (k + kk) * block.bn + j * 32
                    T.buffer_store(b, pool[quad(where)], [quad(j * 4)])
                with each(tm) as i, each(tn) as j:
                    at = i * tn + j
                    T.buffer_store(
                        self.acc, call("float32", "fma", a[i * 4 + kk], b[j], self.acc[at]), [at]
                    )

    def _add_slices(self) -> None:
        """Into the sums of slice 0."""
        block, count = self.block, self.block.tm * self.block.tn
        per = block.threads // block.slices
        own = T.Bind(self.thread % per)
        barrier()
        with T.If(self.slice > 0), T.Then(), each(count) as i:
            where = ((self.slice - 1) * count + i) * per + own
            T.buffer_store(self.pool, self.acc[i], [where])
        barrier()
        with T.If(tirx.EQ(self.slice, 0)), T.Then():
            with each(block.slices - 1) as s, each(count) as i:
                added = self.pool[(s * count + i) * per + own]
                T.buffer_store(self.acc, self.acc[i] + added, [i])

    def _store(self, first: Any, n_tile: Any, rows: Any) -> None:
        block, tn = self.block, self.block.tn
        column = T.Bind(n_tile * block.bn + self.column)
        factors = self.out.factors(tn // 4, 4, lambda j: column + j * 32)
        with each(block.tm) as i:
            row = T.Bind(first + self.row + i * 4)
            with T.If(row < rows), T.Then(), each(tn // 4) as j:
                here = i * tn + j * 4
                self.out.store(
                    row, column + j * 32, 4, lambda c, h=here: self.acc[h + c], factors, j * 4
                )


def code(word: Any, byte: Any) -> Any:
    """The s8 in a byte of a word as f32, in three operations: 2**23 + code + 128 is exact."""
    flipped = word ^ tirx.const(0x80808080, "uint32")
    order = tirx.Cast("uint32", byte) + tirx.const(0x7440, "uint32")
    bits = call("uint32", "permute", flipped, tirx.const(_TO_FLOAT, "uint32"), order)
    return as_float(bits) - tirx.const(float(2**23 + 128), "float32")
