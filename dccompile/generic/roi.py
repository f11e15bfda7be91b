"""RoiAlign of channels-last maps: every bin of every box is the mean, or the largest, of samples
interpolated between four pixels.

    for box, bin row       (in parallel)
      for bin in the row
        for 64 channels    4 registers of sums, kept over
          for samples      two rows x two columns of pixels, 64 channels of each, weighted

Coordinates are computed as ONNX Runtime computes them, product by product in float32, because
the number of samples and what lies outside the map jump where they are rounded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .counted import attributes, i64, size, wide
from .elementwise import rounded
from .lanes import local, name

_BLOCK = 64  # channels whose sums stay in registers
MOST_SAMPLES = 1 << 20  # most samples of one bin that a call may ask for


@dataclass(frozen=True)
class Align:
    """The attributes of a RoiAlign; `samples` 0: as many as a bin has pixels."""

    height: int
    width: int
    samples: int
    scale: float
    half_pixel: bool
    largest: bool


def roi_align(shape: list[Any], boxes: Any, dtype: str, align: Align, where: str) -> Any:
    """PrimFunc(x, rois (boxes, 4), batch int64 (boxes,), y (boxes, height, width, channels)).

    x is (batches, rows, columns, channels) of `dtype`, float32 or float64, as rois and y are;
    channels is a number. Raises DC2110 where a batch index is outside x, DC2114 where a box asks
    for more than 2**20 samples in one bin.
    """
    batches, rows, columns, channels = shape
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("roi_align")
        x = T.arg("x", T.buffer(shape, dtype))
        rois = T.arg("rois", T.buffer([boxes, 4], dtype))
        index = T.arg("batch", T.buffer([boxes], "int64"))
        y = T.arg("y", T.buffer([boxes, align.height, align.width, channels], dtype))
        with T.sblock("root"):
            pixels = T.decl_buffer((size(shape),), dtype, data=tirx.buffer_data(x))
            total = size([boxes, align.height, align.width, channels])
            out = T.decl_buffer((total,), dtype, data=tirx.buffer_data(y))
            kit = Kit(dtype, align, wide(rows), wide(columns), int(channels), pixels)
            with T.serial(i64(0), wide(boxes)) as n:
                batch = name(index[n])
                fine = tirx.And(batch >= 0, batch < wide(batches))
                _check(fine, f"DC2110: {where}: a batch index is outside its first input")
                for first in (0, 1):
                    sides = (rois[n, first], rois[n, first + 2])
                    count = (align.width, align.height)[first]
                    kit.check(kit.span(*sides, count), where)
            with T.parallel(i64(0), wide(boxes) * align.height) as unit:
                n, bin_row = name(unit // align.height), name(unit % align.height)
                base = name(index[n] * wide(rows) * wide(columns))
                across = kit.span(rois[n, 0], rois[n, 2], align.width)
                down = kit.span(rois[n, 1], rois[n, 3], align.height)
                with T.serial(i64(0), i64(align.width)) as bin_column:
                    at = name((unit * align.width + bin_column) * int(channels))
                    kit.bin(base, down, bin_row, across, bin_column, out, at)
    return builder.get()


def _check(condition: Any, message: str) -> None:
    T.add_to_parent(tirx.AssertStmt(condition, StringImm("ValueError"), [StringImm(message)]))


def _slot(dtype: str, value: Any) -> Any:
    """A value in a register: of a name, TVM's analyzer would take a cast's range for ints."""
    buffer = local(1, dtype)
    T.buffer_store(buffer, value, [0])
    return buffer[0]


@dataclass(frozen=True)
class Span:
    """A box along one axis: its start, the size of a bin, and samples per bin."""

    start: Any
    size: Any
    samples: Any


@dataclass(frozen=True)
class _Between:
    """Two neighbouring places and the weights of their values."""

    low: Any
    high: Any
    near: Any
    far: Any


class Kit:
    def __init__(
        self, dtype: str, align: Align, rows: Any, columns: Any, channels: int, pixels: Any
    ) -> None:
        self.dtype, self.align = dtype, align
        self.rows, self.columns, self.channels, self.pixels = rows, columns, channels, pixels

    def number(self, value: float) -> Any:
        return tirx.const(value, self.dtype)

    def times(self, a: Any, b: Any) -> Any:
        """A product that is rounded before anything is added to it."""
        return _slot(self.dtype, rounded(a * b))

    def real(self, value: Any) -> Any:
        """An integer as a number of the map's type."""
        return _slot(self.dtype, tirx.Cast(self.dtype, value))

    def span(self, first: Any, last: Any, bins: int) -> Span:
        align = self.align
        scale = self.number(align.scale)
        offset = self.number(0.5 if align.half_pixel else 0.0)
        start, end = (name(self.times(v, scale) - offset) for v in (first, last))
        length = name(end - start)
        if not align.half_pixel:
            length = name(tirx.Select(length < self.number(1), self.number(1), length))
        step = name(length / self.number(bins))
        if align.samples:
            return Span(start, step, i64(align.samples))
        wanted = name(tirx.ceil(step))
        most = self.number(float(MOST_SAMPLES + 1))
        bounded = tirx.Select(wanted < most, wanted, most)
        some = tirx.Select(wanted > self.number(0), bounded, self.number(0))  # NaN: none
        return Span(start, step, name(tirx.Cast("int64", some)))

    def check(self, span: Span, where: str) -> None:
        if not self.align.samples:
            most = math.isqrt(MOST_SAMPLES)
            text = f"DC2114: {where}: a box asks for more than {most} samples along a bin"
            _check(span.samples <= most, text)

    def place(self, span: Span, bin_: Any, sample: Any, extent: Any) -> tuple[Any, _Between]:
        """Whether a sample lies in the map, and between which pixels."""
        middle = self.real(sample) + self.number(0.5)
        inside = name(middle * span.size / self.real(span.samples))
        begin = span.start + self.times(self.real(bin_), span.size)
        at = name(begin + inside)
        last = self.real(extent)
        valid = name(tirx.And(at >= self.number(-1), at <= last))
        positive = tirx.And(valid, at > self.number(0))
        spot = name(tirx.Select(positive, at, self.number(0)))
        floor = name(tirx.Cast("int64", spot))
        edge = name(floor >= extent - 1)
        low = name(tirx.Select(edge, extent - 1, floor))
        high = name(tirx.Select(edge, extent - 1, floor + 1))
        far = name(tirx.Select(edge, self.number(0), spot - self.real(floor)))
        return valid, _Between(low, high, name(self.number(1) - far), far)

    def bin(
        self, base: Any, down: Span, row: Any, across: Span, column: Any, out: Any, at: Any
    ) -> None:
        """All channels of one bin."""
        done = 0
        whole = self.channels // _BLOCK
        if whole:
            with T.serial(i64(0), i64(whole)) as block:
                start = block * _BLOCK
                self.block(base + 0, down, row, across, column, out, at, start, [16] * 4)
            done = whole * _BLOCK
        left = self.channels - done
        widths = [16] * (left // 16) + ([left % 16] if left % 16 else [])
        if widths:
            self.block(base, down, row, across, column, out, at, i64(done), widths)

    def block(
        self, base: Any, down: Span, row: Any, across: Span, column: Any, out: Any, at: Any,
        start: Any, widths: list[int],
    ) -> None:  # fmt: skip
        """Registers of `widths` channels from `start` on."""
        total = sum(widths)
        offsets = [sum(widths[:i]) for i in range(len(widths))]
        sums = local(total, self.dtype)

        def each(body: Callable[[Any, int], None]) -> None:
            for offset, n in zip(offsets, widths, strict=True):
                body(offset, n)

        def ramp(offset: Any, n: int) -> Any:
            return T.ramp(offset, 1, n) if n > 1 else offset

        def spread(value: Any, n: int) -> Any:
            return tirx.Broadcast(value, n) if n > 1 else value

        def clear(offset: int, n: int) -> None:
            T.buffer_store(sums, spread(self.number(0), n), [ramp(offset, n)])

        each(clear)
        with T.serial(i64(0), down.samples) as sample_row:
            valid_row, v = self.place(down, row, sample_row, self.rows)
            with T.serial(i64(0), across.samples) as sample_column:
                valid_column, h = self.place(across, column, sample_column, self.columns)
                valid = name(tirx.And(valid_row, valid_column))
                first = tirx.EQ(sample_row + sample_column, i64(0))
                corners = []
                for line, p in ((v.low, v.near), (v.high, v.far)):
                    for pixel, q in ((h.low, h.near), (h.high, h.far)):
                        # a sample outside reads the first pixel with weight 0
                        here = tirx.Select(valid, line * self.columns + pixel, i64(0))
                        weight = tirx.Select(valid, p * q, self.number(0))
                        spot = name((base + here) * self.channels + start)
                        corners.append((spot, name(weight)))

                def add(offset: int, n: int) -> None:
                    parts = [
                        self.pixels[ramp(spot + offset, n)] * spread(weight, n)
                        for spot, weight in corners
                    ]
                    value = sums[ramp(offset, n)]
                    if not self.align.largest:
                        T.buffer_store(sums, sum(parts, value), [ramp(offset, n)])
                        return
                    best = name(parts[0])
                    for part in map(name, parts[1:]):
                        best = name(tirx.Select(best < part, part, best))
                    keep = name(value)  # NaN stays where it came first
                    chosen = name(tirx.Select(keep < best, best, keep))
                    T.buffer_store(sums, tirx.Select(spread(first, n), best, chosen),
                                   [ramp(offset, n)])  # fmt: skip

                each(add)
        count = name(down.samples * across.samples)

        def put(offset: int, n: int) -> None:
            value = sums[ramp(offset, n)]
            if not self.align.largest:
                value = value / spread(self.real(tirx.Max(count, i64(1))), n)
            T.buffer_store(out, value, [ramp(at + start + offset, n)])

        each(put)
