"""The loops of the interaction kernel: vectors to shared memory, sums of products, output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...workload import Interaction
from ._interaction import Plan
from ._ir import (
    T,
    address,
    barrier,
    call,
    ceil_div,
    do,
    i32,
    i64,
    launch,
    local,
    prim_func,
    shared,
    tirx,
)


class Builder:
    """One PrimFunc for a workload and a plan."""

    def __init__(self, name: str, work: Interaction, plan: Plan) -> None:
        self.name, self.work, self.plan = name, work, plan
        # of a sample: its vectors, later its products
        self.size = -(-max(work.vectors * plan.stride, work.pairs) // 4) * 4

    def function(self) -> Any:
        work, plan = self.work, self.plan
        with prim_func(self.name) as builder:
            bags = tirx.Var("bags", "int64") if work.bags is None else i64(work.bags)
            self.bags = bags
            self.dense = T.arg("dense", T.buffer((bags, work.dim), "float32"))
            shape = (bags, work.vectors - 1, work.dim)
            self.rows = T.arg("rows", T.buffer(shape, "float32"))
            self.out = T.arg("out", T.buffer((bags, work.dim + work.pairs), "float32"))
            # a launch of no blocks would be an error
            blocks = tirx.floordiv(bags + (plan.samples - 1), i64(plan.samples))
            grid = (tirx.max(blocks, i64(1)),)
            with launch(grid, (plan.samples * plan.threads,)) as (block, thread):
                sample = T.Bind(tirx.floordiv(thread, plan.threads))
                self.thread = T.Bind(tirx.floormod(thread, plan.threads))
                self.bag = T.Bind(block * plan.samples + tirx.Cast("int64", sample))
                self.there = T.Bind(self.bag < bags)
                self.x = shared(plan.samples * self.size, "float32")
                self.base = T.Bind(sample * self.size)
                self._sample()
        return builder.get()

    def _sample(self) -> None:
        work, plan = self.work, self.plan
        tiles = [self._tile(i) for i in range(plan.each)]
        acc = local(plan.each * plan.tile**2, "float32")
        for i in range(plan.each * plan.tile**2):
            T.buffer_store(acc, tirx.const(0.0, "float32"), [i])
        chunks = ceil_div(work.dim, plan.chunk)
        with T.serial(i32(0), i32(chunks)) as chunk:
            self._copy(chunk * plan.chunk)
            do("commit")
            do("wait0")
            barrier()
            self._products(tiles, acc)
            barrier()
        self._order(tiles, acc)
        barrier()
        with self._each(work.dim) as k, T.If(self.there), T.Then():
            T.buffer_store(self.out, self.dense[self.bag, k], [self.bag, k])
        with self._each(work.pairs) as pair, T.If(self.there), T.Then():
            T.buffer_store(self.out, self.x[self.base + pair], [self.bag, work.dim + pair])

    @contextmanager
    def _each(self, count: int) -> Iterator[Any]:
        """The threads of a sample share `count` things, neighbours at a time."""
        with T.serial(i32(0), i32(ceil_div(count, self.plan.threads))) as i:
            number = T.Bind(i * self.plan.threads + self.thread)
            with T.If(number < count), T.Then():
                yield number

    # ---- vectors ----
    def _copy(self, start: Any) -> None:
        """Starts to copy elements from `start` on of all vectors; 0 is put behind the last."""
        work = self.work
        size = 4 if work.dim % 4 == 0 else 1
        words = self.plan.chunk // size
        with self._each(words) as word:
            k = T.Bind(word * size)
            self._word(k, k + start, size, address(self.dense, self.bag, k + start))
        with self._each(words * (work.vectors - 1)) as number:
            row = T.Bind(tirx.floordiv(number, words))
            k = T.Bind((number - row * words) * size)
            source = address(self.rows, self.bag, row, k + start)
            self._word((row + 1) * self.plan.stride + k, k + start, size, source)

    def _word(self, at: Any, k: Any, size: int, source: Any) -> None:
        inside = tirx.And(self.there, k < self.work.dim)
        count = tirx.Select(inside, i32(4 * size), i32(0))
        do(f"copy{4 * size}", address(self.x, self.base + at), source, count)

    # ---- tiles ----
    def _tile(self, i: int) -> tuple[Any, Any, Any]:
        """Row and column of a thread's tile i, and whether there is one."""
        plan, g = self.plan, self.plan.groups
        number = T.Bind(self.thread + i * plan.threads)
        there = T.Bind(number < plan.tiles)
        even = int(g % 2 == 0)
        width = (g + 1) // 2
        p = T.Bind(tirx.floordiv(tirx.min(number, plan.tiles - 1), width))
        q = T.Bind(tirx.min(number, plan.tiles - 1) - p * width)
        p = T.Bind(p - even)  # of even g the rectangle has a row before the first
        left = q <= p
        row = T.Bind(tirx.Select(left, p, g - 1 - even - p))
        column = T.Bind(tirx.Select(left, q, g - even - q))
        return row, column, there

    def _products(self, tiles: list[tuple[Any, Any, Any]], acc: Any) -> None:
        """Adds the products of the elements in shared memory."""
        plan, t = self.plan, self.plan.tile
        a, b = local(4 * t, "float32"), local(4 * t, "float32")
        starts = [[self._vectors(side) for side in tile[:2]] for tile in tiles]
        with T.serial(i32(0), i32(plan.chunk // 4)) as step:
            for i, (left, right) in enumerate(starts):
                for r in range(t):
                    do("take16", address(a, 4 * r), address(self.x, left[r] + step * 4))
                    do("take16", address(b, 4 * r), address(self.x, right[r] + step * 4))
                for r in range(t):
                    for s in range(t):
                        at = (i * t + r) * t + s
                        for k in range(4):
                            total = call("float32", "fma", a[4 * r + k], b[4 * s + k], acc[at])
                            T.buffer_store(acc, total, [at])

    def _vectors(self, first: Any) -> list[Any]:
        """Where the vectors of a row or column of tiles begin; the last one for those too many."""
        plan, last = self.plan, self.work.vectors - 1
        numbers = [tirx.min(first + r * plan.groups, last) for r in range(plan.tile)]
        return [T.Bind(self.base + number * plan.stride) for number in numbers]

    # ---- output ----
    def _order(self, tiles: list[tuple[Any, Any, Any]], acc: Any) -> None:
        """Writes every product once, where it is in the output."""
        work, t, g = self.work, self.plan.tile, self.plan.groups
        for i, (row, column, there) in enumerate(tiles):
            other = tirx.NE(row, column)
            for r in range(t):
                for s in range(t):
                    a, b = T.Bind(row + r * g), T.Bind(column + s * g)
                    keep = tirx.And(there, tirx.And(a < work.vectors, b < work.vectors))
                    if r < s or (r == s and not work.diagonal):
                        keep = tirx.And(keep, other)
                    with T.If(keep), T.Then():
                        at = self._place(tirx.max(a, b), tirx.min(a, b))
                        T.buffer_store(self.x, acc[(i * t + r) * t + s], [self.base + at])

    def _place(self, more: Any, less: Any) -> Any:
        """The number of a pair of vectors in the output."""
        own = int(self.work.diagonal)
        if self.work.order == "lower":
            return tirx.floordiv(more * (more - 1 + 2 * own), 2) + less
        before = less * self.work.vectors - tirx.floordiv(less * (less + 1 - 2 * own), 2)
        return before + more - less - 1 + own
