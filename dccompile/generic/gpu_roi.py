"""RoiAlign of channels-last maps on a GPU: a thread for every channel of every bin."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .counted import wide
from .gpu_ir import attributes, flat, i64, items, product, report, slot, when
from .roi import MOST_SAMPLES, Align, Kit, Span


class _Kit(Kit):
    """Nothing is contracted on a GPU, so that a product is rounded as it is."""

    def times(self, a: Any, b: Any) -> Any:
        return slot(a * b)

    def check(self, span: Span, where: str) -> None:
        if not self.align.samples:
            most = math.isqrt(MOST_SAMPLES)
            with when(span.samples > most):
                report(f"DC2114: {where}: a box asks for more than {most} samples along a bin")

    def bounded(self, span: Span) -> Span:
        """No samples where a box asks for too many, which is an error that is reported."""
        if self.align.samples:
            return span
        most = math.isqrt(MOST_SAMPLES)
        some = slot(tirx.Select(span.samples > most, i64(0), span.samples))
        return Span(span.start, span.size, some)


def roi_align(shape: list[Any], boxes: Any, dtype: str, align: Align, where: str) -> Any:
    """PrimFunc with the parameters and messages of `roi.roi_align`."""
    batches, rows, columns, channels = shape
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("roi_align")
        x = T.arg("x", T.buffer(shape, dtype))
        rois = T.arg("rois", T.buffer([boxes, 4], dtype))
        index = T.arg("batch", T.buffer([boxes], "int64"))
        y = T.arg("y", T.buffer([boxes, align.height, align.width, channels], dtype))
        total = product([boxes, align.height, align.width, channels])
        pixels, out = flat(x, product(shape)), flat(y, total)
        sides = flat(rois, product([boxes, 4]))
        kit = _Kit(dtype, align, wide(rows), wide(columns), int(channels), pixels)

        def inside(batch: Any) -> Any:
            return tirx.And(batch >= 0, batch < wide(batches))

        with items(product([boxes])) as n:
            with when(tirx.Not(slot(inside(slot(index[n]))))):
                report(f"DC2110: {where}: a batch index is outside its first input")
            for first, count in ((0, align.width), (1, align.height)):
                kit.check(kit.span(sides[n * 4 + first], sides[n * 4 + (first + 2)], count), where)
        with items(total) as at:
            channel, bin_ = T.Bind(tirx.FloorMod(at, i64(channels))), at // i64(channels)
            column, line = T.Bind(bin_ % align.width), T.Bind(bin_ // align.width)
            row, n = T.Bind(line % align.height), T.Bind(line // align.height)
            given = slot(index[n])
            batch = slot(tirx.Select(inside(given), given, i64(0)))
            across = kit.span(sides[n * 4], sides[n * 4 + 2], align.width)
            down = kit.span(sides[n * 4 + 1], sides[n * 4 + 3], align.height)
            across, down = kit.bounded(across), kit.bounded(down)
            base = T.Bind(batch * wide(rows) * wide(columns))
            start = T.Bind(at - channel)
            kit.block(base, down, row, across, column, out, start, channel, [1])
    return builder.get()
