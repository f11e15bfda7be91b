"""The loops of a float convolution, and its micro-kernel.

for unit = (chunk of lines, group, panel):    parallel, where there is work for it; the order and
                                              the size of chunks are parameters
    for line in chunk:                        a row of C, or a plane, or a block of pixels
        for tile in line:                     up to mr pixels x nr vectors of filters
            for kd, kh, kx, c:                nr loads of W, a broadcast of A for every pixel

With `ahead` every panel fetches its share of what the next chunk reads and writes. Where A, C and R
come from memory that hides most of the way: 1x1 of 4 groups, 75x100 x 272 with residual 44 to 76
Gop/s, 38x50 x 544 75 to 94, 150x200x24 to 248 65 to 97 with 6x4 tiles. Where they fit the caches
it costs up to 3 %, on AVX2 once 16 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING, Any

from ...workload import Conv, Gemm
from ._epilogue import Epilogue
from ._float_conv_shape import Cell, Run, Taps, ceil_div, columns_of, flat, rows_of, squeezed, whole
from ._ir import T, bits, fetch_share, i64, intrinsic, local, prim_func, ramp, splat, tirx

if TYPE_CHECKING:
    from ._float_conv import Layout, Tile

_PARALLEL_US = 20.0  # less is not worth sharing: a launch costs 1 to 3 us
UNITS = 32  # parallel units to aim at, so that a few threads get nearly equal shares
_AHEAD = 8  # blocks of pixels between one computed and one prefetched, of a single panel
_SHARE = 4  # least steps between prefetches: fewer are unrolled, and spill accumulators
# Steps between prefetches that LLVM unrolls to where 6x2 tiles of AVX2 spill: 46 against 111 Gop/s
# at 64 channels; with 16 steps it keeps the loop.
_SPILLING = range(8, 16)
_RESIDENT_BYTES = 512 << 10  # that stay in L2 next to what passes


def touched(work: Conv) -> int:
    """Bytes of A, C and R of an image."""
    outputs = prod(work.outputs) * work.filters * (1 + (work.residual is not None))
    return 4 * (prod(work.size) * work.channels + outputs)


def panels_first(work: Conv, lay: Layout, chunk: int) -> bool:
    """Whether all of A had better pass by each panel, instead of all panels by each chunk of A.

    What does not fit the second-level cache is read again and again: chunks first, where W is
    large, cost 2.6 % of ResNet-50. `chunk` is in bytes.
    """
    batch = work.batch or 1
    a = prod(work.size) * work.channels * 4 * batch
    panels = lay.panels if a > _RESIDENT_BYTES else 1
    chunks = touched(work) * batch / chunk + 1 if lay.nbytes > _RESIDENT_BYTES else 1
    return a * panels + lay.nbytes < a + lay.nbytes * chunks


class Builder:
    """One PrimFunc for a workload and parameters."""

    gops = 110.0  # of one thread

    def __init__(self, name: str, workload: Conv, params: Tile, lay: Layout) -> None:
        self.name, self.lay = name, lay
        self.params: Any = params  # Blocked, but for kernels that go over their channels
        self.workload, self.work = workload, squeezed(workload)
        self.vector = f"float32x{lay.lanes}"

    # ---- function and loops ----
    def function(self) -> Any:
        work, lay = self.workload, self.lay
        with prim_func(self.name) as builder:
            batch = tirx.Var("batch", "int64") if work.batch is None else i64(work.batch)
            outputs = [i64(x) for x in work.outputs]
            size = [i64(x) for x in work.size]
            a = T.arg("a", T.buffer((batch, *size, i64(work.channels)), "float32"))
            self.w = T.arg("w", T.buffer((i64(lay.nbytes),), "uint8"))
            r = None
            if work.residual is not None:
                r = T.arg("r", T.buffer((batch, *outputs, i64(work.filters)), "float32"))
            c = T.arg("c", T.buffer((batch, *outputs, i64(work.filters)), "float32"))
            pixels = batch * prod(work.outputs)
            self.a = self._view(a, (batch * (prod(work.size) * work.channels),))
            self.c = self._view(c, (pixels, i64(work.filters)))
            self.r = None if r is None else self._view(r, (pixels, i64(work.filters)))
            ends = [buffer for buffer in (c, r) if buffer is not None]
            self.ends = [self._view(buffer, (pixels * work.filters,)) for buffer in ends]
            types = {"a": "f32", "b": "f32", "out": "f32"}
            after = {"activation": work.activation, "clip": work.clip}
            end = Gemm(m=None, n=work.filters, k=lay.k, **types, **after)  # type: ignore[arg-type]
            self.epilogue = Epilogue(end, lay.lanes, True, self.c)
            self._lines(batch, pixels)
        return builder.get()

    def _view(self, buffer: Any, shape: tuple[Any, ...]) -> Any:
        return T.decl_buffer(shape, "float32", data=buffer.data)

    def _lines(self, batch: Any, pixels: Any) -> None:
        """Splits C into lines of tiles."""
        work, mr = self.work, self.params.mr
        depth, height, width = work.outputs
        if flat(work):
            image = work.outputs[2]
            total = image if work.batch is None else image * work.batch
            mr = ceil_div(total, ceil_div(total, mr))
            row = work.kernel[2]
            full = Taps(0, 1, (Run(0, row, tuple(range(mr))),))
            cell = Cell(0, 1, 0, 1, mr, (full,))

            def block(line: Any, tile: Callable[..., None]) -> None:
                pixel = line * mr
                if work.batch is None or total % mr:
                    pixel = tirx.min(pixel, pixels - mr)
                pixel = T.Bind(pixel)
                tile(cell, pixel, pixel * (row * work.channels), None, None)

            self._units(ceil_div(pixels, i64(mr)), mr, block)
        elif width <= mr // 2 and height > 1:
            bands = rows_of(work, mr // width)

            def plane(line: Any, tile: Callable[..., None]) -> None:
                n, od = self._split(line, depth)
                for band in bands:
                    with Serial(band.count) as i:
                        oh = T.Bind(i * band.step + band.first)
                        pixel = T.Bind((line * height + oh) * width)
                        tile(band, pixel, self._at(n, od, oh, 0), od, None)

            self._units(batch * depth, height * width, plane)
        else:
            cells = columns_of(work, mr)

            def row(line: Any, tile: Callable[..., None]) -> None:
                rest, oh = self._split(line, height)
                n, od = self._split(rest, depth)
                for cell in cells:
                    with Serial(cell.count) as i:
                        ox = T.Bind(i * cell.step + cell.first)
                        tile(cell, T.Bind(line * width + ox), self._at(n, od, oh, ox), od, oh)

            self._units(batch * (depth * height), width, row)

    @staticmethod
    def _split(line: Any, extent: int) -> tuple[Any, Any]:
        """Quotient and rest."""
        if extent == 1:
            return line, i64(0)
        return T.Bind(line // extent), T.Bind(line % extent)

    def _at(self, n: Any, od: Any, oh: Any, ox: Any) -> Any:
        """Index in A of the first tap of an output pixel; it may lie outside of A."""
        work = self.work
        (sd, sh, sw), pads = work.strides, [p[0] for p in work.pads]
        plane = (n * work.size[0] + (od * sd - pads[0])) * work.size[1]
        row = (plane + (oh * sh - pads[1])) * work.size[2]
        return T.Bind((row + (ox * sw - pads[2])) * work.channels)

    def _units(self, lines: Any, pixels: int, emit: Callable[..., None]) -> None:
        """All lines, of `pixels` each, times all panels."""
        lay, work = self.lay, self.work
        panels = lay.groups * lay.panels
        chunk = lines
        if self.params.chunk:
            line_bytes = touched(work) * pixels // prod(work.outputs)
            chunk = i64(max(1, (self.params.chunk << 10) // line_bytes))
        parallel = self._parallel()
        if parallel:
            share = ceil_div(lines, i64(ceil_div(UNITS, panels)))
            chunk = T.Bind(tirx.max(tirx.min(share, chunk), i64(1)))
        chunks = T.Bind(ceil_div(lines, chunk))

        ahead = chunk if panels > 1 else i64(_AHEAD)

        def unit(index: Any, group: Any, panel: Any, columns: int) -> None:
            first = T.Bind(index * chunk)
            with T.serial(i64(0), T.Bind(tirx.min(chunk, lines - first))) as i:
                line = T.Bind(first + i)
                if self.params.ahead and flat(work):
                    self._fetch_ahead((line + ahead) * pixels, pixels, group * lay.panels + panel)

                def tile(cell: Cell, pixel: Any, at: Any, od: Any, oh: Any) -> None:
                    at = at + group * work.group_channels
                    self._tile(cell, pixel, T.Bind(at), od, oh, group, panel, columns)

                emit(line, tile)

        full = lay.nr * lay.lanes
        rest = lay.filters - lay.whole * full
        if parallel:
            with T.parallel(i64(0), T.Bind(chunks * panels)) as u:
                if not self.params.chunk:
                    index, place = T.Bind(u % chunks), T.Bind(u // chunks)
                else:
                    index, place = T.Bind(u // panels), T.Bind(u % panels)
                group, panel = self._split(place, lay.panels)
                if not rest or not lay.whole:
                    unit(index, group, panel, rest or full)
                else:
                    with T.If(panel < lay.whole):
                        with T.Then():
                            unit(index, group, panel, full)
                        with T.Else():
                            unit(index, group, i64(lay.whole), rest)
        else:
            with T.serial(i64(0), chunks) as index, T.serial(i64(0), i64(lay.groups)) as group:
                if lay.whole:
                    with T.serial(i64(0), i64(lay.whole)) as panel:
                        unit(index, group, panel, full)
                if rest:
                    unit(index, group, i64(lay.whole), rest)

    def _fetch_ahead(self, pixel: Any, pixels: int, panel: Any) -> None:
        """Into L2, for one of all panels, its share of `pixels` pixels from `pixel` on."""
        work, panels = self.work, self.lay.groups * self.lay.panels
        fetch_share(self.a, pixel, (pixels, work.kernel[2] * work.channels), panel, panels)
        for flat_view in self.ends:
            fetch_share(flat_view, pixel, (pixels, work.filters), panel, panels)

    def _parallel(self) -> bool:
        return self.work.batch is None or self.work.ops / (self.gops * 1e3) >= _PARALLEL_US

    # ---- micro-kernel ----
    def _tile(
        self,
        cell: Cell,
        pixel: Any,
        at: Any,
        od: Any,
        oh: Any,
        group: Any,
        panel: Any,
        columns: int,
    ) -> None:
        """The pixels of a cell from `pixel` on, times a panel; A's first tap is at index `at`."""
        lay, lanes, work = self.lay, self.lay.lanes, self.work
        nr, mr = ceil_div(columns, lanes), cell.rows * cell.columns
        offsets = [
            (r * work.strides[1] * work.size[2] + x * work.strides[2]) * work.channels
            for r in range(cell.rows)
            for x in range(cell.columns)
        ]
        acc = local(mr * nr * lanes, "float32")
        where = [[ramp((i * nr + j) * lanes, lanes) for j in range(nr)] for i in range(mr)]
        weights = T.Bind(group * lay.group + panel * (lay.nr * lay.k * lay.step))
        first = T.Bind(group * lay.filters + panel * (lay.nr * lanes))  # column of C
        bias = [
            T.Bind(self._floats(lay.bias + (group * lay.vectors + panel * lay.nr + j) * lay.step))
            if lay.biased
            else splat(0.0, "float32", lanes)
            for j in range(nr)
        ]
        for row in where:
            for j in range(nr):
                T.buffer_store(acc, bias[j], [row[j]])

        def step(a: Any, k: Any, pixels: Iterable[int]) -> None:
            b = [T.Bind(self._floats(weights + (k * nr + j) * lay.step)) for j in range(nr)]
            for i in pixels:
                x = T.Bind(T.broadcast(self.a[a + offsets[i]], lanes))
                for j in range(nr):
                    y = intrinsic(self.vector, "llvm.fma", x, b[j], acc[where[i][j]])
                    T.buffer_store(acc, y, [where[i][j]])

        def fetch(i: Any) -> None:
            for j in range(0, nr * lanes, 16):
                if self.r is not None:
                    self._prefetch(self.r[pixel + i, first + j], 0)
                self._prefetch(self.c[pixel + i, first + j], 1)

        self._taps(cell, at, od, oh, step, fetch)
        rows = [
            [self._sum(acc[w], pixel + i, first, j, columns) for j, w in enumerate(row)]
            for i, row in enumerate(where)
        ]
        self.epilogue.store_floats(rows, (pixel, first), columns)

    def _taps(
        self,
        cell: Cell,
        at: Any,
        od: Any,
        oh: Any,
        step: Callable[..., None],
        fetch: Callable[..., None],
    ) -> None:
        """step(index in A without the pixel's offset, index in W, pixels) for every tap.

        Of a kernel of one tap, whose sums are short, fetch(i) for every pixel of C is spread
        among the steps: all at once they would delay the loads of A and W. 56x56, 64 to 256
        channels with a residual: 85 % of the peak without, 88 with all at once, 95 with these.
        """
        rows = parts = cell.rows * cell.columns
        if prod(self.work.kernel) > 1 or self.lay.k < _SHARE * rows:
            if self.r is not None:
                for i in range(rows):
                    fetch(i)
            parts = 1
        while parts > 1 and self.lay.k // parts in _SPILLING:
            parts = ceil_div(parts, 2)
        each = ceil_div(rows, parts)

        def fetch_some(part: Any) -> None:
            for i in range(each):
                fetch(part * each + i)

        work = self.work
        (_, kh_all, kw), (dd, dh, dw) = work.kernel, work.dilations
        depth_stride, row_stride, channels = (
            work.size[1] * work.size[2] * work.channels,
            work.size[2] * work.channels,
            work.group_channels,
        )

        def runs(kd: Any, kh: Any, runs: tuple[Run, ...]) -> None:
            a0 = T.Bind(at + kd * (dd * depth_stride) + kh * (dh * row_stride))
            k0 = T.Bind((kd * kh_all + kh) * (kw * channels))
            for run in runs:
                dense = run.count == 1 or (dw == 1 and work.groups == 1)
                with Serial(1 if dense else run.count) as extra:
                    kx = run.kx + extra
                    a, k = T.Bind(a0 + kx * (dw * work.channels)), T.Bind(k0 + kx * channels)
                    steps = run.count * channels if dense else channels
                    self._steps(
                        a,
                        k,
                        steps,
                        lambda a, k, run=run: step(a, k, run.pixels),
                        parts,
                        fetch_some,
                    )

        with self._range(0, od) as kd:
            for taps in cell.taps:
                if taps.count is None:
                    with self._range(1, oh) as kh:
                        runs(kd, kh, taps.runs)
                else:
                    with Serial(taps.count) as extra:
                        runs(kd, T.Bind(extra + taps.kh), taps.runs)

    @staticmethod
    def _steps(
        a: Any,
        k: Any,
        steps: int,
        step: Callable[..., None],
        parts: int,
        fetch: Callable[..., None],
    ) -> None:
        """step(a + c, k + c) for c in range(steps), and fetch(part) between parts of these."""
        if parts > 1:
            share = steps // parts
            with T.serial(i64(0), i64(parts)) as part:
                fetch(part)
                done = T.Bind(part * share)
                with Serial(share) as c:
                    step(a + done + c, k + done + c)
            a, k, steps = a + share * parts, k + share * parts, steps % parts
        if steps:
            with Serial(steps) as c:
                step(a + c, k + c)

    def _range(self, dim: int, at: Any) -> Any:
        """A loop over the taps of dim `dim` that output position `at` has inside of A."""
        work = self.work
        taps, dilation = work.kernel[dim], work.dilations[dim]
        if whole(work, dim):
            return Serial(taps)
        start = T.Bind(work.pads[dim][0] - at * work.strides[dim])
        low = T.Bind(tirx.max(i64(0), (start + (dilation - 1)) // dilation))
        high = tirx.min(i64(taps), (start + (work.size[dim] - 1 + dilation)) // dilation)
        return _shifted(low, T.Bind(tirx.max(high - low, i64(0))))

    def _sum(self, value: Any, pixel: Any, first: Any, j: int, columns: int) -> Any:
        """An accumulator plus the residual."""
        if self.r is None:
            return value
        lanes = self.lay.lanes
        return value + self._load(self.r, (pixel, first + j * lanes), columns - j * lanes)

    def _load(self, buffer: Any, index: Any, count: int) -> Any:
        """A vector of a buffer from an index on, of which `count` elements are there."""
        lanes = self.lay.lanes
        where = index if isinstance(index, tuple) else (index,)
        if count >= lanes:
            vector = (*where[:-1], ramp(where[-1], lanes))
            return buffer[vector]
        return tirx.call_llvm_intrin(
            self.vector,
            "llvm.masked.load",
            T.address_of(buffer[where]),
            tirx.LT(ramp(tirx.const(0, "int32"), lanes), splat(count, "int32", lanes)),
            splat(0.0, "float32", lanes),
        )

    @staticmethod
    def _prefetch(element: Any, write: int) -> None:
        address = T.address_of(element)
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, write, 3, 1))

    def _floats(self, offset: Any) -> Any:
        return bits(self.vector, self.w[ramp(offset, self.lay.step)])


class Serial:
    """T.serial(0, count) in int64; no loop at all for a count of 1."""

    def __init__(self, count: int) -> None:
        self.loop = None if count == 1 else T.serial(i64(0), i64(count))

    def __enter__(self) -> Any:
        return i64(0) if self.loop is None else self.loop.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.loop is not None:
            self.loop.__exit__(*error)


class _shifted:
    """low .. low + count - 1, as a loop from 0: TVM gets loops wrong that start elsewhere."""

    def __init__(self, low: Any, count: Any) -> None:
        self.low, self.loop = low, T.serial(i64(0), count)

    def __enter__(self) -> Any:
        return T.Bind(self.low + self.loop.__enter__())

    def __exit__(self, *error: Any) -> None:
        self.loop.__exit__(*error)
