"""The loops of the integer depthwise kernels: units of work, rows of A, the ring of windows.

    for unit = (image, z, band of rows, strip of columns, block of channels):     parallel
        windows of the first `ring` rows of A, for every kd
        for row of C in band:
            for cell of up to `pixels` outputs:
                sums and epilogue; and a share of the windows that the next row needs
            windows at the ends of the strip, for the next row

    ring (stack, in L1):  slot 0: row 0   windows 0 .. n      a window: [quarter] vectors of V bytes
                          slot 1: row 1                       slots are used in turns
                          ...

What lies outside of A is written into the windows as A's zero point, so that cells know nothing of
borders: one piece of code for all outputs, and no correction but the sum of all weights. Windows
are made between the multiplications of the row before: their stores, 2 cycles each, then cost
little: 28x28x192 takes 15.9 us with the two in turns, 12.6 like this.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ...workload import NUMPY, Conv
from ._depthwise import BLANK_WINDOW, COMMON, Block, ceil_div
from ._depthwise_cell import Cells, Row
from ._ir import T, bits, local, prim_func, ramp, tirx

if TYPE_CHECKING:
    from ._depthwise import Depthwise

_PARALLEL_US = 10.0  # less is not worth sharing: a launch costs 1 to 3 us
_UNITS = 32  # parallel units to aim at
_SLAB_BYTES = 256 << 10  # of A, that stay in L2 while block after block of channels passes


class Taps:
    """Where the rows of A are, or go, that row y of C and the one after it need.

    For several kd in tables, so that code can loop over them.
    """

    def __init__(self, builder: Builder, y: Any) -> None:
        self.plan = plan = builder.plan
        self.first = plan.ring - plan.fresh
        self.builder, self.y = builder, y
        if plan.kd == 1:
            self.slots = [T.Bind(builder.slot_of(0, y, ky * plan.dh)) for ky in range(plan.kh)]
            self.fresh = [builder.source(0, y + 1, self.first + i) for i in range(plan.fresh)]
            return
        self.slot_table = local(plan.kd * plan.kh, "int32")
        self.fresh_slots = local(plan.kd * plan.fresh, "int32")
        self.fresh_at = local(plan.kd * plan.fresh, builder.index)
        with T.serial(0, plan.kd) as kz:
            with T.serial(0, plan.kh) as ky:
                value = builder.slot_of(kz, y, ky * plan.dh)
                T.buffer_store(self.slot_table, value, [kz * plan.kh + ky])
            with T.serial(0, plan.fresh) as i:
                row = builder.source(kz, y + 1, self.first + i)
                T.buffer_store(self.fresh_slots, row.slot, [kz * plan.fresh + i])
                T.buffer_store(self.fresh_at, row.at, [kz * plan.fresh + i])

    def slot(self, kz: Any, ky: int) -> Any:
        """Where in the ring the row of a tap is."""
        if self.plan.kd == 1:
            return self.slots[ky]
        return T.Bind(self.slot_table[kz * self.plan.kh + ky])

    def rows(self, kz: Any) -> list[Row]:
        """The rows that the next row of C needs for the first time."""
        if self.plan.kd == 1:
            return self.fresh
        at = [kz * self.plan.fresh + i for i in range(self.plan.fresh)]
        return [Row(T.Bind(self.fresh_at[i]), T.Bind(self.fresh_slots[i]), None) for i in at]


def total_bytes(work: Conv) -> int:
    """Of A and C."""
    size = np.dtype(NUMPY[work.out]).itemsize
    pixels = prod(work.size) + prod(work.outputs) * size
    return (work.batch or 1) * pixels * work.channels


class Builder(Cells):
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: Depthwise, workload: Conv, params: Any) -> None:
        self.kernel, self.work, self.params = kernel, workload, params
        self.plan = kernel.plan(workload, params)
        small = workload.batch is not None and total_bytes(workload) < 2**31
        self.index = "int32" if small else "int64"
        self.blocks = kernel.blocks(workload, self.plan)
        self.end = kernel.constants(workload, self.plan)

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    # ---- function and units ----
    def function(self) -> Any:
        work, plan = self.work, self.plan
        with prim_func("main") as builder:
            batch: Any = work.batch
            if batch is None:
                batch = tirx.Var("batch", "int64")
            a = T.arg("A", T.buffer((batch, *work.size, work.channels), "uint8"))
            self.w = T.arg("W", T.buffer((self.end + 64 * COMMON,), "uint8"))
            c = T.arg("C", T.buffer((batch, *work.outputs, work.filters), NUMPY[work.out]))
            # flat: fewer terms for TVM to walk and LLVM to fold
            self.a = T.decl_buffer((batch * prod(work.size) * work.channels,), a.dtype, data=a.data)
            self.c = T.decl_buffer(
                (batch * prod(work.outputs) * work.filters,), c.dtype, data=c.data
            )
            blocks = sum(b.count for b in self.blocks)
            us = work.ops / (self.kernel.gops * 1e3)
            parallel = us >= _PARALLEL_US or work.batch is None
            rows = self._rows(blocks, parallel)
            bands = ceil_div(plan.oh, rows)
            inner = bands * plan.strips * blocks
            images = batch * plan.od if work.batch is not None else batch * self.const(plan.od)
            total = images * inner
            loop = T.parallel if parallel else T.serial
            self.rows, self.bands, self.count = rows, bands, blocks
            if isinstance(total, int):
                total = self.const(total)
            with loop(self.const(0), total) as u:
                self.n, self.z, self.y, self.x, self.strip, block = self._place(u)
                self._block(block, self.blocks, 0)
        return builder.get()

    def _place(self, unit: Any) -> tuple[Any, ...]:
        """Image, z, y and x of the first output, number of the strip and the block of a unit."""
        plan, blocks = self.plan, self.count
        image, rest = self._split(unit, self.bands * plan.strips * blocks)
        band, rest = self._split(rest, plan.strips * blocks)
        strip, block = self._split(rest, blocks)
        n, z = self._split(image, plan.od)
        y = x = self.const(0)
        if self.bands > 1:
            y = tirx.min(band * self.rows, self.const(plan.oh - self.rows))
        if plan.strips > 1:
            x = tirx.min(strip * plan.strip, self.const(plan.ow - plan.strip))
        return n, z, T.Bind(y), T.Bind(x), strip, block

    def _split(self, value: Any, size: int) -> tuple[Any, Any]:
        if size == 1:
            return value, self.const(0)
        return T.Bind(value // size), T.Bind(value % size)

    def _rows(self, blocks: int, parallel: bool) -> int:
        """Rows of C of a unit."""
        work, plan = self.work, self.plan
        row_bytes = plan.sh * work.size[2] * work.channels
        bands = ceil_div(plan.oh * row_bytes, _SLAB_BYTES)
        if parallel:
            others = plan.od * plan.strips * blocks * (work.batch or 1)
            bands = max(bands, ceil_div(_UNITS, others))
        bands = min(bands, max(1, plan.oh // 4))
        return ceil_div(plan.oh, bands)

    def _block(self, number: Any, blocks: list[Block], first: int) -> None:
        block = blocks[0]

        def run() -> None:
            i = number - first
            self._unit(block, i * block.width + block.channel, i * block.bytes + block.at)

        if len(blocks) == 1:
            run()
            return
        with T.If(number < first + block.count):
            with T.Then():
                run()
            with T.Else():
                self._block(number, blocks[1:], first + block.count)

    # ---- a unit: some rows of a strip of a block of channels ----
    def _unit(self, block: Block, channel: Any, offset: Any) -> None:
        plan, width = self.plan, block.width
        self.width, self.valid = width, min(width, self.work.channels)
        self.channel, self.offset = T.Bind(channel), T.Bind(offset)
        self.offsets = self.kernel.layout(self.work, plan, width)
        self.slot = plan.windows * plan.stored  # vectors
        # TVM aligns what is on the stack to 16 bytes, LLVM vectors to their size; spills too then.
        self.ring = local(plan.kd * plan.slots * self.slot, f"int8x{width}")
        self.column = T.Bind(self.x * plan.sw - plan.left)
        with T.serial(0, plan.ring) as r:
            with T.serial(0, plan.kd) as kz:
                row = self.source(kz, 0, r)
                self._inner(row, *plan.inner)
                self._edges(row)
        with T.serial(0, self.rows) as y:
            self._outputs(y)
            with T.serial(0, plan.kd) as kz:
                with T.serial(0, plan.fresh) as i:
                    self._edges(self.source(kz, y + 1, plan.ring - plan.fresh + i))

    def source(self, kz: Any, y: Any, r: Any) -> Row:
        """Of the `ring` rows of A that row y of C needs number r, the nearest one if outside."""
        work, plan = self.work, self.plan
        slot = T.Bind(self.slot_of(kz, y, r))
        at = []
        inside = []
        for start, size, pads in (
            (self.z * plan.sd - plan.front + kz * plan.dd, work.size[0], work.pads[0]),
            ((self.y + y) * plan.sh - plan.top + r, work.size[1], work.pads[1]),
        ):
            value = T.Bind(start)
            if pads != (0, 0):
                inside += [value >= 0, value < size]
            at.append(T.Bind(tirx.max(tirx.min(value, size - 1), 0)))
        d, h, w = work.size
        pixel = ((self.n * d + at[0]) * h + at[1]) * w + self.column
        first = T.Bind(pixel * work.channels + self.channel)
        return Row(first, slot, tirx.all(*inside) if inside else None)

    def slot_of(self, kz: Any, y: Any, r: Any) -> Any:
        plan = self.plan
        return (kz * plan.slots + (y * plan.fresh + r) % plan.slots) * self.slot

    def _edges(self, row: Row) -> None:
        """The windows of a row that the inner loop leaves; all of them, if it is outside of A."""
        plan = self.plan
        begin, stop = plan.inner

        def edges() -> None:
            for windows, strip, start in (
                (range(begin), 0, 0),
                (range(stop, plan.windows), plan.strips - 1, plan.ow - plan.strip),
            ):
                if not windows:
                    continue
                if plan.strips == 1:
                    self._border(row, windows, 0)
                    continue
                with T.If(tirx.EQ(self.strip, self.const(strip))):
                    with T.Then():
                        self._border(row, windows, start)
                    with T.Else():
                        self._border(row, windows, None)

        if row.inside is None:
            edges()
            return
        with T.If(row.inside):
            with T.Then():
                edges()
            with T.Else():
                with T.serial(0, self.slot) as v:
                    T.buffer_store(self.ring, self._blank(BLANK_WINDOW), [row.slot + v])

    def _border(self, row: Row, windows: range, start: int | None) -> None:
        """Windows of a strip from column `start` of C on; None: all of A they need is there."""
        plan, size = self.plan, self.work.size[2]

        def column(c: int) -> Any:
            if start is not None and not 0 <= start * plan.sw - plan.left + c < size:
                return T.Bind(self._blank())
            return self._pixel(row.at, c)

        self._unpacked(row.slot, windows, column)

    def _inner(self, row: Row, begin: int, stop: int) -> None:
        plan = self.plan
        unit = self.params.unroll * (1 if plan.chained else plan.steps)
        count = (stop - begin) // unit
        if count > 1:
            with T.serial(0, count) as i:
                self._some(row, begin, i * unit, unit)
            begin += count * unit
        self._some(row, begin, 0, stop - begin)

    def _some(self, row: Row, begin: int, skip: Any, count: int) -> None:
        """`count` inner windows from number begin + skip on; skip is a multiple of a period."""
        plan = self.plan
        if plan.chained:
            pixels = skip * plan.pitch
        else:
            pixels = skip // plan.steps * plan.pitch
        at = T.Bind(row.at + pixels * self.work.channels)
        slot = T.Bind(row.slot + skip * plan.stored)
        windows = range(begin, begin + count)
        self._unpacked(slot, windows, lambda c: self._pixel(at, c))

    def _unpacked(self, slot: Any, windows: range, column: Any) -> None:
        made: dict[Any, Any] = {}

        def pixel(c: int) -> Any:
            if c not in made:
                made[c] = column(c)
            return made[c]

        for w in windows:
            values = self.kernel.windows(self.plan.columns(w), pixel, made, self.width)
            for i, value in enumerate(values):
                T.buffer_store(self.ring, value, [slot + (w * self.plan.stored + i)])

    def _pixel(self, at: Any, column: int) -> Any:
        width = self.width
        at = at + column * self.work.channels
        if self.valid == width:
            value = self.a[ramp(at, width)]
        else:
            parts = [self.a[at + i] for i in range(self.valid)]
            parts += [parts[-1]] * (width - self.valid)
            value = T.Shuffle(parts, list(range(width)))
        return T.Bind(bits(f"int8x{width}", value))

    # ---- a row of C ----
    def _outputs(self, y: Any) -> None:
        """Row y of the unit; the windows that the next row needs are made on the way."""
        plan = self.plan
        taps = Taps(self, y)
        size = plan.cell(self.params.pixels)
        cells = ceil_div(plan.strip, size)
        rest = plan.strip - (cells - 1) * size
        begin, stop = plan.inner
        period = 1 if plan.chained else plan.steps
        each = ceil_div(ceil_div(stop - begin, cells), period) * period  # windows made in a cell
        last = stop - begin - each
        run = min(each, 2 * period)
        pieces = [(w, min(run, each - w)) for w in range(0, each, run)] if run else []

        def cell(number: Any, pixels: int) -> None:
            if isinstance(number, int):
                skip = min(number * each, last)
            else:
                skip = T.Bind(tirx.min(number * each, tirx.const(last, "int32")))

            def make(rows: list[Row], part: int) -> None:
                """A quarter of the windows that the cell makes of these rows."""
                jobs = [(row, *piece) for row in rows for piece in pieces]
                for row, w, count in jobs[len(jobs) * part // 4 : len(jobs) * (part + 1) // 4]:
                    self._some(row, begin + w, skip, count)

            group = number * (size // plan.share)
            self._cell(y, taps, group if isinstance(group, int) else T.Bind(group), pixels, make)

        loop = cells if rest == size else cells - 1
        if loop > 1:
            with T.serial(0, loop) as i:
                cell(i, size)
        elif loop:
            cell(0, size)
        if loop < cells:
            cell(loop, rest)
