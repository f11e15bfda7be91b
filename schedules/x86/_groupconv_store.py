"""From the sums of a cell of a group convolution to C: scale, round, pack, store.

Everything is a list of tasks, each an instruction or two, which the loops put between the
multiply-adds of the next cell: the ports that convert and shuffle are idle there.

64 codes take 4x (vcvtdq2ps, vmulps, vcvtps2dq), 2 vpackssdw, vpackuswb, vpermd that undoes the
packs' interleaving of 128-bit lanes, vpshufb where filters are not in order, and a store for
every pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...workload import INT8_LIMITS, NUMPY, Conv
from ._epilogue import _PACKS
from ._ir import T, bits, intrinsic, ramp, splat, tirx

if TYPE_CHECKING:
    from ._groupconv import Layout

Task = Callable[[], None]


class Store:
    """The end of a cell; `w` is the function's buffer W, `c` C as a flat buffer."""

    def __init__(self, work: Conv, lay: Layout, w: Any, c: Any) -> None:
        self.work, self.lay, self.w, self.c = work, lay, w, c
        self.lanes, self.outputs = lay.scheme.lanes, lay.scheme.outputs

    def tasks(self, sums: list[Any], at: Any, block: Any) -> list[Task]:
        """What stores `sums`, s32 [pixel * outputs + vector], at C[at + pixel * filters ..]."""
        work = self.work
        values = list(sums)
        tasks: list[Task] = []
        factors: dict[str, list[Any]] = {}

        def constants() -> None:
            factors["scale"] = self._constants(self.lay.scale, block)
            if work.bias == "f32":
                factors["bias"] = self._constants(self.lay.bias, block)

        def bind(i: int, function: Callable[[Any], Any]) -> Task:
            def task() -> None:
                values[i] = T.Bind(function(values[i]))

            return task

        if work.out != "s32":
            tasks.append(constants)
        size = max(1, 4 // self.outputs) * self.outputs  # vectors of one pack: of whole pixels
        for first in range(0, len(values), size):
            members = range(first, min(first + size, len(values)))
            for i in members:
                if work.out == "s32":
                    continue
                tasks.append(bind(i, lambda s: tirx.Cast(f"float32x{self.lanes}", s)))
                tasks.append(bind(i, self._scaled(i % self.outputs, factors)))
                if work.out in INT8_LIMITS:
                    tasks.append(bind(i, self._rounded))
            if work.out in INT8_LIMITS:
                tasks += self._codes(values, members, at)
            else:
                tasks += [self._word(values, i, at) for i in members]
        return tasks

    def _constants(self, offset: int, block: Any) -> list[Any]:
        lanes = self.lanes
        start = offset + block * (4 * lanes * self.outputs)
        return [
            T.Bind(bits(f"float32x{lanes}", self.w[ramp(start + j * 4 * lanes, 4 * lanes)]))
            for j in range(self.outputs)
        ]

    def _f32(self, value: float) -> Any:
        return splat(value, "float32", self.lanes)

    def _scaled(self, j: int, factors: dict[str, list[Any]]) -> Callable[[Any], Any]:
        def scaled(y: Any) -> Any:
            if self.work.bias != "f32":
                return y * factors["scale"][j]
            dtype = f"float32x{self.lanes}"
            return intrinsic(dtype, "llvm.fma", y, factors["scale"][j], factors["bias"][j])

        return scaled

    def _rounded(self, y: Any) -> Any:
        if not self.work.bounded:  # vcvtps2dq gives INT_MIN beyond 2**31; keeps a NaN
            y = tirx.Select(tirx.GT(y, self._f32(65535.0)), self._f32(65535.0), y)
        return intrinsic(f"int32x{self.lanes}", "llvm.lrint", y)

    # ---- f32 and s32 ----
    def _word(self, values: list[Any], i: int, at: Any) -> Task:
        scheme = self.lay.scheme
        pixel, j = divmod(i, self.outputs)
        order = scheme.order().reshape(-1, self.lanes)[j].argsort().tolist()

        def task() -> None:
            value = self._activated(values[i]) if self.work.out == "f32" else values[i]
            if scheme.span > 1:
                value = T.Shuffle([value], order)
            where = at + (pixel * self.work.filters + j * self.lanes)
            T.buffer_store(self.c, value, [ramp(where, self.lanes)])

        return task

    def _activated(self, y: Any) -> Any:
        """Activations of one or two instructions; a NaN stays one."""
        if self.work.activation == "relu":
            return tirx.Select(tirx.LT(y, self._f32(0.0)), self._f32(0.0), y)
        if self.work.activation == "clip":
            assert self.work.clip is not None
            low, high = (self._f32(bound) for bound in self.work.clip)
            y = T.Bind(tirx.Select(tirx.LT(y, low), low, y))
            return tirx.Select(tirx.GT(y, high), high, y)
        return y

    # ---- u8 and s8 ----
    def _codes(self, values: list[Any], members: range, at: Any) -> list[Task]:
        """Packs up to 4 vectors and stores them; the last one stands for those that lack."""
        work, lanes = self.work, self.lanes
        to16, to_u8, to_s8 = _PACKS[lanes]
        halves: list[Any] = []
        packed: list[Any] = []
        pick = [members[min(i, len(members) - 1)] for i in range(4)]

        def half(i: int, j: int) -> Task:
            def task() -> None:
                value = intrinsic(f"int16x{2 * lanes}", to16, values[i], values[j])
                if work.shifted:
                    value = self._shifted(value)
                halves.append(T.Bind(value))

            return task

        def join() -> None:
            dtype = f"int8x{4 * lanes}"
            pack, sign = (to_u8, "u") if work.out == "u8" else (to_s8, "s")
            codes = intrinsic(dtype, pack, *halves)
            if work.clamped:
                for i, which in enumerate(("max", "min")):
                    limit = bits(dtype, self.w[ramp(self.lay.clamp + 64 * i, 4 * lanes)])
                    codes = intrinsic(dtype, f"llvm.{sign}{which}", codes, limit)
            packed.append(T.Bind(codes))

        def sort() -> None:
            order = [v % (lanes // 4) * 4 + v // (lanes // 4) for v in range(lanes)]
            words = T.Bind(T.Shuffle([bits(f"int32x{lanes}", packed[0])], order))
            packed[0] = T.Bind(self._sorted(bits(f"int8x{4 * lanes}", words)))

        def put(number: int) -> Task:
            def task() -> None:
                size = self.outputs * lanes
                part = packed[0]
                if size < 4 * lanes:
                    part = T.Shuffle([part], list(range(number * size, (number + 1) * size)))
                pixel = members[0] // self.outputs + number
                where = ramp(at + pixel * work.filters, size)
                T.buffer_store(self.c, bits(f"{NUMPY[work.out]}x{size}", part), [where])

            return task

        pixels = len(members) // self.outputs
        steps: list[Task] = [half(pick[0], pick[1]), half(pick[2], pick[3]), join, sort]
        return steps + [put(i) for i in range(pixels)]

    def _shifted(self, value: Any) -> Any:
        """Plus the zero point, saturating: vpaddsw has only the ports of the multiply-adds."""
        dtype = f"int16x{2 * self.lanes}"
        zero, most, least = (
            bits(dtype, self.w[ramp(self.lay.zero + 64 * i, 4 * self.lanes)]) for i in range(3)
        )
        value = intrinsic(dtype, "llvm.smin", value, most)
        if self.work.out == "s8":
            value = intrinsic(dtype, "llvm.smax", value, least)
        return value + zero

    def _sorted(self, values: Any) -> Any:
        """Bytes of every pixel, in the order of lanes, in the order of filters."""
        scheme, lanes = self.lay.scheme, self.lanes
        if scheme.span == 1:
            return values
        order = scheme.order().argsort().tolist()
        first = range(0, 4 * lanes, scheme.width)  # of every pixel
        return T.Shuffle([values], [p + o for p in first for o in order])
