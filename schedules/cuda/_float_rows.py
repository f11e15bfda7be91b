"""A float matrix product of few rows: the weights pass once, at the speed of memory.

A block of 256 threads has all rows of `columns` columns of C. Threads read 16-byte items of
weights, `columns` wide and one row of items after the other; each thread keeps the sums of its own
columns and k, which lanes, then warps add up in the end. Four items of a thread are under way at a
time, 16 KiB a block, the first of them while A is fetched. A passes in pieces through shared
memory, where a k's rows lie side by side, so that several k or rows are one load; lanes with equal
k read the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._float_layout import Layout
from ._float_loops import Output, as_float, copies, each
from ._float_tile import code
from ._ir import T, address, barrier, call, ceil_div, do, i32, local, shared, tirx

__all__ = ["Rows"]

_THREADS = 256
_WARPS = _THREADS // 32
_AHEAD = 4  # items under way, where A for so many has room
_PIECE = 8192  # floats of A in shared memory


@dataclass(frozen=True)
class Rows:
    """A block's part of C: `count` rows of `columns` columns."""

    count: int
    columns: int
    lay: Layout

    @property
    def line(self) -> int:
        """Items of a row of them that are the block's."""
        return self.columns * self.lay.step * self.lay.size // 16

    @property
    def lines(self) -> int:
        """Rows of items that the block reads at a time."""
        return _THREADS // self.line

    @property
    def own(self) -> int:
        """Columns of a thread."""
        return 2 if self.lay.kind == "f16" else 4

    @property
    def deep(self) -> int:
        """k of an item."""
        return 1 if self.lay.kind == "f32" else 4

    @property
    def blocks(self) -> int:
        return ceil_div(self.lay.n, self.columns)

    @property
    def total(self) -> int:
        """Rows of items."""
        return self.lay.k_tiles * self.lay.bk // self.lay.step

    @property
    def ahead(self) -> int:
        """Items that a thread has under way."""
        floats = self.count * self.lay.step * self.lines
        return max(1, min(_AHEAD, _PIECE // floats))

    @property
    def piece(self) -> int:
        """Rows of items whose A is in shared memory at a time: whole steps."""
        step = self.lines * self.ahead
        most = max(1, _PIECE // (self.count * self.lay.step * step))
        return min(most, ceil_div(self.total, step)) * step

    @property
    def partial(self) -> int:
        """Sums of a column that warps leave to be added: groups of lanes with other k."""
        return min(_WARPS, self.lines)

    @property
    def pool(self) -> int:
        floats = self.piece * self.lay.step * self.count
        return max(floats, self.partial * self.count * self.columns)

    @property
    def fits(self) -> bool:
        whole = self.lay.bn % self.columns == 0 and self.line <= _THREADS
        return whole and 4 * self.pool <= 48 << 10

    def run(self, load: Any, out: Output, block: Any, thread: Any, rows: Any) -> None:
        """Emits the kernel's body, within `pragmas`."""
        _Body(self, load, out, block, thread, rows).run()


class _Body:
    def __init__(
        self, shape: Rows, load: Any, out: Output, block: Any, thread: Any, rows: Any
    ) -> None:
        self.shape, self.load, self.out, self.thread, self.rows = shape, load, out, thread, rows
        self.block = block
        lay = shape.lay
        self.pool = shared(shape.pool, "float32")
        self.acc = local(shape.count * shape.own, "float32")
        self.item = T.Bind(thread % shape.line)
        self.first = T.Bind(thread // shape.line)
        per = lay.bn // shape.columns  # blocks of a tile
        tile = tirx.Cast("int64", block // per) * (lay.k_tiles * lay.tile)
        start = block % per * (shape.line * 16) + self.item * 16
        self.base = T.Bind(tile + tirx.Cast("int64", start))

    def run(self) -> None:
        shape = self.shape
        with each(shape.count * shape.own) as i:
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        whole = shape.total // shape.piece
        with T.serial(0, whole) as p:
            self._piece(p * shape.piece, shape.piece)
        if shape.total % shape.piece:
            self._piece(i32(whole * shape.piece), shape.total % shape.piece)
        self._finish()

    def _piece(self, first: Any, count: int) -> None:
        """Rows `first` .. first + count - 1 of items, those of one piece of A."""
        shape, lay = self.shape, self.shape.lay

        def stage(_: Any, e: Any) -> None:
            k = T.Bind(first * lay.step + e % (count * lay.step))
            row = T.Bind(e // (count * lay.step))
            value = T.if_then_else(
                tirx.And(row < self.rows, k < lay.k), self.load(row, k), tirx.const(0.0, "float32")
            )
            T.buffer_store(self.pool, value, [e % (count * lay.step) * shape.count + row])

        floats = count * lay.step * shape.count
        step = shape.lines * shape.ahead
        steps, rest = count // step, count % step
        last = i32(steps * step), ceil_div(rest, shape.lines), count  # the rest
        words = local(4 * shape.ahead, "uint32")
        if steps:
            self._load(words, first, i32(0), shape.ahead, None)
        else:
            self._load(words, first, *last)
        barrier()  # the piece before has been read
        with T.serial(0, ceil_div(floats, _THREADS)) as i:
            e = T.Bind(self.thread + i * _THREADS)
            if floats % _THREADS:
                with T.If(e < floats), T.Then():
                    stage(i, e)
            else:
                stage(i, e)
        barrier()
        if steps:
            after = local(4 * shape.ahead, "uint32")
            with T.serial(0, steps) as s:
                more = s + 1 < steps
                with T.If(more), T.Then():
                    self._load(after, first, (s + 1) * step, shape.ahead, None)
                self._use(words, s * step, shape.ahead, None)
                with T.If(more), T.Then(), each(4 * shape.ahead) as w:
                    T.buffer_store(words, after[w], [w])
            if rest:
                self._load(words, first, *last)
        if rest:
            self._use(words, *last)

    def _load(self, words: Any, first: Any, at: Any, items: int, end: int | None) -> None:
        """Starts `items` items of each thread, from row `at` of the piece on, those below `end`."""
        shape, lay = self.shape, self.shape.lay
        line = lay.bn * lay.step * lay.size
        with each(items) as u:
            row = T.Bind(at + u * shape.lines + self.first)
            offset = self.base + tirx.Cast("int64", first + row) * line
            load = ("load16_once", address(words, u * 4), address(self.out.w, offset))
            if end is None:
                do(*load)
            else:
                with T.If(row < end), T.Then():
                    do(*load)

    def _use(self, words: Any, at: Any, items: int, end: int | None) -> None:
        """Adds them to the sums."""
        with each(items) as u:
            row = T.Bind(at + u * self.shape.lines + self.first)
            if end is None:
                self._add(words, u, row)
            else:
                with T.If(row < end), T.Then():
                    self._add(words, u, row)

    def _add(self, words: Any, u: Any, row: Any) -> None:
        shape, lay = self.shape, self.shape.lay
        count, own, deep = shape.count, shape.own, shape.deep
        k = row * lay.step + (self.item % 4 * 4 if lay.kind == "f16" else 0)
        a = local(deep * count, "float32")
        wide = next(w for w in (4, 2, 1) if deep * count % w == 0)
        base = T.Bind(k * count)
        with each(deep * count // wide) as i:
            if wide == 1:
                T.buffer_store(a, self.pool[base + i], [i])
            else:
                value = self.pool[T.ramp(base + i * wide, 1, wide)]
                T.buffer_store(a, value, [T.ramp(i * wide, 1, wide)])
        with each(deep) as kk, each(own) as c:
            b = T.Bind(self._weight(words, u * 4, kk, c))
            with each(count) as i:
                at = i * own + c
                value = call("float32", "fma", a[kk * count + i], b, self.acc[at])
                T.buffer_store(self.acc, value, [at])

    def _weight(self, words: Any, item: Any, k: Any, c: Any) -> Any:
        kind = self.shape.lay.kind
        if kind == "f32":
            return as_float(words[item + c])
        if kind == "s8":
            return code(words[item + c], k)
        word = words[item + c * 2 + k // 2] >> tirx.Cast("uint32", k % 2 * 16)
        return call("float32", "half_to_float", word & tirx.const(0xFFFF, "uint32"))

    def _finish(self) -> None:
        """Sums of lanes, then of warps, then C."""
        shape, kind = self.shape, self.shape.lay.kind
        count, own, columns = shape.count, shape.own, shape.columns
        masks = [m for m in (1, 2, 4, 8, 16) if (m < 4 if kind == "f16" else m >= shape.line)]
        for mask in masks:
            with each(count * own) as i:
                other = call("float32", "shuffle_xor_f32", self.acc[i], i32(mask))
                T.buffer_store(self.acc, self.acc[i] + other, [i])
        barrier()
        lane = self.thread % 32
        group = self.thread // max(32, shape.line)
        if kind == "f16":
            # lane 4 g + t of a 16-column block has columns g and g + 8
            writes, column = tirx.EQ(lane % 4, 0), self.item // 32 * 16 + lane // 4
        else:
            writes, column = lane < min(32, shape.line), self.item * 4
        with T.If(writes), T.Then(), each(count) as i, each(own) as c:
            where = (group * count + i) * columns + column + (c * 8 if kind == "f16" else c)
            T.buffer_store(self.pool, self.acc[i * own + c], [where])
        barrier()

        def one(_: Any, e: Any) -> None:
            row, inner = T.Bind(e // columns), T.Bind(e % columns)
            total = local(1, "float32")
            T.buffer_store(total, self.pool[e], [0])
            with each(shape.partial - 1) as p:
                more = self.pool[e + (p + 1) * (count * columns)]
                T.buffer_store(total, total[0] + more, [0])
            at = T.Bind(self.block * columns + inner)
            factors = self.out.factors(1, 1, lambda _: at)
            with T.If(row < self.rows), T.Then():
                self.out.store(row, at, 1, lambda _: total[0], factors, 0)

        copies(count * columns, _THREADS, self.thread, one)
