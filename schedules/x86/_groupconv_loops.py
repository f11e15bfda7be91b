"""The loops around the cells of integer group convolutions.

    for unit = (image, chunk of rows, chunk of blocks):      parallel, where there is work for it
        for row in chunk:  for block in chunk:  for cell in row:
            a cell is some pixels x all vectors of a block, in registers
            for kd, kh inside of A:  for step:  for column of A:
                an operand of A is loaded once and meets the weights of every kw

Rows whose taps leave A have shorter loops over kd and kh. Columns whose taps do are known when
the code is made: a row is a few runs of equal cells. The last cell of a row overlaps the one
before where the row is no multiple of a cell.

With `overlap` a cell leaves its sums in registers, and its end, from sums to C, goes between the
multiply-adds of the next cell, whichever that is: out of order execution does not look that far
ahead. Cycles on Zen 4 per 16 filters beyond those of vpdpbusd, without and with: 4 a group 4.2 and
2.9, 8 6.7 and 2.4, 16 2.6 and 1.4. One each is vmulps, which has the ports of vpdpbusd. The first
cell of a unit has none before it and stores what zeros give at its own place, where it stores
itself later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from ...workload import NUMPY, Conv
from ._groupconv import Border, ceil_div
from ._groupconv_store import Store, Task
from ._ir import T, bits, local, prim_func, ramp, splat, tirx

if TYPE_CHECKING:
    from ._groupconv import IntegerGroupConv

_PARALLEL_US = 20.0  # less is not worth sharing
_UNITS = 32  # parallel units to aim at, so that a few threads get nearly equal shares

Taps = tuple[tuple[int, int], ...]  # per pixel of a cell: kw inside of A, first and last + 1
Run = tuple[Taps, int, int, int]  # equal cells: taps, first column, how many, columns of each


def loop(extent: Any, body: Callable[[Any], None]) -> None:
    """A serial loop, or its body where it would be one pass."""
    if isinstance(extent, int) and extent <= 1:
        if extent == 1:
            body(0)
        return
    with T.serial(0, extent) as i:
        body(i)


@dataclass(frozen=True)
class Row:
    """A row of C: where it is, and the taps of its kd and kh that are inside of A."""

    image: Any
    d: Any
    h: Any
    d0: Any
    h0: Any
    hn: Any
    count: Any  # pairs of kd and kh
    border: Any  # class of its corrections, with that of column 0
    pixel: Any  # index of its first pixel in C


@dataclass(frozen=True)
class Block:
    """A block of filters."""

    number: Any
    group: Any  # its first
    filter: Any  # its first


class Builder:
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: IntegerGroupConv, work: Conv, params: Any) -> None:
        self.kernel, self.work, self.params = kernel, work, params
        self.lay = kernel.layout(work, params)
        self.scheme = self.lay.scheme
        self.runs = self._runs()
        self.cell_pixels = len(self.runs[0][0])
        # kh that every row has in its first kd
        self.least_rows = self.lay.borders[1].least if self.lay.borders[0].least else 0
        dims = (work.batch or 1, *work.size, work.channels)
        outs = (work.batch or 1, *work.outputs, work.filters)
        small = work.batch is not None and max(prod(dims), prod(outs)) < 2**31
        self.index = "int32" if small else "int64"

    def _runs(self) -> list[Run]:
        """Cells of a row, the last one as wide as the others."""
        taps, width = self.lay.borders[2].taps, self.work.outputs[2]
        cells = ceil_div(width, self.params.pixels)
        size = ceil_div(width, cells)
        runs: list[Run] = []
        for c in range(cells):
            x = min(c * size, width - size)
            inside = taps[x : x + size]
            if runs and runs[-1][0] == inside and x == runs[-1][1] + runs[-1][2] * size:
                runs[-1] = (inside, runs[-1][1], runs[-1][2] + 1, size)
            else:
                runs.append((inside, x, 1, size))
        return runs

    # ---- function and loops ----
    def function(self) -> Any:
        work = self.work
        with prim_func(self.kernel.name) as builder:
            batch = tirx.Var("batch", "int64") if work.batch is None else self.const(work.batch)
            size = [self.const(d) for d in (*work.size, work.channels)]
            a = T.arg("a", T.buffer((batch, *size), NUMPY[work.a]))
            self.w = T.arg("w", T.buffer((self.lay.nbytes,), "uint8"))
            size = [self.const(d) for d in (*work.outputs, work.filters)]
            c = T.arg("c", T.buffer((batch, *size), NUMPY[work.out]))
            # flat: indices of four dims in every access double the time to compile
            count = batch * self.const(prod(work.size) * work.channels)
            self.a = T.decl_buffer((count,), NUMPY[work.a], data=a.data)
            count = batch * self.const(prod(work.outputs) * work.filters)
            flat = T.decl_buffer((count,), NUMPY[work.out], data=c.data)
            self.store = Store(work, self.lay, self.w, flat)
            self._units(batch)
        return builder.get()

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    def _units(self, batch: Any) -> None:
        work = self.work
        image_us = work.ops / (work.batch or 1) / (self.kernel.gops * 1e3)
        shared = ceil_div(int(_PARALLEL_US * 1e3), max(1, int(image_us * 1e3)))  # images
        if work.batch is not None or shared == 1:
            self._split(batch, (work.batch or 1) >= shared)
            return
        with T.If(batch < shared):
            with T.Then():
                self._split(batch, False)
            with T.Else():
                self._split(batch, True)

    def _split(self, batch: Any, parallel: bool) -> None:
        """Units of about equal work; as few as there can be if they are not shared."""
        work, blocks = self.work, self.scheme.blocks
        rows = work.outputs[0] * work.outputs[1]
        width = min(self.params.blocks, blocks)
        chunks = ceil_div(blocks, width)
        height = rows
        if parallel:
            height = max(1, rows // ceil_div(_UNITS, chunks * (work.batch or 1)))
        stripes = ceil_div(rows, height)
        with (T.parallel if parallel else T.serial)(self.const(0), batch * (stripes * chunks)) as u:
            image, stripe, chunk = u // (stripes * chunks), u // chunks % stripes, u % chunks
            row, block = T.Bind(stripe * height), T.Bind(chunk * width)
            high = height if rows % height == 0 else tirx.min(height, rows - row)
            wide = width if blocks % width == 0 else tirx.min(width, blocks - block)
            self._unit(image, (row, high), (block, wide))

    def _unit(self, image: Any, rows: tuple[Any, Any], blocks: tuple[Any, Any]) -> None:
        """Some rows, counted through all d and h, of some blocks: (first, how many) each."""
        if self.params.overlap:
            lanes = self.scheme.lanes
            self.before = local(self.cell_pixels * self.scheme.width, "int32")
            self.state = local(2, self.index)
            for i in range(0, self.cell_pixels * self.scheme.width, lanes):
                T.buffer_store(self.before, splat(0, "int32", lanes), [ramp(i, lanes)])
            block = self._block(blocks[0])
            self._remember(self._pixel(image, rows[0]) * self.work.filters + block.filter, block)

        def each_row(r: Any) -> None:
            row = self._row(image, rows[0] + r)

            def each_block(b: Any) -> None:
                block = self._block(T.Bind(blocks[0] + b))
                for run in self.runs:
                    self._run(run, row, block)

            loop(blocks[1], each_block)

        loop(rows[1], each_row)
        if self.params.overlap:
            for task in self._end():
                task()

    def _run(self, run: Run, row: Row, block: Block) -> None:
        inside, x, cells, step = run
        loop(cells, lambda i: self._cell(inside, row, x + i * step, block))

    def _pixel(self, image: Any, row: Any) -> Any:
        depth, high, width = self.work.outputs
        return T.Bind((image * (depth * high) + row) * width)

    def _row(self, image: Any, row: Any) -> Row:
        depth, high, width = self.lay.borders
        d: Any = 0
        h = row
        if self.work.outputs[0] > 1:
            d, h = T.Bind(row // self.work.outputs[1]), T.Bind(row % self.work.outputs[1])
        (d0, dn), (h0, hn) = self._inside(0, d), self._inside(1, h)
        border: Any = 0
        if self.lay.classes > 1:
            numbers = [_class(depth, d), _class(high, h)]
            border = T.Bind((numbers[0] * high.classes + numbers[1]) * width.classes)
        return Row(image, d, h, d0, h0, hn, dn * hn, border, self._pixel(image, row))

    def _inside(self, dim: int, x: Any) -> tuple[Any, Any]:
        """First tap of an output in a dimension, and how many are inside of A."""
        border, work = self.lay.borders[dim], self.work
        if len(set(border.taps)) == 1:
            low, high = border.taps[0]
            return low, high - low
        kernel, dilation = work.kernel[dim], work.dilations[dim]
        at = T.Bind(work.pads[dim][0] - x * work.strides[dim])

        def taps(distance: Any) -> Any:
            return tirx.min((tirx.max(distance, 0) + (dilation - 1)) // dilation, kernel)

        low = T.Bind(taps(at))
        return low, T.Bind(tirx.max(taps(at + work.size[dim]) - low, 0))

    def _block(self, number: Any) -> Block:
        scheme = self.scheme
        group = number // scheme.shares * scheme.together
        if scheme.groups % scheme.together:
            group = tirx.min(group, scheme.groups - scheme.together)
        group = T.Bind(group)
        first = group * scheme.filters + number % scheme.shares * scheme.width
        return Block(number, group, T.Bind(first))

    # ---- one cell ----
    def _cell(self, inside: Taps, row: Row, x: Any, block: Block) -> None:
        scheme, lay = self.scheme, self.lay
        lanes, size = scheme.lanes, scheme.vectors * scheme.lanes
        acc = local(len(inside) * size, "int32")
        for p, taps in enumerate(inside):
            border = row.border
            if lay.classes > 1:
                border = border + lay.borders[2].ranges.index(taps)
            start = lay.base + (block.number * lay.classes + border) * (4 * size)
            for j in range(0, size, lanes):
                value = bits(f"int32x{lanes}", self.w[ramp(start + 4 * j, 4 * lanes)])
                T.buffer_store(acc, value, [ramp(p * size + j, lanes)])

        at = (row.pixel + x) * self.work.filters + block.filter
        tasks = self._end() if self.params.overlap else []
        steps, uses = scheme.steps, sum(high - low for low, high in inside) * scheme.vectors
        wanted = ceil_div(int(len(tasks) * self.kernel.spread), max(1, uses))
        first = min(self.least_rows * steps, wanted) if uses else 0
        pace = Pace(tasks, first * uses)

        def step(number: Any, k: Any, pace: Pace | None = None) -> None:
            kd, kh = row.d0, row.h0 + number
            if self.work.kernel[0] > 1 and pace is None:
                kd, kh = row.d0 + number // row.hn, row.h0 + number % row.hn
            self._step(acc, inside, row, (kd, kh, k), x, block, pace)

        for number in range(first):
            step(number // steps, number % steps, pace)
        pace.finish()
        done, rest = divmod(first, steps)
        if rest:
            loop(steps - rest, lambda k: step(done, rest + k))
            done += 1
        if uses:
            after = ceil_div(first, steps)
            loop(row.count - after, lambda n: loop(steps, lambda k: step(after + n, k)))

        sums = self._sums(acc, len(inside))
        if self.params.overlap:
            for i, value in enumerate(sums):
                T.buffer_store(self.before, value, [ramp(i * lanes, lanes)])
            self._remember(at, block)
        else:
            for task in self.store.tasks(sums, T.Bind(at), block.number):
                task()

    def _step(
        self, acc: Any, inside: Taps, row: Row, tap: Any, x: Any, block: Block, pace: Pace | None
    ) -> None:
        """One operand of A per column, for one (kd, kh, step)."""
        scheme, work, lay, kernel = self.scheme, self.work, self.lay, self.kernel
        lanes, vectors = scheme.lanes, scheme.vectors
        (sd, sh, sw), (dd, dh, dw) = work.strides, work.dilations
        kd, kh, k = tap
        z = row.d * sd + kd * dd - work.pads[0][0]
        y = row.h * sh + kh * dh - work.pads[1][0]
        tap = ((block.number * work.kernel[0] + kd) * work.kernel[1] + kh) * scheme.steps + k
        first = T.Bind(tap * (work.kernel[2] * vectors * lay.vector_bytes))
        columns: dict[int, list[tuple[int, int]]] = {}
        for p, (low, high) in enumerate(inside):
            for kw in range(low, high):
                columns.setdefault(p * sw + kw * dw - work.pads[2][0], []).append((p, kw))
        weights = {
            (kw, j): T.Bind(
                self.w[ramp(first + (kw * vectors + j) * lay.vector_bytes, lay.vector_bytes)]
            )
            for kw in sorted({kw for uses in columns.values() for _, kw in uses})
            for j in range(vectors)
        }
        depth, high, width = work.size
        pixel = ((row.image * depth + z) * high + y) * width + x * sw
        channel = block.group * scheme.group + k * scheme.a_bytes
        start = T.Bind(pixel * work.channels + channel)
        each = vectors // scheme.operands
        for column, number in product(sorted(columns), range(scheme.operands)):
            at = start + (column * work.channels + number * scheme.span * scheme.group)
            a = kernel.a_operand(self.a[ramp(at, scheme.a_bytes)], scheme)
            for p, kw in columns[column]:
                for j in range(number * each, (number + 1) * each):
                    where = ramp((p * vectors + j) * lanes, lanes)
                    value = kernel.multiply_add(acc[where], a, weights[kw, j], scheme)
                    T.buffer_store(acc, value, [where])
                    if pace is not None:
                        pace.tick()

    def _sums(self, acc: Any, pixels: int) -> list[Any]:
        """The parts of a group added up: per 128 bits, two sums of one vector, two of the next."""
        lanes, count = self.scheme.lanes, pixels * self.scheme.vectors
        vectors = [T.Bind(acc[ramp(i * lanes, lanes)]) for i in range(count)]
        if self.scheme.parts == 1:
            return vectors
        quads = range(0, lanes, 4)

        def pick(a: Any, b: Any, at: tuple[int, int]) -> Any:
            lanes_of = [q + i + side for q in quads for side in (0, lanes) for i in at]
            return T.Shuffle([a, b], lanes_of)

        return [
            T.Bind(pick(a, b, (0, 2)) + pick(a, b, (1, 3)))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]

    # ---- the cell before ----
    def _remember(self, at: Any, block: Block) -> None:
        for i, value in enumerate((at, block.number)):
            T.buffer_store(self.state, tirx.Cast(self.index, value), [i])

    def _end(self) -> list[Task]:
        """What stores the cell before."""
        lanes = self.scheme.lanes
        at, block = T.Bind(self.state[0]), T.Bind(self.state[1])
        count = self.cell_pixels * self.scheme.outputs
        sums = [T.Bind(self.before[ramp(i * lanes, lanes)]) for i in range(count)]
        return self.store.tasks(sums, at, block)


class Pace:
    """Spreads tasks evenly over a number of ticks."""

    def __init__(self, tasks: list[Task], ticks: int) -> None:
        self.tasks, self.ticks = tasks, ticks
        self.done = self.at = 0

    def tick(self) -> None:
        self.at += 1
        self._until(self.at * len(self.tasks) // self.ticks)

    def finish(self) -> None:
        self._until(len(self.tasks))

    def _until(self, count: int) -> None:
        while self.done < count:
            self.tasks[self.done]()
            self.done += 1


def _class(border: Border, x: Any) -> Any:
    """The class of an output: those before `first`, it, those after `last`."""
    return tirx.min(x, border.first) + tirx.max(x - border.last, 0)
