"""One tile of an integer convolution: its k-steps, and how it ends.

With `defer` a tile ends during the k-steps of the next one: the accumulators go to a buffer, and
the instructions that scale, round and store them stand among the next multiplications, which leave
half of the vector pipes idle (see _conv_epilogue). Zen 4, 1x1 with residual: 56x56 64->256 291 us
without and 275 with it, 28x28 128->512 255 and 248, from 256 channels on no difference; without a
residual there is little to hide, and it costs 1 to 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...workload import Conv
from ._conv_epilogue import ConvEpilogue
from ._conv_int import RESIDUAL
from ._conv_shape import Axis, Run, Shape, Tile, ceil_div
from ._ir import T, bits, intrinsic, local, ramp, splat, tirx

if TYPE_CHECKING:
    from ._conv_int import IntegerConv

_UNROLL = 128  # multiply-adds of a run up to which its k-loop is unrolled
_EARLY = 4  # k-steps of a tile during which a piece of the tile before is stored


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
    nr: int  # vectors
    valid: int  # filters
    tail: int  # lanes of the last vector
    step_bytes: int  # of a k-step


class Tiles:
    """Emits the code of tiles. `source` is what they read: A, or a copy of an image of it."""

    def __init__(
        self,
        kernel: IntegerConv,
        workload: Conv,
        params: Any,
        source: Any,
        w: Any,
        r: Any,
        c: Any,
        index: str,
    ) -> None:
        self.kernel, self.work, self.params = kernel, workload, params
        self.shape, self.lay = Shape(workload), kernel.layout(workload, params)
        self.source, self.w, self.index = source, w, index
        masks = kernel.bits == 512
        self.epilogues = {
            lanes: ConvEpilogue(workload, lanes, masks, c, r, self._constant)
            for lanes in {self.lay.lanes, self.lay.tail}
        }

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    def _at(self, panel: Panel, i: Any, j: int) -> Any:
        """Where the accumulators of pixel i and vector j are."""
        return ramp((i * panel.nr + j) * self.lay.lanes, self._lanes(panel, j))

    def _lanes(self, panel: Panel, j: int) -> int:
        return panel.tail if j == panel.nr - 1 else self.lay.lanes

    def tile(self, row: Row, x: Any, tile: Tile, panel: Panel) -> None:
        """The tile whose first output is number x of the row."""
        acc = self._started(row, tile, panel)
        source = T.Bind(row.source + x * (self.shape.x.stride * self.work.channels))
        self._over(self.shape.z, row.z, lambda kd: self._planes(acc, row, kd, source, tile, panel))
        _run_all(self._finishing(acc, 0, tile.mr, T.Bind(row.pixel + x), panel))

    def _started(self, row: Row, tile: Tile, panel: Panel) -> Any:
        """The accumulators of a tile: a local buffer, with what they start from in it."""
        nr, lanes = panel.nr, self.lay.lanes
        acc = local(tile.mr * nr * lanes, "int32")
        classes = sorted(set(tile.classes))
        start = {k: [T.Bind(self._start(row, k, panel, j)) for j in range(nr)] for k in classes}
        for i in range(tile.mr):
            for j in range(nr):
                T.buffer_store(acc, start[tile.classes[i]][j], [self._at(panel, i, j)])
        return acc

    def _finishing(
        self, acc: Any, first: Any, pixels: int, to: Any, panel: Panel
    ) -> Iterator[None]:
        """C of `pixels` pixels from number `first` of the accumulators on, at pixel `to`.

        In steps of about one instruction.
        """
        nr, lay = panel.nr, self.lay
        halved = panel.tail != lay.lanes
        whole = nr - halved
        for lanes, first_vector, vectors in ((lay.lanes, 0, whole), (panel.tail, whole, nr)):
            own = range(first_vector, vectors)
            if not own:
                continue
            scale, bias = [], []
            if self.work.out != "s32":
                scale = [T.Bind(self._filters(lay.scale, "float32", panel, j)) for j in own]
            if self.work.bias == "f32":
                bias = [T.Bind(self._filters(lay.bias, "float32", panel, j)) for j in own]
            registers = [[acc[self._at(panel, first + i, j)] for j in own] for i in range(pixels)]
            skipped = first_vector * lay.lanes
            at, valid = (to, panel.filter + skipped), min(panel.valid - skipped, len(own) * lanes)
            yield from self.epilogues[lanes].emit(registers, scale, bias, at, valid)

    def defers(self, tile: Tile) -> bool:
        """Whether `chain` can be asked for rows of such a tile."""
        return self.params.defer and self.shape.deferring(tile.mr)

    def chain(self, row_of: Callable[[Any], Row], count: Any, tile: Tile, panel: Panel) -> None:
        """Rows 0 .. count - 1, of one tile each and contiguous in C; each ends during the next."""
        nr, lanes, steps = panel.nr, self.lay.lanes, self.shape.steps
        pixels = 4 // math.gcd(4, nr)  # that fill stores
        while tile.mr % pixels == 0 and tile.mr // pixels > steps:
            pixels *= 2
        if tile.mr % pixels:
            pixels = tile.mr
        pieces = tile.mr // pixels
        early = min(_EARLY, steps // pieces)  # k-steps along with a piece
        done = local(tile.mr * nr * lanes, "int32")
        cells = [(i, j) for i in range(tile.mr) for j in range(nr)]
        for i, j in cells:
            zeros = splat(0, "int32", self._lanes(panel, j))
            T.buffer_store(done, zeros, [self._at(panel, i, j)])
        first = row_of(self.const(0)).pixel
        with T.serial(self.const(0), count) as at:
            row = row_of(at)
            # the first time nothing is done yet: zeros go where the second time overwrites them
            before = T.Bind(tirx.max(row.pixel - tile.mr, first))
            acc = self._started(row, tile, panel)
            with T.serial(self.const(0), pieces) as piece:
                ending = self._finishing(
                    done, piece * pixels, pixels, T.Bind(before + piece * pixels), panel
                )
                share = self.epilogues[lanes].instructions(pixels, nr) / (early * tile.mr)
                told = 0
                for k in range(early):
                    step = T.Bind(piece * early + k)
                    for i in self._step_of(acc, tile, row, panel, step, step * 4):
                        goal = math.ceil((k * tile.mr + i + 1) * share)
                        for _ in range(goal - told):
                            next(ending, None)
                        told = goal
                _run_all(ending)
            start, whole = pieces * early, self.shape.span // 4
            with T.serial(self.const(0), whole - start) as k:
                step = T.Bind(k + start)
                _run_all(self._step_of(acc, tile, row, panel, step, step * 4))
            if whole < steps:
                offset = whole * 4 if self.shape.copied else self.shape.span - 4
                _run_all(self._step_of(acc, tile, row, panel, whole, offset))
            for i, j in cells:
                where = self._at(panel, i, j)
                T.buffer_store(done, acc[where], [where])
        last = T.Bind(first + (count - 1) * tile.mr)
        with T.If(count > 0):
            with T.Then():
                with T.serial(self.const(0), pieces) as piece:
                    to = T.Bind(last + piece * pixels)
                    _run_all(self._finishing(done, piece * pixels, pixels, to, panel))

    def _step_of(
        self, acc: Any, tile: Tile, row: Row, panel: Panel, step: Any, offset: Any
    ) -> Iterator[int]:
        every = tuple(range(tile.mr))
        return self._step(acc, every, row.source, panel.weights, step, offset, panel)

    def _over(self, axis: Axis, taps: tuple[Any, Any], body: Callable[[Any], None]) -> None:
        """body(tap) for an interval of the taps of z or y."""
        if axis.whole and axis.kernel == 1:
            body(self.const(0))
            return
        first, count = taps
        with T.serial(self.const(0), count) as i:
            body(i if axis.whole else T.Bind(first + i))

    def _planes(self, acc: Any, row: Row, kd: Any, source: Any, tile: Tile, panel: Panel) -> None:
        shape, channels = self.shape, self.work.channels
        line = shape.x.size * channels

        def lines(ky: Any) -> None:
            plane = kd * (shape.z.dilation * shape.y.size) + ky * shape.y.dilation
            origin = T.Bind(source + plane * line)
            tap = (kd * shape.y.kernel + ky) * shape.row_steps
            weights = T.Bind(panel.weights + tap * panel.step_bytes)
            for run in tile.runs:
                self._run(acc, run, origin, weights, panel)

        self._over(shape.y, row.y, lines)

    def _run(self, acc: Any, run: Run, origin: Any, weights: Any, panel: Panel) -> None:
        """Multiplies and adds neighbouring kx and their channels."""
        shape = self.shape
        apart = shape.x.dilation * self.work.channels  # elements from one tap to the next
        if shape.spans == 1:
            self._steps(acc, run.pixels, origin, weights, shape.span, panel)
        elif shape.joined:
            skip = run.kx * shape.span_steps * panel.step_bytes
            size = run.taps * shape.span
            self._steps(acc, run.pixels, origin + run.kx * apart, weights + skip, size, panel)
        else:

            def tap(kx: Any) -> None:
                skip = kx * (shape.span_steps * panel.step_bytes)
                where, what = T.Bind(origin + kx * apart), T.Bind(weights + skip)
                self._steps(acc, run.pixels, where, what, shape.span, panel)

            if run.taps == 1:
                tap(run.kx)
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
        kernel, nr = self.kernel, panel.nr
        apart = self.shape.x.stride * self.work.channels  # elements from pixel to pixel
        at = weights + s * panel.step_bytes
        b = [
            kernel.b_operands(
                self.w, at + j * self.lay.step_bytes, self._lanes(panel, j), self.params
            )
            for j in range(nr)
        ]
        if self.params.prefetch:
            self._prefetch(at, panel)
        for i in pixels:
            a = self._operands(origin + offset + i * apart, panel)
            for j in range(nr):
                lanes = self._lanes(panel, j)
                part = a if lanes == self.lay.lanes else [_low_half(x, lanes) for x in a]
                where = self._at(panel, i, j)
                T.buffer_store(acc, kernel.multiply_add(acc[where], part, b[j], lanes), [where])
            yield i

    def _prefetch(self, at: Any, panel: Panel) -> None:
        """The same step of the next panel to L2."""
        ahead = self.shape.steps * panel.step_bytes
        for line in range(0, panel.step_bytes, 64):
            where = T.address_of(self.w[at + (ahead + line)])
            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", where, 0, 2, 1))

    def _operands(self, at: Any, panel: Panel) -> list[Any]:
        """Multiplier inputs of the 4 elements at `at` of what tiles read."""
        lanes = self.lay.lanes

        def spread(element: Any) -> Any:
            dwords = T.broadcast(bits("int32", element), lanes)
            if panel.tail == lanes:
                return dwords
            # Two uses, one of half of it, make LLVM load and broadcast in two instructions.
            fenced = intrinsic(
                f"float32x{lanes}", "llvm.arithmetic.fence", bits(f"float32x{lanes}", dwords)
            )
            return T.Bind(bits(f"int32x{lanes}", fenced))

        if self.kernel.staged:
            pairs = [spread(self.source[ramp(at + k, 2)]) for k in (0, 2)]
            return [T.Bind(bits(f"int16x{2 * lanes}", pair)) for pair in pairs]
        return self.kernel.a_operands(spread(self.source[ramp(at, 4)]), lanes)

    # ---- constants in W ----
    def _filters(self, offset: Any, dtype: str, panel: Panel, j: int) -> Any:
        lanes = self._lanes(panel, j)
        at = offset + (panel.column + j) * (4 * self.lay.lanes)
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
        kind, _, lanes = dtype.partition("x")
        nbytes = np.dtype(kind).itemsize * int(lanes)
        return bits(dtype, self.w[ramp(places[name], nbytes)])


def _run_all(steps: Iterable[Any]) -> None:
    for _ in steps:
        pass


def _low_half(operand: Any, lanes: int) -> Any:
    """The part of a multiplier input that `lanes` s32 lanes take."""
    return T.Shuffle([operand], list(range(lanes * (4 if str(operand.ty) == "int8x64" else 2))))
