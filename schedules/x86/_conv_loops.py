"""The loops around the tiles of an integer convolution, shared among threads.

    for unit = (image, chunk of rows, group, panel):      parallel, where there is work for it
        for row in chunk:  for tile in row:
            for kd, ky that the row has:  for runs of kx, c that the tile has:  multiply and add
            scale, round, pack, store

Weights are outside: a panel stays in the first caches while all pixels of the chunk pass. Where A
has to be copied first (see Shape.copied), or widened, that is done image by image; or, with its
padding, in strips of a few rows that stay in the first cache while all panels pass:

    for strip = (image, z, rows):  copy;  for group, panel:  for row in strip:  for tile in row: ...
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from ...workload import NUMPY, Conv
from ._conv_shape import Axis, Band, Shape, ceil_div, touched
from ._conv_tile import Panel, Row, Tiles
from ._ir import T, bits, fetch_share, local, prim_func, ramp, tirx

if TYPE_CHECKING:
    from ._conv_int import IntegerConv

_PARALLEL_US = 10.0  # less is not worth sharing: a launch costs 1 to 3 us
_UNITS = 32  # parallel units to aim at, so that a few threads get nearly equal shares
_STACK = 64 << 10  # bytes of a copy on the stack
_AHEAD = 8  # tiles between one computed and one prefetched, of a single panel


class Builder:
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: IntegerConv, workload: Conv, params: Any) -> None:
        self.kernel, self.work, self.params = kernel, workload, params
        self.shape, self.lay = Shape(workload), kernel.layout(workload, params)
        self.bands = self.shape.bands(params.mr)
        self.rows = sum(band.rows for band in self.bands)
        self.copies = self.shape.copied or kernel.staged
        # elements of an image: of A, of what tiles read, of C
        axes = self.shape.z, self.shape.y, self.shape.x
        self.image = prod(workload.size) * workload.channels
        if self.shape.flat:
            self.image *= workload.batch or 1
        self.stored = prod(axis.size for axis in axes) * workload.channels
        largest = max(self.image, self.stored, self.shape.pixels * workload.filters)
        small = workload.batch is not None and workload.batch * largest < 2**31
        self.index = "int32" if small else "int64"

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    # ---- function ----
    def function(self) -> Any:
        work, shape = self.work, self.shape
        with prim_func(self.kernel.name) as builder:
            batch = tirx.Var("batch", "int64") if work.batch is None else self.const(work.batch)
            ends = [self.const(v) for v in (*work.outputs, work.filters)]
            sizes = [self.const(v) for v in (*work.size, work.channels)]
            a = T.arg("a", T.buffer((batch, *sizes), "uint8"))
            self.w = T.arg("w", T.buffer((self.lay.nbytes,), "uint8"))
            r = None
            if work.residual:
                r = T.arg("r", T.buffer((batch, *ends), NUMPY[work.residual.dtype]))
            c = T.arg("c", T.buffer((batch, *ends), NUMPY[work.out]))
            # A as bytes, R and C as (pixels, filters)
            self.a = T.decl_buffer((batch * prod(map(int, sizes)),), "uint8", data=a.data)
            ends = [buffer for buffer in (c, r) if buffer is not None]
            total = batch * prod(map(int, ends[0].shape[1:]))
            self.ends = [T.decl_buffer((total,), b.dtype, data=b.data) for b in ends]
            rows = batch * prod(work.outputs), self.const(work.filters)
            r, c = (
                None if buffer is None else T.decl_buffer(rows, buffer.dtype, data=buffer.data)
                for buffer in (r, c)
            )
            self.tiles = Tiles(self.kernel, work, self.params, self.a, self.w, r, c, self.index)
            images = batch if shape.images is None else self.const(shape.images)
            if shape.copied and not shape.flat:
                self._strips(images)
            elif not self.copies:
                self._units(images, self.const(0))
            else:
                self.tiles.source = self._copy("global")
                if shape.images == 1:
                    self._copied(self.const(0))
                else:
                    with T.serial(self.const(0), images) as n:
                        self._copied(n)
        return builder.get()

    # ---- copies ----
    def _copy(self, scope: str) -> Any:
        """A buffer for what tiles read."""
        # k-steps may read 3 elements past the last one, fills may write 63
        total = ceil_div(self.stored + 64, 64) * 64
        dtype = "int16" if self.kernel.staged else "uint8"
        if scope == "local":
            return local(total, dtype)
        return T.alloc_buffer((self.const(total),), dtype, scope=scope)

    def _copied(self, n: Any) -> None:
        """Image n is copied or widened, then convolved."""
        self._move(n * self.image, self.const(0), self.image)
        self._units(self.const(1), n)

    def _strips(self, images: Any) -> None:
        """Strip after strip is copied with its padding, then convolved."""
        work, rows = self.work, self.shape.y.outputs
        depth, height, width = work.outputs
        strips = ceil_div(height, rows)
        panels = self.lay.panels * work.groups
        small = self.stored + 64 <= _STACK // (2 if self.kernel.staged else 1)
        parallel = work.ops / (self.kernel.gops * 1e3) >= _PARALLEL_US
        loop = T.parallel if parallel else T.serial
        with loop(self.const(0), images * (depth * strips)) as u:
            first = T.Bind(u % strips * rows)
            plane = T.Bind(u // strips)
            self.tiles.source = self._copy("local" if small else "global")
            self._pad(T.Bind(plane // depth), T.Bind(plane % depth), first)
            count = T.Bind(tirx.min(height - first, self.const(rows)))
            self.pixel = T.Bind((plane * height + first) * width)
            with T.serial(self.const(0), self.const(panels)) as panel:
                self._panel(panel, lambda p: self._rows(self.const(0), self.const(0), count, p))

    def _pad(self, n: Any, z: Any, y: Any) -> None:
        """Copies what the strip of image n from output z, y on reads."""
        work, shape = self.work, self.shape
        channels, (depth, height, width) = work.channels, work.size
        (front, _), (top, _), (left, _) = work.pads
        line, wide = width * channels, shape.x.size * channels
        lanes = 32 if self.kernel.staged else 64
        source = self.tiles.source
        value = bits(f"{source.dtype}x{lanes}", self.w[ramp(self.lay.fill, 64)])
        right = wide - line - left * channels
        first_z = T.Bind(z * work.strides[0] - front)
        first_y = T.Bind(y * work.strides[1] - top)

        def fill(to: Any, count: int) -> None:
            """`count` elements, and up to lanes - 1 more."""
            with T.serial(self.const(0), self.const(ceil_div(count, lanes))) as i:
                T.buffer_store(source, value, [ramp(to + i * lanes, lanes)])

        # Every fill may reach into the row that follows: that is written afterwards.
        planes, lines = self.const(shape.z.size), self.const(shape.y.size)
        with T.serial(self.const(0), planes) as k, T.serial(self.const(0), lines) as i:
            to = T.Bind((k * shape.y.size + i) * wide)
            from_z, from_y = T.Bind(first_z + k), T.Bind(first_y + i)
            inside = [from_z >= 0, from_z < depth, from_y >= 0, from_y < height]
            with T.If(tirx.all(*inside)):
                with T.Then():
                    if left:
                        fill(to, left * channels)
                    row = (n * depth + from_z) * height + from_y
                    self._move(T.Bind(row * line), T.Bind(to + left * channels), line)
                    if right:
                        fill(to + (left * channels + line), right)
                with T.Else():
                    fill(to, wide)

    def _move(self, origin: Any, to: Any, count: int) -> None:
        """Copies `count` elements of A, widening them if the kernel is staged."""
        source = self.tiles.source
        dtype = source.dtype
        widest = self.kernel.bits // (16 if self.kernel.staged else 8)
        size = next((s for s in (widest, 32, 16, 8, 4) if s <= min(count, widest)), 1)

        def move(at: Any) -> None:
            if size == 1:
                value = tirx.Cast(dtype, self.a[origin + at])
                T.buffer_store(source, value, [to + at])
                return
            value = self.a[ramp(origin + at, size)]
            wide = tirx.Cast(f"{dtype}x{size}", value) if self.kernel.staged else value
            T.buffer_store(source, wide, [ramp(to + at, size)])

        with T.serial(self.const(0), self.const(count // size)) as i:
            move(i * size)
        if count % size:  # overlaps the one before
            move(self.const(count - size))

    # ---- units ----
    def _units(self, images: Any, first_image: Any) -> None:
        """All rows of `images` images from number `first_image` on."""
        work, lay = self.work, self.lay
        panels = lay.panels * work.groups
        self.panels = panels
        known = int(images) if isinstance(images, tirx.IntImm) else None
        us = work.ops / (self.kernel.gops * 1e3)  # of all images, or of one if their number is open
        chunks = 1
        if self.params.chunk:
            chunks = ceil_div(touched(work), max(self.params.chunk << 10, 2 * lay.start))
        parallel = us >= _PARALLEL_US
        if parallel:
            chunks = max(chunks, ceil_div(_UNITS, panels * (known or 1)))
        share = ceil_div(self.rows, min(chunks, self.rows))
        chunks = ceil_div(self.rows, share)

        self.ahead = share if panels > 1 else _AHEAD

        def unit(u: Any) -> None:
            if self.params.chunk:
                part, panel = u // panels, T.Bind(u % panels)
            else:
                part, panel = T.Bind(u % parts), T.Bind(u // parts)
            n = first_image if known == 1 else T.Bind(first_image + part // chunks)
            first, last = self.const(0), self.const(self.rows)
            if chunks > 1:
                first = T.Bind(part % chunks * share)
                last = T.Bind(tirx.min(first + share, last))
            self.number = panel
            self._panel(panel, lambda p: self._rows(n, first, last, p))

        parts = images * chunks

        def everything(loop: Callable[[Any, Any], Any]) -> None:
            with loop(self.const(0), images * (chunks * panels)) as u:
                unit(u)

        if parallel or known is not None or self.copies:
            everything(T.parallel if parallel else T.serial)
            return
        with T.If(images < ceil_div(int(_PARALLEL_US * 1e3), max(1, int(us * 1e3)))):
            with T.Then():
                everything(T.serial)
            with T.Else():
                everything(T.parallel)

    def _panel(self, panel: Any, run: Callable[[Panel], None]) -> None:
        """run(what is known of) panel number `panel`, counted over all groups."""
        lay, work = self.lay, self.work
        count = work.filters // work.groups
        step = lay.nr * self.shape.steps * lay.step_bytes
        group = self.const(0) if work.groups == 1 else T.Bind(panel // lay.panels)
        own = panel if work.groups == 1 else T.Bind(panel % lay.panels)

        def go(own: Any, nr: int, valid: int, tail: int) -> None:
            column = own * lay.nr
            run(
                Panel(
                    T.Bind(group * lay.group_bytes + own * step),
                    T.Bind(group * lay.vectors + column),
                    group * work.group_channels,
                    T.Bind(group * count + column * lay.lanes),
                    nr,
                    valid,
                    tail,
                    (nr - 1) * lay.step_bytes + lay.step_bytes * tail // lay.lanes,
                )
            )

        whole = count // (lay.lanes * lay.nr)  # panels of whole vectors
        rest = lay.vectors - whole * lay.nr, count - whole * lay.nr * lay.lanes, lay.tail
        if whole == lay.panels:
            go(own, lay.nr, lay.nr * lay.lanes, lay.lanes)
        elif whole == 0:
            go(self.const(0), *rest)
        else:
            with T.If(own < whole):
                with T.Then():
                    go(own, lay.nr, lay.nr * lay.lanes, lay.lanes)
                with T.Else():
                    go(self.const(whole), *rest)

    # ---- rows ----
    def _rows(self, n: Any, first: Any, last: Any, panel: Panel) -> None:
        """Rows first .. last - 1 of image n."""
        for band in self.bands:
            low, count = first, last - first
            if len(self.bands) > 1:
                low = T.Bind(tirx.max(first, self.const(band.first)))
                end = tirx.min(last, self.const(band.first + band.rows))
                count = T.Bind(tirx.max(end - low, self.const(0)))
            self._band(n, band, low, count, panel)

    def _band(self, n: Any, band: Band, low: Any, count: Any, panel: Panel) -> None:
        """Rows low .. low + count - 1, all of one band."""

        def row_of(i: Any) -> Row:
            row = self._row(n, band, T.Bind(low + i), panel)
            if self.params.ahead and self.shape.flat:
                self._fetch_ahead(row.pixel + self.ahead * band.width, band.width)
            return row

        if self.tiles.defers(band.segments[0].tile):
            self.tiles.chain(row_of, count, band.segments[0].tile, panel)
            return
        with T.serial(self.const(0), count) as i:
            row = row_of(i)
            for segment in band.segments:
                if segment.count == 1:
                    self.tiles.tile(row, self.const(segment.x), segment.tile, panel)
                    continue
                with T.serial(self.const(0), self.const(segment.count)) as k:
                    x = T.Bind(k * segment.tile.mr + segment.x)
                    self.tiles.tile(row, x, segment.tile, panel)

    def _fetch_ahead(self, pixel: Any, pixels: int) -> None:
        """Into L2, for the panel at hand, its share of `pixels` pixels from `pixel` on."""
        work, place = self.work, (self.number, self.panels)
        if not self.copies:
            width = self.shape.x.stride * work.channels
            fetch_share(self.a, pixel, (pixels, width), *place)
        for flat in self.ends:
            fetch_share(flat, pixel, (pixels, work.filters), *place)

    def _row(self, n: Any, band: Band, at: Any, panel: Panel) -> Row:
        shape, channels = self.shape, self.work.channels
        source_n = self.const(0) if self.copies else n  # a copy is of one image at a time
        if shape.flat:
            pixel = T.Bind((at - band.first) * band.width + band.pixel)
            everything = self.const(0), 1
            first = (source_n * shape.pixels + pixel) * (shape.x.stride * channels)
            source, base = T.Bind(first + panel.channel), T.Bind(n * shape.pixels + pixel)
            return Row(base, source, everything, everything, self.const(0))
        z, y = self.const(0), at
        if shape.z.outputs > 1:
            z, y = T.Bind(at // shape.y.outputs), T.Bind(at % shape.y.outputs)
        plane = (source_n * shape.z.size + z * shape.z.stride - shape.z.before) * shape.y.size
        line = (plane + y * shape.y.stride - shape.y.before) * shape.x.size - shape.x.before
        source = T.Bind(line * channels + panel.channel)
        if shape.copied:
            pixel = T.Bind(self.pixel + at * shape.x.outputs)
        else:
            pixel = T.Bind((n * (shape.z.outputs * shape.y.outputs) + at) * shape.x.outputs)
        z_taps, z_variant = self._taps(shape.z, self.lay.z_taps, z)
        y_taps, y_variant = self._taps(shape.y, self.lay.y_taps, y)
        return Row(pixel, source, z_taps, y_taps, T.Bind(z_variant + y_variant))

    def _taps(self, axis: Axis, table: int, at: Any) -> tuple[tuple[Any, Any], Any]:
        """Interval of taps of output `at`, and its part of the number of the variant."""
        if axis.whole:
            return (self.const(0), self.const(axis.kernel)), self.const(0)

        def entry(k: int) -> Any:
            value = bits("int32", self.w[ramp(at * 12 + (table + 4 * k), 4)])
            return T.Bind(tirx.Cast(self.index, value))

        return (entry(0), entry(1)), entry(2) if self.shape.classed else self.const(0)
