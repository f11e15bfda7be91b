"""The copies of A and B to shared memory: which thread copies what, and where it goes.

A thread has one column of the pieces of a stage and some rows of it. What it has to know of its
rows, offset, bits and place, stays in registers; the entry of its column is loaded a step ahead.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ._conv_block import Block, u32
from ._conv_shape import COUNT_BIT, ROW_BIT
from ._ir import T, address, do, i32, local, tirx

__all__ = ["Copies"]


class Copies(Block):
    def prepare_copies(self) -> None:
        """Where each of a thread's rows is in A, what it has inside, and where it goes."""
        p, shape, work = self.p, self.shape, self.work
        self.column = T.Bind(tirx.floormod(self.thread, i32(self.columns)))
        row0 = T.Bind(tirx.floordiv(self.thread, i32(self.columns)))
        cg = self._cast(self.group) * work.group_channels
        if shape.uniform:
            self.base = T.Bind(self.first * shape.uniform + cg)
        else:
            image = T.Bind(tirx.floordiv(self.first, self.at(shape.pixels)))
            self.base = T.Bind(image * shape.image + cg)
            before = T.Bind(tirx.Cast("int32", self.first - image * shape.pixels))
        chunk, inner = self._chunk(self.column)
        self.offsets, self.places, self.bits, self.corners = [], [], [], []
        for i in range(self.mine):
            row = T.Bind(row0 + i * self.apart)
            self.places.append(T.Bind(row * (p.depth // 4) + self.swizzled(chunk, row) * 4 + inner))
            inside = row < self.left
            if shape.uniform:
                self.offsets.append(T.Bind(row * shape.uniform))
                self.bits.append(T.Bind(tirx.Cast("uint32", inside)))
                continue
            offset, corner = self._corner(T.Bind(before + row))
            self.offsets.append(T.Bind(offset))
            if shape.linear:
                self.bits.append(T.Bind(tirx.Cast("uint32", inside)))
            elif shape.masked:
                self.bits.append(T.Bind(tirx.Select(inside, self._mask(corner), u32(0))))
            else:
                far = tirx.Select(inside, corner[0], i32(-(1 << 30)))
                self.corners.append((T.Bind(far), *corner[1:]))
        if shape.entry:
            self.entry = local(shape.entry // 4, "uint32")
            self._fetch_entry(i32(0))

    def _chunk(self, column: Any) -> tuple[Any, Any]:
        """16-byte chunk of a row of the stage in which a column of pieces is, and words into it."""
        each = 16 // self.shape.unit
        if each == 1:
            return column, i32(0)
        chunk = T.Bind(tirx.floordiv(column, i32(each)))
        return chunk, T.Bind(tirx.floormod(column, i32(each)) * (self.shape.unit // 4))

    def swizzled(self, chunk: Any, row: Any) -> Any:
        """Where a chunk of a row is among the chunks of the row."""
        each = self.p.depth // 16  # 2, 4 or 8
        spread = tirx.floordiv(row, i32(8 // each)) if each < 8 else row
        return chunk ^ tirx.floormod(spread, i32(each))

    def _corner(self, pixel: Any) -> tuple[Any, tuple[Any, Any, Any]]:
        """Of a pixel counted from the first of the base's image: its first tap, as bytes from
        that image and as z, y, x."""
        work = self.work
        d, h, w = work.outputs
        sizes = work.size
        far = T.Bind(tirx.floordiv(pixel, i32(d * h * w)))
        rest = T.Bind(pixel - far * (d * h * w))
        z, y, x = (
            tirx.floordiv(rest, i32(h * w)),
            tirx.floormod(tirx.floordiv(rest, i32(w)), i32(h)),
            tirx.floormod(rest, i32(w)),
        )
        z, y, x = (
            T.Bind(v * stride - before)
            for v, stride, (before, _) in zip((z, y, x), work.strides, work.pads, strict=True)
        )
        start = ((z * sizes[1] + y) * sizes[2] + x) * work.channels
        return start + far * self.shape.image, (z, y, x)

    def _mask(self, corner: tuple[Any, Any, Any]) -> Any:
        """Bits of a row that exists, see `Shape`."""
        work, shape = self.work, self.shape
        bits = u32(1 << ROW_BIT | (3 << COUNT_BIT if shape.single else 0))
        for dim in range(3):
            if not shape.padded[dim]:
                continue
            for tap in range(work.kernel[dim]):
                at = corner[dim] + tap * work.dilations[dim]
                inside = tirx.And(at >= 0, at < work.size[dim])
                bits = T.Bind(bits | tirx.Select(inside, u32(1 << shape.bit(dim, tap)), u32(0)))
        return bits

    def _fetch_entry(self, step: Any) -> None:
        """The entry of this thread's column in a step, for the copies of that step."""
        size = self.shape.entry
        place = T.Bind(self.lay.table + (step * self.columns + self.column) * size)
        do(f"load{size}", address(self.entry, 0), address(self.w, place))

    def copy(self, step: Any, stage: Any, commit: bool = True) -> None:
        """Starts the copies of a step into a stage."""
        p, lay = self.p, self.lay
        stage = T.Bind(stage * (lay.stage // 4))
        if self.columns * p.bm < p.threads:
            with T.If(self.thread < self.columns * p.bm), T.Then():
                self._copy_a(step, stage)
        else:
            self._copy_a(step, stage)
        panel = self.group * lay.panels + self.panel
        size = p.bn * p.depth
        source = T.Bind((panel * self.steps + step) * size + self.thread * 16)
        target = T.Bind(stage + p.bm * p.depth // 4 + self.thread * 4)
        for i in range(0, size, p.threads * 16):
            with _guarded(i + p.threads * 16 > size, self.thread * 16 + i < size):
                do(
                    "copy16",
                    address(self.memory, target + i // 4),
                    address(self.w, source + i),
                    i32(16),
                )
        if commit:
            do("commit")

    def _copy_a(self, step: Any, stage: Any) -> None:
        shape = self.shape
        if shape.linear:
            k = T.Bind((step * self.columns + self.column) * shape.unit)
            count = tirx.Select(k < shape.span, i32(shape.unit), i32(0))
            if shape.single:
                count = tirx.max(tirx.min(shape.span - k, i32(shape.unit)), i32(0))
            count = T.Bind(count)
        else:
            k = T.Bind(tirx.Cast("int32", self.entry[0]))
        fill = self.end.number("fill") if self.filling else u32(0)
        for i in range(self.mine):
            if shape.linear:
                size = tirx.Select(tirx.NE(self.bits[i], u32(0)), count, i32(0))
            else:
                size = self._inside(i)
            where = address(self.a, self.base + self._cast(self.offsets[i] + k))
            place = address(self.memory, stage + self.places[i])
            if shape.linear and shape.unit == 16:  # each byte is read once: not by way of L1
                do("copy16", place, where, size)
            else:
                name = "gather4" if shape.single else f"fetch{shape.unit}"
                do(name, place, where, T.Bind(size), fill)
        if shape.entry:
            self._fetch_entry(step + 1)

    def _inside(self, i: int) -> Any:
        """Bytes of the piece that the entry is of, in a thread's row i: 0 where it is outside."""
        shape, work = self.shape, self.work
        if shape.masked:
            need = self.entry[1]
            unit = i32(min(shape.unit, shape.span))  # with 1 to 3 channels pieces are all alike
            if shape.single and shape.span > shape.unit:
                unit = tirx.Cast("int32", need >> COUNT_BIT) + 1
            return tirx.Select(tirx.EQ(self.bits[i] & need, need), unit, i32(0))
        z, y, x = self.corners[i]
        low = self.entry[2] & 0xFFFF
        taps = (
            z + tirx.Cast("int32", self.entry[1]),
            y + tirx.Cast("int32", self.entry[2] >> 16),
            x + tirx.Cast("int32", low),
        )
        inside = [
            tirx.Cast("uint32", at) < u32(size) for at, size in zip(taps, work.size, strict=True)
        ]
        count = tirx.Cast("int32", self.entry[3])
        return tirx.Select(tirx.And(tirx.And(inside[0], inside[1]), inside[2]), count, i32(0))


def _guarded(needed: bool, condition: Any) -> Any:
    """A context: under `condition` if that is needed."""
    stack = ExitStack()
    if needed:
        stack.enter_context(T.If(condition))
        stack.enter_context(T.Then())
    return stack
