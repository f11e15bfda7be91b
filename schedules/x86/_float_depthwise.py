"""Float depthwise convolution: channels across the lanes, several output pixels at a time.

    W: vector 0 of channels: tap 0, tap 1 ...   vector 1 ...   | bias
    for unit = (rows of C, channels):             parallel, where there is work for it
        for row in rows, tile of up to mr pixels in row, vector in channels:
            for kd, kh:                           kw weights and the tile's pixels of A in registers

With channels innermost a pass reads mr pixels of A side by side, each from end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import prod
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Conv
from ._float_conv import FloatConv, Layout, Tile
from ._float_conv_loops import UNITS, Builder, Serial
from ._float_conv_shape import Cell, ceil_div, columns_of, squeezed
from ._ir import T, i64, intrinsic, local, ramp, splat, tirx

_ROW = 12  # kernel columns up to which a row of weights is kept in registers


class FloatDepthwise(FloatConv):
    """A filter of its own for every channel."""

    Params: ClassVar[type] = Tile

    def refuses(self, workload: Conv) -> str | None:
        if not workload.depthwise:
            return "channels share filters"
        return super().refuses(workload)

    def registers(self, params: Tile) -> int:
        """A tile of C, a row of weights, a pixel of A."""
        return params.mr + 3 + 1

    def layout(self, workload: Conv, params: Tile) -> Layout:
        biased = workload.bias != "none"
        return Layout(params.lanes, 1, workload.filters, 1, prod(workload.kernel), biased)

    def default(self, workload: Conv, machine: Machine) -> Tile:
        return Tile(7, 1, machine.lanes)

    def effect(self, workload: Conv, params: Tile) -> Hashable:
        return ceil_div(squeezed(workload).outputs[2], params.mr), params.lanes

    def estimate(self, workload: Conv, params: Tile, machine: Machine) -> float:
        """Loads of weights and pixels against multiply-adds, and tiles of too few pixels."""
        _, _, stride = workload.strides
        tiles = ceil_div(workload.outputs[2], params.mr)
        mr, taps = workload.outputs[2] / tiles, workload.kernel[2]
        loads = taps + (mr - 1) * stride + taps
        steps = max(mr * taps, loads, 4.0) / mr
        wide = params.lanes / 8
        return steps * wide * ceil_div(workload.channels, params.lanes)

    def build(self, workload: Conv, params: Tile, machine: Machine) -> Any:
        return Depthwise(self.name, workload, params, self.layout(workload, params)).function()


class Depthwise(Builder):
    """The loops over rows, tiles and channels."""

    gops = 50.0

    def _lines(self, batch: Any, pixels: Any) -> None:
        work, lay = self.work, self.lay
        depth, height, width = work.outputs
        cells = columns_of(work, self.params.mr)
        lines = batch * (depth * height)
        parts, chunk = 1, lines
        parallel = self._parallel()
        if parallel:
            rows = depth * height * (work.batch or 1)
            parts = min(ceil_div(UNITS, rows), lay.vectors)
            chunk = T.Bind(tirx.max(ceil_div(lines, i64(ceil_div(UNITS, parts))), i64(1)))
        share = ceil_div(lay.vectors, parts)
        parts = ceil_div(lay.vectors, share)

        def unit(u: Any) -> None:
            first = T.Bind(u // parts * chunk)
            vector = T.Bind(u % parts * share) if parts > 1 else i64(0)
            with T.serial(i64(0), T.Bind(tirx.min(chunk, lines - first))) as i:
                line = T.Bind(first + i)
                rest, oh = self._split(line, height)
                n, od = self._split(rest, depth)
                for cell in cells:
                    with Serial(cell.count) as x:
                        ox = T.Bind(x * cell.step + cell.first)
                        pixel, at = T.Bind(line * width + ox), self._at(n, od, oh, ox)
                        self._vectors(cell, pixel, at, od, oh, vector, share)

        if parallel:
            with T.parallel(i64(0), T.Bind(ceil_div(lines, chunk) * parts)) as u:
                unit(u)
        else:
            unit(i64(0))

    def _vectors(
        self, cell: Cell, pixel: Any, at: Any, od: Any, oh: Any, first: Any, share: int
    ) -> None:
        """A tile for `share` vectors of channels from `first` on, as far as there are any."""
        lay = self.lay
        whole = lay.filters // lay.lanes
        if whole:
            count = i64(whole)
            if share < lay.vectors:
                count = T.Bind(tirx.min(i64(share), whole - first))
            with T.serial(i64(0), count) as v:
                self._tile_of(cell, pixel, at, od, oh, T.Bind(first + v), lay.lanes)
        if whole < lay.vectors:
            tail = lay.filters - whole * lay.lanes
            if share < lay.vectors:
                with T.If(first + share > whole), T.Then():
                    self._tile_of(cell, pixel, at, od, oh, i64(whole), tail)
            else:
                self._tile_of(cell, pixel, at, od, oh, i64(whole), tail)

    def _tile_of(
        self, cell: Cell, pixel: Any, at: Any, od: Any, oh: Any, vector: Any, channels: int
    ) -> None:
        lay, lanes, work = self.lay, self.lay.lanes, self.work
        mr = cell.columns
        acc = local(mr * lanes, "float32")
        where = [ramp(i * lanes, lanes) for i in range(mr)]
        weights = T.Bind(vector * (lay.k * lay.step))
        column = T.Bind(vector * lanes)
        bias = splat(0.0, "float32", lanes)
        if lay.biased:
            bias = T.Bind(self._floats(lay.bias + vector * lay.step))
        for place in where:
            T.buffer_store(acc, bias, [place])
        start = T.Bind(at + column)

        def row(a: Any, k: Any) -> None:
            """Adds the taps of a row of the kernel."""
            taps = [(run.kx + t, run.pixels) for run in cell.taps[0].runs for t in range(run.count)]
            b: dict[int, Any] = {}

            def weight(kx: int) -> Any:
                return T.Bind(self._floats(weights + (k + kx) * lay.step))

            def pixels(x: int) -> Any:
                return T.Bind(self._load(self.a, a + x * work.channels, channels))

            def add(i: int, x: Any, y: Any) -> None:
                z = intrinsic(self.vector, "llvm.fma", x, y, acc[where[i]])
                T.buffer_store(acc, z, [where[i]])

            if work.kernel[2] > _ROW:
                for kx, found in taps:
                    y = weight(kx)
                    for i in found:
                        add(i, pixels(i * work.strides[2] + kx * work.dilations[2]), y)
                return
            uses: dict[int, list[tuple[int, int]]] = {}
            for kx, found in taps:
                b[kx] = weight(kx)
                for i in found:
                    uses.setdefault(i * work.strides[2] + kx * work.dilations[2], []).append(
                        (i, kx)
                    )
            for x in sorted(uses):
                value = pixels(x)
                for i, kx in uses[x]:
                    add(i, value, b[kx])

        self._kernel_rows(start, od, oh, row)
        rows = [[self._sum(acc[w], pixel + i, column, 0, channels)] for i, w in enumerate(where)]
        self.epilogue.store_floats(rows, (pixel, column), channels)

    def _kernel_rows(self, at: Any, od: Any, oh: Any, row: Callable[[Any, Any], None]) -> None:
        """row(index in A, index of the first tap) for every row of the kernel inside of A."""
        work = self.work
        (_, kh_all, kw), (dd, dh, _) = work.kernel, work.dilations
        row_stride = work.size[2] * work.channels
        depth_stride = work.size[1] * row_stride
        with self._range(0, od) as kd, self._range(1, oh) as kh:
            row(
                T.Bind(at + kd * (dd * depth_stride) + kh * (dh * row_stride)),
                T.Bind((kd * kh_all + kh) * kw),
            )


__all__ = ["FloatDepthwise"]
