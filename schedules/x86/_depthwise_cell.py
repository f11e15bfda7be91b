"""From windows to C: the sums of some outputs of a block of channels, and what follows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...workload import Conv
from . import _math
from ._depthwise import BLANK, DEPTH, GREATEST, LEAST, ZERO, Plan, ceil_div
from ._ir import T, bits, intrinsic, local, ramp, splat, tirx

if TYPE_CHECKING:
    from ._depthwise import Depthwise

_PACKS = {  # bytes of a vector: s32 -> s16, s16 -> u8, s16 -> s8, all saturating
    64: ("avx512.packssdw.512", "avx512.packuswb.512", "avx512.packsswb.512"),
    32: ("avx2.packssdw", "avx2.packuswb", "avx2.packsswb"),
    16: ("sse2.packssdw.128", "sse2.packuswb.128", "sse2.packsswb.128"),
}


def unpack(a: Any, b: Any, high: bool, element: int, width: int) -> Any:
    """Elements of the lower or upper half of every 16 bytes of a and b in turns, as int8."""
    count, lane = width // element, 16 // element
    order = []
    for first in range(0, count, lane):
        for i in range(lane // 2):
            at = first + i + (lane // 2 if high else 0)
            order += [at, count + at]
    dtype = f"int{8 * element}x{count}"
    return T.Bind(bits(f"int8x{width}", T.Shuffle([bits(dtype, a), bits(dtype, b)], order)))


@dataclass(frozen=True)
class Row:
    """A row of A, of which column 0 of the strip's windows is at `at`, and its place in the ring.

    `inside`: whether it is a row of A, None: it always is.
    """

    at: Any
    slot: Any
    inside: Any


Make = Callable[[list[Row], int], None]  # unpacks a part of the rows


class Cells:
    """Code for cells: a few neighbouring outputs of a block of `width` channels."""

    kernel: Depthwise
    work: Conv
    plan: Plan
    w: Any
    c: Any
    end: int  # of the blocks in W
    n: Any  # image, z, first y and x of the unit
    z: Any
    y: Any
    x: Any
    width: int
    valid: int  # channels of the block
    channel: Any  # the first
    offset: Any  # of the block in W
    offsets: tuple[int, int, int, int]  # in the block
    ring: Any

    def _cell(self, y: Any, taps: Any, group: Any, pixels: int, make: Make) -> None:
        """Some neighbouring outputs: a quarter of their channels after the other."""
        work, plan = self.work, self.plan
        previous: list[Any] = []
        halves: list[list[Any]] = []
        _, height, width = work.outputs
        image = (self.n * plan.od + self.z) * height + self.y + y
        pixel = image * width + self.x + group * plan.share
        at = T.Bind(pixel * work.filters + self.channel)
        for q in range(4):
            sums = self._sums(q, taps, group, pixels, make)
            if work.out == "s32":
                self._store_words(q, sums, at)
                continue
            floats = [self._scaled(q, s) for s in sums]
            if work.out == "f32":
                self._store_words(q, [self._activated(f) for f in floats], at)
                continue
            codes = [self._rounded(f) for f in floats]
            if q % 2:
                halves.append([self._half(a, b) for a, b in zip(previous, codes, strict=True)])
            previous = codes
        for p, (a, b) in enumerate(zip(*halves, strict=True) if halves else ()):
            self._store_codes(self._codes(a, b), at + p * work.filters)

    def _sums(self, q: int, taps: Any, group: Any, pixels: int, make: Make) -> list[Any]:
        """The sums of quarter q."""
        plan, lanes = self.plan, self.width // 4
        start = T.Bind(self._constant(self.offsets[0], q, "int32"))
        if plan.kd == 1:
            values = self._plane(q, taps, 0, [start] * pixels, group)
            make(taps.rows(0), q)
            return values
        acc = local(pixels * lanes, "int32")
        every = [ramp(p * lanes, lanes) for p in range(pixels)]
        for where in every:
            T.buffer_store(acc, start, [where])
        # LLVM would unroll a loop of a known number of steps, and spill
        with T.serial(0, T.Bind(bits("int32", self.w[ramp(self.end + 64 * DEPTH, 4)]))) as kz:
            values = self._plane(q, taps, kz, [acc[where] for where in every], group)
            for where, value in zip(every, values, strict=True):
                T.buffer_store(acc, value, [where])
            make(taps.rows(kz), q)
        return [T.Bind(acc[where]) for where in every]

    def _plane(self, q: int, taps: Any, kz: Any, acc: list[Any], group: Any) -> list[Any]:
        """The sums with the taps of one kd added."""
        plan, pixels = self.plan, len(acc)
        plane = plan.vector(1, 0, 0, 0)
        first = self.offset + (kz * plane + q * plan.vectors()) * self.width
        first = T.Bind(first)
        for ky in range(plan.kh):
            slot = taps.slot(kz, ky)
            for step in range(plan.steps):
                weights = [
                    T.Bind(self._weight(first, plan.vector(0, ky, step, place)))
                    if plan.used(step, place)
                    else None
                    for place in range(plan.share)
                ]
                made: dict[int, Any] = {}
                for g in range(ceil_div(pixels, plan.share)):
                    d = self._window(slot, plan.window(group, step), plan.window(g, 0), q, made)
                    for place, weight in enumerate(weights):
                        p = g * plan.share + place
                        if weight is not None and p < pixels:
                            acc[p] = T.Bind(self.kernel.multiply_add(acc[p], d, weight, self.width))
        return acc

    def _window(self, slot: Any, first: Any, window: int, q: int, made: dict[int, Any]) -> Any:
        """Quarter q of window first + `window` from the ring; what it is made of is in `made`."""
        plan = self.plan

        def stored(w: int, i: int) -> Any:
            if w not in made:
                made[w] = T.Bind(self.ring[slot + (first * plan.stored + (w * plan.stored + i))])
            return made[w]

        if not plan.paired:
            return stored(window, q)
        pairs = [stored(w, q // 2) for w in (window, window + plan.next_pair)]
        return unpack(pairs[0], pairs[1], bool(q % 2), 2, self.width)

    def _weight(self, first: Any, vector: int) -> Any:
        where = ramp(first + vector * self.width, self.width)
        return bits(f"int8x{self.width}", self.w[where])

    def _constant(self, at: int, q: int, dtype: str) -> Any:
        where = ramp(self.offset + (at + q * self.width), self.width)
        return bits(f"{dtype}x{self.width // 4}", self.w[where])

    def _common(self, number: int, dtype: str, lanes: int) -> Any:
        return bits(f"{dtype}x{lanes}", self.w[ramp(self.end + 64 * number, self.width)])

    # ---- epilogue ----
    def _f32(self, value: float) -> Any:
        return splat(value, "float32", self.width // 4)

    def _scaled(self, q: int, value: Any) -> Any:
        dtype = f"float32x{self.width // 4}"
        y = tirx.Cast(dtype, value)
        scale = self._constant(self.offsets[1], q, "float32")
        if self.work.bias == "f32":
            bias = self._constant(self.offsets[2], q, "float32")
            return T.Bind(intrinsic(dtype, "llvm.fma", y, scale, bias))
        return T.Bind(y * scale)

    def _activated(self, y: Any) -> Any:
        work = self.work
        if work.activation == "relu":
            return T.Bind(tirx.Select(tirx.LT(y, self._f32(0.0)), self._f32(0.0), y))
        if work.activation == "clip":
            assert work.clip is not None
            low, high = (self._f32(bound) for bound in work.clip)
            y = T.Bind(tirx.Select(tirx.LT(y, low), low, y))
            return T.Bind(tirx.Select(tirx.GT(y, high), high, y))
        if work.activation in ("sigmoid", "tanh"):
            return T.Bind(getattr(_math, work.activation)(y, self.width // 4))
        return y

    def _rounded(self, y: Any) -> Any:
        if not self.work.bounded:  # vcvtps2dq gives INT_MIN beyond 2**31; keeps a NaN
            y = T.Bind(tirx.Select(tirx.GT(y, self._f32(65535.0)), self._f32(65535.0), y))
        return T.Bind(intrinsic(f"int32x{self.width // 4}", "llvm.lrint", y))

    def _half(self, a: Any, b: Any) -> Any:
        lanes = self.width // 2
        half = intrinsic(f"int16x{lanes}", "llvm.x86." + _PACKS[self.width][0], a, b)
        if self.work.shifted:
            zero = self._common(ZERO, "int16", lanes)
            half = intrinsic(f"int16x{lanes}", "llvm.sadd.sat", half, zero)
        return T.Bind(half)

    def _codes(self, a: Any, b: Any) -> Any:
        unsigned = self.work.out == "u8"
        dtype = f"int8x{self.width}"
        codes = intrinsic(dtype, "llvm.x86." + _PACKS[self.width][1 if unsigned else 2], a, b)
        if self.work.clamped:
            name = "llvm.u" if unsigned else "llvm.s"
            for number, which in ((LEAST, "max"), (GREATEST, "min")):
                limit = self._common(number, "int8", self.width)
                codes = intrinsic(dtype, name + which, codes, limit)
        return codes

    def _store_codes(self, codes: Any, at: Any) -> None:
        dtype = "uint8" if self.work.out == "u8" else "int8"
        if self.valid == self.width:
            T.buffer_store(self.c, bits(f"{dtype}x{self.width}", codes), [ramp(at, self.width)])
            return
        codes = T.Bind(codes)
        for i in range(self.valid):
            T.buffer_store(self.c, bits(dtype, T.Shuffle([codes], [i])), [at + i])

    def _store_words(self, q: int, values: list[Any], at: Any) -> None:
        """Values of 32 bits: of every 16 channels of a block 4."""
        for p, value in enumerate(values):
            for lane in range(self.width // 16):
                first = 16 * lane + 4 * q
                count = min(4, self.valid - first)
                where = at + (p * self.work.filters + first)
                if count == 4:
                    piece = T.Shuffle([value], list(range(4 * lane, 4 * lane + 4)))
                    T.buffer_store(self.c, piece, [ramp(where, 4)])
                    continue
                for i in range(count):
                    T.buffer_store(self.c, T.Shuffle([value], [4 * lane + i]), [where + i])

    def _blank(self, number: int = BLANK) -> Any:
        """What lies outside of A."""
        if not self.work.padded:
            return splat(0, "int8", self.width)
        return self._common(number, "int8", self.width)


__all__ = ["Cells", "Make", "Row", "unpack"]
