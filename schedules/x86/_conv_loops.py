"""The loops around the tiles of an integer convolution, shared among threads.

    for unit = (image, chunk of rows, group, panel):      parallel, where there is work for it
        for row in chunk:  for tile in row:
            for kd, ky that the row has:  for runs of kx, c that the tile has:  multiply and add
            scale, round, pack, store

Weights are outside: a panel stays in the first caches while all pixels of the chunk pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...workload import NUMPY, Conv
from ._conv_epilogue import ConvEpilogue
from ._conv_int import RESIDUAL
from ._conv_shape import Axis, Band, Shape, Tile, ceil_div
from ._ir import T, bits, local, prim_func, ramp, splat, tirx

if TYPE_CHECKING:
    from ._conv_int import IntegerConv

_PARALLEL_US = 20.0  # less is not worth sharing: a launch costs 1 to 3 us
_UNITS = 32  # parallel units to aim at, so that a few threads get nearly equal shares
_CHUNK_BYTES = 1 << 20  # of A, R and C that stay in L2 while panel after panel passes
_UNROLL = 128  # multiply-adds of a run up to which its k-loop is unrolled
_EARLY = 4  # k-steps of a tile during which a piece of the tile before is stored
_PREFETCH = "llvm.prefetch"


@dataclass(frozen=True)
class Row:
    """Where a row of outputs is: everything but constants may be an expression."""

    pixel: Any  # its first output, counted over all images
    source: Any  # element of A that its output 0 would read for tap 0, channel 0 of the group
    z: tuple[Any, Any]  # first kd, number of kd
    y: tuple[Any, Any]
    variant: Any  # of border, but for x


@dataclass(frozen=True)
class Panel:
    """Where a panel of filters is."""

    weights: Any  # byte offset in W
    column: Any  # first vector, counted over all groups
    channel: Any  # first channel of A
    filter: Any  # first filter
    nr: int
    valid: int  # filters


class Builder:
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: IntegerConv, workload: Conv, params: Any) -> None:
        self.kernel, self.work, self.params = kernel, workload, params
        self.shape = Shape(workload)
        self.lay = kernel.layout(workload, params)
        self.bands = self.shape.bands(params.mr)
        self.rows = sum(band.rows for band in self.bands)
        self.scratch = self.shape.copied or kernel.staged
        images = workload.batch
        elements = max(
            workload.size[0] * workload.size[1] * workload.size[2] * workload.channels,
            self.shape.z.size * self.shape.y.size * self.shape.x.size * workload.channels,
            self.shape.pixels * workload.filters,
        )
        small = images is not None and images * elements < 2**31
        self.index = "int32" if small else "int64"
        self.parallel = workload.ops / (kernel.gops * 1e3) >= _PARALLEL_US

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    # ---- function ----
    def function(self) -> Any:
        work, shape = self.work, self.shape
        with prim_func(self.kernel.name) as builder:
            batch = tirx.Var("batch", "int64") if work.batch is None else self.const(work.batch)
            outputs = [self.const(v) for v in (*work.outputs, work.filters)]
            inputs = [self.const(v) for v in (*work.size, work.channels)]
            a = T.arg("a", T.buffer((batch, *inputs), "uint8"))
            self.w = T.arg("w", T.buffer((self.lay.nbytes,), "uint8"))
            r = None
            pixels = work.outputs[0] * work.outputs[1] * work.outputs[2]
            flat = (batch * pixels, self.const(work.filters))
            if work.residual:
                kind = NUMPY[work.residual.dtype]
                r = T.arg("r", T.buffer((batch, *outputs), kind))
            c = T.arg("c", T.buffer((batch, *outputs), NUMPY[work.out]))
            size = work.size[0] * work.size[1] * work.size[2] * work.channels
            self.a = T.decl_buffer((batch * size,), "uint8", data=a.data)
            c = T.decl_buffer(flat, NUMPY[work.out], data=c.data)
            if r is not None:
                r = T.decl_buffer(flat, r.dtype, data=r.data)
            masks = self.kernel.bits == 512
            self.epilogue = ConvEpilogue(work, self.lay.lanes, masks, c, r, self._constant)
            self.images = batch if shape.images is None else self.const(shape.images)
            if self.scratch:
                self._through_scratch()
            else:
                self.source = self.a
                self._units(self.images, self.const(0), self.const(0))
        return builder.get()

    def _through_scratch(self) -> None:
        """Image after image is copied or widened, then convolved."""
        work, shape = self.work, self.shape
        size = shape.z.size * shape.y.size * shape.x.size * work.channels
        own = size if shape.flat else work.size[0] * work.size[1] * work.size[2] * work.channels
        dtype = "int16" if self.kernel.staged else "uint8"
        # k-steps may read up to 3 elements past the last one, fills may write 63
        total = ceil_div(size + 64, 64) * 64
        self.source = T.alloc_buffer((self.const(total),), dtype, scope="global")

        def image(n: Any) -> None:
            if shape.copied and not shape.flat:
                self._pad(n * own)
            else:
                self._move(n * own, self.const(0), own)
            self._units(self.const(1), n, n)

        if shape.images == 1:
            image(self.const(0))
        else:
            with T.serial(self.const(0), self.images) as n:
                image(n)

    def _pad(self, origin: Any) -> None:
        """Copies the image at `origin` of A, with its padding around it."""
        work, shape = self.work, self.shape
        channels, (depth, height, width) = work.channels, work.size
        (front, _), (top, _), (left, _) = work.pads
        line, wide = width * channels, shape.x.size * channels
        lanes = 32 if self.kernel.staged else 64
        value = bits(f"{self.source.dtype}x{lanes}", self.w[ramp(self.lay.fill, 64)])
        edges = wide - line  # between the images of two rows

        def fill(to: Any, count: int) -> None:
            """`count` elements, and up to lanes - 1 more."""
            with T.serial(self.const(0), ceil_div(count, lanes)) as i:
                T.buffer_store(self.source, value, [ramp(to + i * lanes, lanes)])

        # Every fill may reach into the row that follows: that is written afterwards.
        with T.serial(self.const(0), shape.z.size) as z, T.serial(self.const(0), shape.y.size) as y:
            to = T.Bind((z * shape.y.size + y) * wide)
            inside = [z >= front, z < front + depth, y >= top, y < top + height]
            with T.If(tirx.all(*inside)):
                with T.Then():
                    if left:
                        fill(to, left * channels)
                    row = (z - front) * height + y - top
                    self._move(T.Bind(origin + row * line), T.Bind(to + left * channels), line)
                    if edges - left * channels:
                        fill(to + (left * channels + line), edges - left * channels)
                with T.Else():
                    fill(to, wide)

    def _move(self, origin: Any, to: Any, count: int) -> None:
        """Copies `count` elements of A, widening them if the kernel is staged."""
        dtype = self.source.dtype
        widest = self.kernel.bits // (16 if self.kernel.staged else 8)
        size = next((s for s in (widest, 32, 16, 8, 4) if s <= min(count, widest)), 1)

        def move(at: Any, size: int) -> None:
            if size == 1:
                value = tirx.Cast(dtype, self.a[origin + at])
                T.buffer_store(self.source, value, [to + at])
                return
            value = self.a[ramp(origin + at, size)]
            wide = tirx.Cast(f"{dtype}x{size}", value) if self.kernel.staged else value
            T.buffer_store(self.source, wide, [ramp(to + at, size)])

        with T.serial(self.const(0), count // size) as i:
            move(i * size, size)
        if count % size:  # overlaps the one before
            move(self.const(count - size), size)

    # ---- units ----
    def images_bytes(self) -> int:
        """Bytes of A, R and C of what is shared at a time."""
        work = self.work
        width = {"f32": 4, "s32": 4}.get(work.out, 1) + (work.residual is not None)
        images = work.batch if self.shape.flat and work.batch is not None else 1
        sizes = math.prod(work.size) * work.channels, math.prod(work.outputs) * work.filters * width
        return images * sum(sizes)

    def _units(self, images: Any, source_image: Any, image: Any) -> None:
        """All rows of `images` images from number `image` on."""
        work, lay = self.work, self.lay
        panels = lay.panels * work.groups
        touched = self.images_bytes()
        keep = max(_CHUNK_BYTES, 2 * panels * lay.nr * self.shape.steps * lay.step_bytes)
        chunks = max(1, ceil_div(touched, keep))
        if self.parallel:
            chunks = max(chunks, ceil_div(_UNITS, panels))
        chunks = min(chunks, self.rows)
        share = ceil_div(self.rows, chunks)
        chunks = ceil_div(self.rows, share)
        single = isinstance(images, tirx.IntImm) and int(images) == 1

        def unit(u: Any) -> None:
            part, panel = u // panels, u % panels
            n = image if single else T.Bind(image + part // chunks)
            m = source_image if single else n
            if chunks == 1:
                first, last = self.const(0), self.const(self.rows)
            else:
                first = T.Bind(part % chunks * share)
                last = T.Bind(tirx.min(first + share, self.const(self.rows)))
            self._panel(T.Bind(panel), lambda p: self._rows(n, m, first, last, p))

        loop = T.parallel if self.parallel else T.serial
        total = images * (chunks * panels)
        if single and chunks * panels == 1:
            unit(self.const(0))
            return
        with loop(self.const(0), total) as u:
            unit(u)

    def _panel(self, panel: Any, run: Callable[[Panel], None]) -> None:
        """run(what is known of) panel number `panel`, counted over all groups."""
        lay, work = self.lay, self.work
        count = work.filters // work.groups
        step = lay.nr * self.shape.steps * lay.step_bytes
        group = self.const(0) if work.groups == 1 else T.Bind(panel // lay.panels)
        own = panel if work.groups == 1 else T.Bind(panel % lay.panels)

        def go(own: Any, nr: int, valid: int) -> None:
            column = own * lay.nr
            run(
                Panel(
                    T.Bind(group * lay.group_bytes + own * step),
                    T.Bind(group * lay.vectors + column),
                    group * work.group_channels,
                    T.Bind(group * count + column * lay.lanes),
                    nr,
                    valid,
                )
            )

        whole = count // (lay.lanes * lay.nr)  # panels of whole vectors
        rest = lay.vectors - whole * lay.nr, count - whole * lay.nr * lay.lanes
        if whole == lay.panels:
            go(own, lay.nr, lay.nr * lay.lanes)
        elif whole == 0:
            go(self.const(0), *rest)
        else:
            with T.If(own < whole):
                with T.Then():
                    go(own, lay.nr, lay.nr * lay.lanes)
                with T.Else():
                    go(self.const(whole), *rest)

    # ---- rows ----
    def _rows(self, n: Any, source_n: Any, first: Any, last: Any, panel: Panel) -> None:
        """Rows first .. last - 1 of image n, which is number source_n in what tiles read."""
        for band in self.bands:
            if len(self.bands) == 1:
                low, count = first, last - first
            else:
                low = T.Bind(tirx.max(first, self.const(band.first)))
                end = tirx.min(last, self.const(band.first + band.rows))
                count = tirx.max(end - low, self.const(0))
            shape, narrow = self.shape, self.shape.span < 8 * band.width
            if shape.flat and shape.spans == 1 and self.params.defer and not narrow:
                self._deferring(n, source_n, low, count, band, panel)
                continue
            with T.serial(self.const(0), count) as i:
                row = self._row(n, source_n, band, T.Bind(low + i), panel)
                self._segments(row, band, panel)

    def _row(self, n: Any, source_n: Any, band: Band, at: Any, panel: Panel) -> Row:
        shape, channels = self.shape, self.work.channels
        if self.scratch:
            source_n = self.const(0)  # holds one image at a time
        if shape.flat:
            pixel = T.Bind((at - band.first) * band.width + band.pixel)
            everything = self.const(0), 1
            at = (source_n * shape.pixels + pixel) * (shape.x.stride * channels)
            source = T.Bind(at + panel.channel)
            base = T.Bind(n * shape.pixels + pixel)
            return Row(base, source, everything, everything, self.const(0))
        z, y = self.const(0), at
        if shape.z.outputs > 1:
            z, y = T.Bind(at // shape.y.outputs), T.Bind(at % shape.y.outputs)
        plane = (source_n * shape.z.size + z * shape.z.stride - shape.z.before) * shape.y.size
        line = (plane + y * shape.y.stride - shape.y.before) * shape.x.size - shape.x.before
        source = T.Bind(line * channels + panel.channel)
        pixel = T.Bind((n * (shape.z.outputs * shape.y.outputs) + at) * shape.x.outputs)
        z_taps, z_variant = self._taps(shape.z, self.lay.z_taps, z)
        y_taps, y_variant = self._taps(shape.y, self.lay.y_taps, y)
        return Row(pixel, source, z_taps, y_taps, T.Bind(z_variant + y_variant))

    def _taps(self, axis: Axis, table: int, at: Any) -> tuple[tuple[Any, Any], Any]:
        """Interval of taps of output `at`, and its part of the number of the variant."""
        if axis.whole:
            return (self.const(0), axis.kernel), self.const(0)

        def entry(k: int) -> Any:
            value = bits("int32", self.w[ramp(at * 12 + (table + 4 * k), 4)])
            return T.Bind(tirx.Cast(self.index, value))

        return (entry(0), entry(1)), entry(2) if self.shape.classed else self.const(0)

    def _segments(self, row: Row, band: Band, panel: Panel) -> None:
        for segment in band.segments:
            if segment.count == 1:
                self._tile(row, self.const(segment.x), segment.tile, panel)
            else:
                with T.serial(self.const(0), segment.count) as i:
                    self._tile(row, T.Bind(i * segment.tile.mr + segment.x), segment.tile, panel)

    # ---- one tile ----
    def _tile(self, row: Row, x: Any, tile: Tile, panel: Panel) -> None:
        acc = self._started(row, tile, panel)
        source = T.Bind(row.source + x * (self.shape.x.stride * self.work.channels))
        self._over(self.shape.z, row.z, lambda kd: self._planes(acc, row, kd, source, tile, panel))
        self._finish(acc, self.const(0), tile.mr, T.Bind(row.pixel + x), panel)

    def _started(self, row: Row, tile: Tile, panel: Panel) -> Any:
        """The accumulators of a tile: a local buffer, with what they start from in it."""
        nr, lanes = panel.nr, self.lay.lanes
        acc = local(tile.mr * nr * lanes, "int32")
        classes = sorted(set(tile.classes))
        start = {k: [T.Bind(self._start(row, k, panel, j)) for j in range(nr)] for k in classes}
        for i in range(tile.mr):
            for j in range(nr):
                value = start[tile.classes[i]][j]
                T.buffer_store(acc, value, [ramp((i * nr + j) * lanes, lanes)])
        return acc

    def _finish(self, acc: Any, first: Any, pixels: int, to: Any, panel: Panel) -> None:
        """C of `pixels` pixels from number `first` of the accumulators on, at pixel `to`."""
        for _ in self._finishing(acc, first, pixels, to, panel):
            pass

    def _finishing(
        self, acc: Any, first: Any, pixels: int, to: Any, panel: Panel
    ) -> Iterator[None]:
        """As `_finish`, in steps of about one instruction."""
        nr, lanes, lay = panel.nr, self.lay.lanes, self.lay
        scale, bias = [], []
        if self.work.out != "s32":
            scale = [T.Bind(self._filters(lay.scale, "float32", panel, j)) for j in range(nr)]
        if self.work.bias == "f32":
            bias = [T.Bind(self._filters(lay.bias, "float32", panel, j)) for j in range(nr)]
        registers = [
            [acc[ramp(((first + i) * nr + j) * lanes, lanes)] for j in range(nr)]
            for i in range(pixels)
        ]
        yield from self.epilogue.emit(registers, scale, bias, (to, panel.filter), panel.valid)

    def _deferring(
        self, n: Any, source_n: Any, low: Any, count: Any, band: Band, panel: Panel
    ) -> None:
        """Rows of one tile each, the end of every tile during the k-steps of the next."""
        tile, nr, lanes = band.segments[0].tile, panel.nr, self.lay.lanes
        pixels = 4 // math.gcd(4, nr)  # that fill stores
        while tile.mr % pixels == 0 and tile.mr // pixels > self.shape.steps:
            pixels *= 2
        if tile.mr % pixels:
            pixels = tile.mr
        pieces = tile.mr // pixels
        early = min(_EARLY, self.shape.steps // pieces)  # k-steps along with a piece
        done = local(tile.mr * nr * lanes, "int32")
        for v in range(tile.mr * nr):
            T.buffer_store(done, splat(0, "int32", lanes), [ramp(v * lanes, lanes)])
        first = self._row(n, source_n, band, low, panel).pixel
        size, depth = self.shape.span, self.shape.span // 4
        every = tuple(range(tile.mr))
        with T.serial(self.const(0), count) as i:
            row = self._row(n, source_n, band, T.Bind(low + i), panel)
            # the first time nothing is done yet: zeros go where the second time overwrites them
            before = T.Bind(tirx.max(row.pixel - tile.mr, first))
            acc = self._started(row, tile, panel)
            origin, weights = row.source, panel.weights
            with T.serial(self.const(0), pieces) as piece:
                to = T.Bind(before + piece * pixels)
                ending = self._finishing(done, piece * pixels, pixels, to, panel)
                share = self.epilogue.instructions(pixels, nr) / (early * tile.mr)
                told = 0
                for k in range(early):
                    s = T.Bind(piece * early + k)
                    for i in self._step(acc, every, origin, weights, s, s * 4, panel):
                        goal = math.ceil((k * tile.mr + i + 1) * share)
                        for _ in range(goal - told):
                            next(ending, None)
                        told = goal
                for _ in ending:
                    pass
            start = pieces * early
            with T.serial(self.const(0), depth - start) as k:
                s = T.Bind(k + start)
                _run_all(self._step(acc, every, origin, weights, s, s * 4, panel))
            if size % 4:
                offset = self.const(depth * 4 if self.shape.copied else size - 4)
                _run_all(self._step(acc, every, origin, weights, self.const(depth), offset, panel))
            for v in range(tile.mr * nr):
                where = ramp(v * lanes, lanes)
                T.buffer_store(done, acc[where], [where])
        last = T.Bind(first + (count - 1) * tile.mr)

        def drain() -> None:
            with T.serial(self.const(0), pieces) as piece:
                self._finish(done, piece * pixels, pixels, T.Bind(last + piece * pixels), panel)

        with T.If(count > 0):
            with T.Then():
                drain()

    def _over(self, axis: Axis, taps: tuple[Any, Any], body: Callable[[Any], None]) -> None:
        """body(tap) for an interval of the taps of z or y."""
        if axis.whole and axis.kernel == 1:
            body(self.const(0))
            return
        first, count = taps
        with T.serial(self.const(0), count) as i:
            body(i if axis.whole else T.Bind(first + i))

    def _planes(self, acc: Any, row: Row, kd: Any, source: Any, tile: Tile, panel: Panel) -> None:
        shape, lay, channels = self.shape, self.lay, self.work.channels
        line = shape.x.size * channels

        def lines(ky: Any) -> None:
            plane = kd * (shape.z.dilation * shape.y.size) + ky * shape.y.dilation
            origin = T.Bind(source + plane * line)
            tap = (kd * shape.y.kernel + ky) * shape.row_steps
            weights = T.Bind(panel.weights + tap * (panel.nr * lay.step_bytes))
            for run in tile.runs:
                self._run(acc, run, origin, weights, panel)

        self._over(shape.y, row.y, lines)

    def _run(self, acc: Any, run: Any, origin: Any, weights: Any, panel: Panel) -> None:
        """Multiplies and adds neighbouring kx and their channels."""
        shape = self.shape
        apart = shape.x.dilation * self.work.channels  # elements from one tap to the next
        if shape.spans == 1:
            self._steps(acc, run.pixels, origin, weights, shape.span, panel)
        elif shape.joined:
            skip = run.kx * shape.span_steps * panel.nr * self.lay.step_bytes
            size = run.taps * shape.span
            self._steps(acc, run.pixels, origin + run.kx * apart, weights + skip, size, panel)
        else:

            def tap(kx: Any) -> None:
                skip = kx * (shape.span_steps * panel.nr * self.lay.step_bytes)
                where, what = T.Bind(origin + kx * apart), T.Bind(weights + skip)
                self._steps(acc, run.pixels, where, what, shape.span, panel)

            if run.taps == 1:
                tap(self.const(run.kx))
            else:
                with T.serial(self.const(0), run.taps) as kx:
                    tap(kx + run.kx)

    def _steps(
        self, acc: Any, pixels: tuple[int, ...], origin: Any, weights: Any, size: int, panel: Panel
    ) -> None:
        """The k-steps of `size` channels that follow each other in A from `origin` on."""
        steps, whole = ceil_div(size, 4), size // 4
        if self.shape.copied:
            whole = steps
        looped = whole if whole * len(pixels) * panel.nr > _UNROLL else 0
        if looped:
            with T.serial(self.const(0), looped) as s:
                _run_all(self._step(acc, pixels, origin, weights, s, s * 4, panel))
        for k in range(looped, steps):
            offset = self.const(k * 4 if k < whole else size - 4)
            _run_all(self._step(acc, pixels, origin, weights, self.const(k), offset, panel))

    def _step(
        self,
        acc: Any,
        pixels: tuple[int, ...],
        origin: Any,
        weights: Any,
        s: Any,
        offset: Any,
        panel: Panel,
    ) -> Iterator[int]:
        """k-step s, whose 4 channels are at `offset`; yields after each pixel its number."""
        kernel, lanes, nr, size = self.kernel, self.lay.lanes, panel.nr, self.lay.step_bytes
        apart = self.shape.x.stride * self.work.channels  # elements from pixel to pixel
        at = weights + s * (nr * size)
        b = [kernel.b_operands(self.w, at + j * size, lanes, self.params) for j in range(nr)]
        if self.params.prefetch:
            self._prefetch(at, panel)
        for i in pixels:
            a = self._operands(origin + offset + i * apart)
            for j in range(nr):
                where = ramp((i * nr + j) * lanes, lanes)
                T.buffer_store(acc, kernel.multiply_add(acc[where], a, b[j], lanes), [where])
            yield i

    def _prefetch(self, at: Any, panel: Panel) -> None:
        """The same step of the next panel to L2."""
        ahead = self.shape.steps * panel.nr * self.lay.step_bytes
        for line in range(0, panel.nr * self.lay.step_bytes, 64):
            where = T.address_of(self.w[at + (ahead + line)])
            T.evaluate(tirx.call_llvm_intrin("void", _PREFETCH, where, 0, 2, 1))

    def _operands(self, at: Any) -> list[Any]:
        """Multiplier inputs of the 4 elements at `at` of what tiles read."""
        lanes = self.lay.lanes
        if self.kernel.staged:
            pairs = [bits("int32", self.source[ramp(at + k, 2)]) for k in (0, 2)]
            return [T.Bind(bits(f"int16x{2 * lanes}", T.broadcast(p, lanes))) for p in pairs]
        dword = bits("int32", self.source[ramp(at, 4)])
        return self.kernel.a_operands(T.broadcast(dword, lanes), lanes)

    # ---- constants in W ----
    def _filters(self, offset: Any, dtype: str, panel: Panel, j: int) -> Any:
        lanes = self.lay.lanes
        at = offset + (panel.column + j) * (4 * lanes)
        return bits(f"{dtype}x{lanes}", self.w[ramp(at, 4 * lanes)])

    def _start(self, row: Row, x_class: int, panel: Panel, j: int) -> Any:
        offset = self.lay.start
        if self.shape.classed:
            offset = (row.variant + x_class) * self.lay.row + offset
        return self._filters(offset, "int32", panel, j)

    def _constant(self, name: str, dtype: str) -> Any:
        lay = self.lay
        places = {"zero": lay.zero, "least": lay.limits, "greatest": lay.limits + 64}
        places |= {key: lay.residual + 64 * i for i, key in enumerate(RESIDUAL)}
        size = self.lay.lanes * 4
        return bits(dtype, self.w[ramp(places[name], size)])


def _run_all(steps: Iterable[Any]) -> None:
    for _ in steps:
        pass
