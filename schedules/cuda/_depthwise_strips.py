"""What the direct convolutions share: which outputs a thread has, borders, loads and stores.

A thread computes a strip, `across` x `down` neighbouring outputs of one plane, of one unit of
filters. Threads of a block lie first along the units, so that what a warp reads and writes is
contiguous, then along the strips of an image:

    block.x: units, up to 64    block.y: strips of (plane, band of `down` rows, part of a row)
    grid.x: images x blocks of strips    grid.y: blocks of units

There is no shared memory and no barrier: neighbours find what both of them read in L1. Only loads
that can lie outside of A have a predicate, which of them is known when the kernel is compiled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from ...machine import Gpu, Machine
from ...workload import NUMPY, Conv
from ._ir import T, address, call, ceil_div, do, i32, i64, launch, local, prim_func, tirx, when

__all__ = ["Builder", "Strips", "chunk", "clocks", "every", "u32"]

_LANES = 64  # units of a block, at most
_THREADS = 128  # of a block, about
_LATENCY = 1500.0  # clocks until the first loads are there and the last stores on their way
_ALONE = 2.0  # clocks between instructions of a warp that has a scheduler for itself, or half of it
_L2 = 1.8  # times the speed of memory that the second-level cache has


def u32(value: int) -> Any:
    return tirx.const(value, "uint32")


def chunk(kernel: int, most: int) -> int:
    """The largest divisor of `kernel` up to `most`: equal parts of a kernel, without a rest."""
    return max(d for d in range(1, kernel + 1) if kernel % d == 0 and (d <= most or d == 1))


@dataclass(frozen=True)
class Strips:
    """The outputs of a workload, by thread; `units` threads share a strip."""

    work: Conv
    across: int
    down: int
    units: int

    @property
    def columns(self) -> int:
        """Strips in a row."""
        return ceil_div(self.work.outputs[2], self.across)

    @property
    def bands(self) -> int:
        return ceil_div(self.work.outputs[1], self.down)

    @property
    def places(self) -> int:
        """Strips of an image."""
        return self.work.outputs[0] * self.bands * self.columns

    @property
    def lanes(self) -> int:
        """Units of a block: parts that are nearly equal."""
        return ceil_div(self.units, ceil_div(self.units, _LANES))

    @cached_property
    def rows(self) -> int:
        """Strips of a block: as many as leave few lanes of its warps idle, near 128 threads."""

        def used(rows: int) -> float:
            threads = self.lanes * rows
            full = self.places / (rows * ceil_div(self.places, rows))
            return round(full * threads / (32 * ceil_div(threads, 32)), 2)

        choices = range(1, min(self.places, max(1, 2 * _THREADS // self.lanes)) + 1)
        return max(choices, key=lambda rows: (used(rows), -abs(self.lanes * rows - _THREADS)))

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of an image: of strips, of units."""
        return ceil_div(self.places, self.rows), ceil_div(self.units, self.lanes)


def clocks(strips: Strips, instructions: float, machine: Machine) -> float:
    """Expected clocks of a launch, not measured on a GPU.

    `instructions` is what one thread executes. A multiprocessor starts 4 instructions of warps a
    clock, but a warp alone less than one in two; memory is as fast as the machine says, or as L2
    where everything fits into it. A part of the lesser of both times is not hidden by the other.
    """
    assert isinstance(machine, Gpu)
    work, count = strips.work, machine.multiprocessors
    images = work.batch or 1
    warps = ceil_div(strips.lanes * strips.rows, 32) * prod(strips.blocks) * images
    busy = instructions * max(warps / (4 * count), _ALONE)
    wide = 4 if work.a == "f32" else 1
    out = {"s32": 4, "f32": 4}.get(work.out, 1)
    nbytes = prod(work.size) * work.channels * wide
    nbytes += prod(work.outputs) * work.filters * (out + wide * (work.residual is not None))
    rate = machine.bandwidth * (_L2 if nbytes * images < machine.l2 else 1.0)
    moved = nbytes * images / rate * machine.clock
    return _LATENCY + max(busy, moved) + min(busy, moved) / 4


class Builder(ABC):
    """One PrimFunc. A subclass has the loops of a thread: `thread`."""

    raw: Any  # words of A
    fill: Any  # what is outside of A, a word

    def __init__(self, name: str, workload: Conv, strips: Strips, nbytes: int) -> None:
        self.name, self.work, self.strips, self.nbytes = name, workload, strips, nbytes
        sizes = (prod(s) for s in ((*workload.size, workload.channels), self._c_shape))
        self.index = "int32" if 8 * max(sizes) < 1 << 31 else "int64"

    @property
    def _c_shape(self) -> tuple[int, ...]:
        return (*self.work.outputs, self.work.filters)

    @abstractmethod
    def thread(self, unit: Any) -> None:
        """The code of one thread."""

    def function(self) -> Any:
        work, strips = self.work, self.strips
        kind = NUMPY[work.a]
        with prim_func(self.name) as builder:
            batch = tirx.Var("batch", "int64") if work.batch is None else i64(work.batch)

            def image(shape: tuple[int, ...]) -> list[Any]:
                return [batch, *map(i64, shape)]

            self.a = T.arg("a", T.buffer(image((*work.size, work.channels)), kind))
            self.w = T.arg("w", T.buffer((i64(self.nbytes),), "uint8"))
            self.r = None
            if work.residual is not None:
                dtype = NUMPY[work.residual.dtype]
                self.r = T.arg("r", T.buffer(image(self._c_shape), dtype))
            self.c = T.arg("c", T.buffer(image(self._c_shape), NUMPY[work.out]))
            across, along = strips.blocks
            with launch((batch * across, along), (strips.lanes, strips.rows)) as (bx, by, tx, ty):
                block = T.Bind(tirx.Cast("int32", bx))
                self.image = T.Bind(tirx.Cast("int64", block // across))
                place = T.Bind(block % across * strips.rows + ty)
                unit = T.Bind(tirx.Cast("int32", by) * strips.lanes + tx)
                checks = [place < strips.places] if strips.places % strips.rows else []
                checks += [unit < strips.units] if strips.units % strips.lanes else []
                with when(every(checks)):
                    self._place(place)
                    self.thread(unit)
        return builder.get()

    def _place(self, place: Any) -> None:
        """Where the strip begins, in C and in A."""
        work, strips = self.work, self.strips
        rest = T.Bind(place // strips.columns)
        self.x = T.Bind(place % strips.columns * strips.across)
        self.y = T.Bind(rest % strips.bands * strips.down)
        self.z = T.Bind(rest // strips.bands)
        starts = zip((self.z, self.y, self.x), work.strides, work.pads, strict=True)
        self.zin, self.yin, self.xin = (T.Bind(i * s - pad[0]) for i, s, pad in starts)
        first = (self._wide(self.z) * work.outputs[1] + self.y) * work.outputs[2] + self.x
        self.pixel = T.Bind(first * work.filters)

    def _wide(self, value: Any) -> Any:
        return value if self.index == "int32" else tirx.Cast(self.index, value)

    # ---- borders ----
    def inside(self, dim: int, offset: int, moved: Any = None, most: int = 0) -> list[Any]:
        """Conditions for the strip's first input + offset (+ moved, up to `most`) to be in A.

        Those that no strip can violate are left out.
        """
        work, strips = self.work, self.strips
        last = (
            work.outputs[0] - 1,
            (strips.bands - 1) * strips.down,
            (strips.columns - 1) * strips.across,
        )
        pad, size = work.pads[dim][0], work.size[dim]
        start = (self.zin, self.yin, self.xin)[dim]
        at = start + offset if moved is None else start + moved + offset
        found = [at >= 0] if offset - pad < 0 else []
        reach = last[dim] * work.strides[dim] - pad + offset + most
        return [*found, at < size] if reach >= size else found

    def exists(self, x: int, y: int) -> list[Any]:
        """Conditions for an output of the strip to exist."""
        (_, height, width), strips = self.work.outputs, self.strips
        found = [self.x + x < width] if (strips.columns - 1) * strips.across + x >= width else []
        if (strips.bands - 1) * strips.down + y >= height:
            found.append(self.y + y < height)
        return found

    # ---- loops ----
    def digits(self, number: Any, counts: tuple[int, ...]) -> list[Any]:
        """A number below prod(counts) by digits, first the greatest; None where the count is 1."""
        many = [i for i, count in enumerate(counts) if count > 1]
        out: list[Any] = [None] * len(counts)
        for i in reversed(many):
            out[i] = number if i == many[0] else T.Bind(number % counts[i])
            number = number if i == many[0] else T.Bind(number // counts[i])
        return out

    def moves(
        self, part: Any, parts: tuple[int, int, int], sizes: tuple[int, int, int]
    ) -> tuple[list[Any], list[int]]:
        """Planes, rows and columns from the strip's first input to a part's, and the most of each.

        The kernel is in `parts` of `sizes`, `part` is a number, or one by dimension.
        """
        steps = [size * d for size, d in zip(sizes, self.work.dilations, strict=True)]
        numbers = part if isinstance(part, list) else self.digits(part, parts)
        moved = [None if n is None else T.Bind(n * s) for n, s in zip(numbers, steps, strict=True)]
        return moved, [(n - 1) * s for n, s in zip(parts, steps, strict=True)]

    # ---- memory ----
    def row(self, z: Any, y: Any, column: Any) -> Any:
        """The index in an image of A of the strip's first column (+ column), in row y, plane z."""
        work = self.work
        first = (self._wide(z) * work.size[1] + y) * work.size[2] + self.xin
        if column is not None:
            first = first + column
        return first * work.channels

    def in_a(self, at: Any) -> Any:
        """A pointer to an element of this image of A."""
        return address(self.a, self.image, 0, 0, 0, at)

    def out_at(self, x: int, y: int, channel: Any) -> Any:
        """The index in an image of C, and R, of a channel of an output of the strip."""
        return self.pixel + (y * self.work.outputs[2] + x) * self.work.filters + channel

    def take(self, raw: Any, at: int, pointer: Any, count: int, valid: Any, other: Any) -> None:
        """`count` words (1, 2, 4) to raw[at]; `other` where `valid`, None: always, is false."""
        target = address(raw, at)
        if valid is not None:
            do(f"load{4 * count}_if", target, pointer, tirx.Cast("int32", valid), other)
        elif count == 1:
            T.buffer_store(raw, call("uint32", "load4", pointer), [at])
        else:
            do(f"load{4 * count}", target, pointer)

    def load(self, at: int, place: Any, words: int, count: Any, valid: Any) -> None:
        """Words of A to raw[at], `fill` where not `valid`; with `count` so many bytes of one."""
        pointer = self.in_a(place)
        if count is None:
            self.take(self.raw, at, pointer, words, valid, self.fill)
        elif valid is None:
            T.buffer_store(self.raw, call("uint32", "load4_part", pointer, count), [at])
        else:
            word = call("uint32", "load4_part", pointer, tirx.Select(valid, count, i32(0)))
            T.buffer_store(self.raw, word | tirx.Select(valid, u32(0), self.fill), [at])

    def added(self, at: Any, values: int, count: Any) -> list[Any]:
        """The words of R from `at` on with so many values, of which `count` exist, None: all."""
        wide = self.work.a == "f32"
        words = values if wide else values // 4
        if count is not None:
            place = address(self.r, self.image, 0, 0, 0, at)
            if not wide:
                return [T.Bind(call("uint32", "load4_part", place, count))]
            held = local(words, "uint32")
            for i in range(words):
                place = address(self.r, self.image, 0, 0, 0, at + i)
                there = tirx.Cast("int32", i32(i) < count)
                do("load4_if", address(held, i), place, there, u32(0))
            return [held[i] for i in range(words)]
        held, size = local(words, "uint32"), min(words, 4)
        for i in range(0, words, size):
            place = address(self.r, self.image, 0, 0, 0, at + (i if wide else 4 * i))
            self.take(held, i, place, size, None, None)
        return [held[i] for i in range(words)]

    def store(self, at: Any, values: list[Any], count: Any) -> None:
        """Stores neighbours in C, int32 or f32; `count` of them, None: all, of 4 bytes each."""
        if count is None:
            cast = "as_uint" if self.work.out == "f32" else None
            words = [call("uint32", cast, v) if cast else tirx.Cast("uint32", v) for v in values]
            self.put(at, words)
            return
        for i, value in enumerate(values):
            with when(i32(i) < count):
                value = tirx.Cast(str(self.c.dtype), value)
                T.buffer_store(self.c, value, [self.image, i64(0), i64(0), i64(0), at + i])

    def put(self, at: Any, words: list[Any]) -> None:
        """Stores 1, 2 or 4 words as they are, or more of them by fours."""
        if len(words) == 1:
            do("store4", address(self.c, self.image, 0, 0, 0, at), words[0])
            return
        size = min(len(words), 4)
        for first in range(0, len(words), size):
            held = local(size, "uint32")
            for i, word in enumerate(words[first : first + size]):
                T.buffer_store(held, word, [i])
            # a word is an element of C, or has 4 of them
            step = first if self.work.out in ("s32", "f32") else 4 * first
            target = address(self.c, self.image, 0, 0, 0, at + step)
            do(f"store{4 * size}", target, address(held, 0))


def every(conditions: list[Any]) -> Any:
    """All of them, None if there are none."""
    out = None
    for condition in conditions:
        out = condition if out is None else tirx.And(out, condition)
    return out
