"""Writes loop nests as kernels: elementwise work, transpositions through shared memory, reductions.

Elementwise   a thread makes up to 16 bytes of neighbours, with one access for each tensor
transposition tiles of 32 x 32 elements, read along one dimension and written along the other
reduction     X results by Y threads that share each of them; partial results meet in shared memory
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tvm import sym, tirx
from tvm.tirx.script import builder as T

from ..machine import Gpu
from .gpu_ir import THREADS, barrier, blocks_of, i64, items, launch, parts, product, shared, when
from .gpu_partial import Partial
from .gpu_values import Scalar, Vector, aligned, guarded, lined, multiple, widest
from .lanes import Memory, same, static, stride
from .loops import Loops, count
from .reductions import operands
from .stages import Iter, Nest

_TILE, _LINES = 32, 8  # elements of a transposed tile's side, and lines of it at a time
_FULL = 1024  # threads for every multiprocessor that hide its memory's latency


class Kernels(Loops):
    """Every nest becomes one kernel."""

    def __init__(self, machine: Gpu, memory: Memory) -> None:
        super().__init__(machine, memory)
        self.multiprocessors = machine.multiprocessors
        self.full = machine.multiprocessors * _FULL

    def nest(self, nest: Nest) -> None:
        nest, space = self.fused(nest, nest.space)
        if nest.over:
            nest, over = self.fused(nest, nest.over)
            self.reduction(replace(nest, over=over), space)
            return
        along = self.transposed(nest, space)
        if along is not None:
            self.transpose(nest, space, *along)
        else:
            self.elementwise(nest, space)

    # Elementwise

    def elementwise(self, nest: Nest, space: list[Iter]) -> None:
        n = self.vector(nest, space)
        last = space[-1] if space else None
        if n == 1 or last is None:
            with items(product(it.extent for it in space)) as at:
                self.single(nest, Scalar(self.memory, place(space, at)))
            return
        groups = parts(last.extent, n)
        head = [*space[:-1], Iter(last.var, groups)]
        with items(product(it.extent for it in head)) as at:
            env = place(head, at)
            start = T.Bind(env.pop(last.var) * n)

            def whole() -> None:
                vector = Vector(self.memory, env, last.var, start, n)
                vector.fetch(nest, nest.values())
                vector.store(nest)

            if multiple(last.extent, n):
                whole()
                return
            fits = start + n <= last.extent
            with T.If(fits):
                with T.Then():
                    whole()
                with T.Else(), T.serial(i64(0), last.extent - start) as k:
                    here = self.as_type(last.var, start + k)
                    self.single(nest, Scalar(self.memory, {**env, last.var: here}))

    def single(self, nest: Nest, at: Scalar) -> None:
        """The results at one point."""
        values = [at(o.value) for o in nest.outs]
        if len(values) > 1:
            values = [at.bind(v) for v in values]
        for out, value in zip(nest.outs, values, strict=True):
            buffer, index = self.memory.at(out.buffer, out.indices)
            T.buffer_store(buffer, value, [sym.Analyzer().simplify(at(index))])

    def vector(self, nest: Nest, space: list[Iter]) -> int:
        """Neighbours that a thread makes: as many as are 16 bytes, fewer where there are few."""
        if not space:
            return 1
        last = space[-1]
        n = 16 // widest(nest, self.memory, last.var)
        threads = count(space)
        while n > 1 and all(it.size is not None for it in space) and threads // n < self.full // 2:
            n //= 2
        fits = []
        while n > 1:
            whole = len(space) == 1 or multiple(last.extent, n)
            if whole and all(lined(self.memory, o, last.var, n) for o in nest.outs):
                fits.append(n)
            n //= 2
        smooth = (n for n in fits if self.smooth(nest, last.var, n))
        return next(smooth, fits[0] if fits else 1)

    def smooth(self, nest: Nest, variable: Any, n: int) -> bool:
        """Whether all that is read side by side can be read in one access."""
        vector = Vector(self.memory, {}, variable, i64(0), n)
        for load, tests in guarded(nest.values()):
            index = self.memory.at(load.source, load.indices)[1]
            if static(stride(index, variable)) != 1:
                continue
            if not aligned(self.memory, load, variable, n):
                return False
            if not all(vector.uniform(test) for test, _ in tests):
                return False
        return True

    # Transpositions

    def transposed(self, nest: Nest, space: list[Iter]) -> tuple[Iter, list[Any]] | None:
        """A dimension that loads walk side by side instead of the last one, and these loads."""
        if len(space) < 2 or len(nest.outs) != 1:
            return None
        last = space[-1]
        if last.size is not None and last.size < _TILE // 2:
            return None
        bad: list[Any] = []
        for load, tests in guarded([nest.outs[0].value]):
            index = self.memory.at(load.source, load.indices)[1]
            step = stride(index, last.var)
            if step is None or tests:
                return None
            if static(step) not in (0, 1) and not any(same(load, b) for b in bad):
                bad.append(load)
        if not bad or len(bad) > 2:
            return None
        for it in space[:-1]:
            steps = [stride(self.memory.at(b.source, b.indices)[1], it.var) for b in bad]
            large = it.size is None or it.size >= _TILE // 2
            if large and all(s is not None and static(s) == 1 for s in steps):
                return it, bad
        return None

    def transpose(self, nest: Nest, space: list[Iter], along: Iter, bad: list[Any]) -> None:
        last = space[-1]
        others = [it for it in space[:-1] if it is not along]
        tiles = [parts(it.extent, _TILE) for it in (along, last)]
        grid = [*others, Iter(along.var, tiles[0]), Iter(last.var, tiles[1])]
        with launch(blocks_of(product(it.extent for it in grid), 1)) as (b, t):
            env = place(grid, b)
            rows, columns = (T.Bind(env.pop(it.var) * _TILE) for it in (along, last))
            x = T.Bind(tirx.Cast("int64", tirx.FloorMod(t, _TILE)))
            y = T.Bind(tirx.Cast("int64", tirx.FloorDiv(t, _TILE)))
            side = _TILE + 1  # so that a column lies in different banks
            kept = [shared(_TILE * side, str(b.source.ty.dtype.dtype)) for b in bad]

            def at(row: Any, column: Any) -> dict[Any, Any]:
                own = {along.var: self.as_type(along.var, row)}
                return {**env, **own, last.var: self.as_type(last.var, column)}

            def inside(row: Any, column: Any) -> Any:
                return tirx.And(row < along.extent, column < last.extent)

            for i in range(0, _TILE, _LINES):
                row, column = T.Bind(rows + x), T.Bind(columns + (y + i))
                with when(inside(row, column)):
                    for load, target in zip(bad, kept, strict=True):
                        value = Scalar(self.memory, at(row, column))(load)
                        T.buffer_store(target, value, [(y + i) * side + x])
            barrier()
            for i in range(0, _TILE, _LINES):
                row, column = T.Bind(rows + (y + i)), T.Bind(columns + x)

                def turned(load: Any, _: Any, i: int = i) -> Any:
                    for old, target in zip(bad, kept, strict=True):
                        if same(old, load):
                            return target[x * side + (y + i)]
                    return None

                with when(inside(row, column)):
                    self.single(nest, Scalar(self.memory, at(row, column), turned))

    # Reductions

    def reduction(self, nest: Nest, space: list[Iter]) -> None:
        last, size = (space[-1] if space else None), count(nest.over)
        steps = self.steps(nest, nest.updates, last.var) if last else []
        across = bool(steps) and set(steps) <= {0, 1} and 1 in steps
        inner = self.steps(nest, nest.updates, nest.over[-1].var) if nest.over else []
        along = 1 in inner and not (across and last is not None and (last.size or 32) >= 8)
        terms = operands(nest)
        results = count(space)
        open_ = any(it.size is None for it in [*space, *nest.over])
        share = 1
        if terms is not None and nest.over:
            most = THREADS if along else THREADS // 32
            wanted = self.full if not open_ else self.full * 8
            while share < most and share * 4 <= size and (
                results * share < wanted or (along and share < 32)
            ):  # fmt: skip
                share *= 2
        if share == 1 and across and last is not None:
            n = self.columns(nest, space)
            if n > 1:
                self.wide(nest, space, n)
                return
        threads = 1024 if along and share == THREADS and size >= 1 << 15 and results < 64 else (
            THREADS
        )  # fmt: skip
        share = threads if threads > THREADS else share
        total = product(it.extent for it in space)
        with launch(blocks_of(total, threads // share), threads) as (b, t):
            if along:
                x, y = tirx.FloorDiv(t, share), T.Bind(tirx.FloorMod(t, share))
            else:
                x, y = tirx.FloorMod(t, threads // share), T.Bind(
                    tirx.FloorDiv(t, threads // share)
                )  # fmt: skip
            at = T.Bind(b * (threads // share) + tirx.Cast("int64", x))
            active = T.Bind(at < total)
            env = place(space, at)
            partial = Partial(self, nest, env, terms)
            with when(active):
                partial.run(y, share)
            partial.join(t, y, share, threads, along)
            with when(active if share == 1 else tirx.And(active, tirx.EQ(y, 0))):
                self.single(nest, Scalar(self.memory, env, partial.hook()))

    def columns(self, nest: Nest, space: list[Iter]) -> int:
        """Neighbouring results of a thread that loads what they need in one access."""
        last = space[-1]
        n = 16 // widest(nest, self.memory, last.var)
        if any(it.size is None for it in nest.over):
            return 1
        open_ = any(it.size is None for it in space)
        while n > 1 and not open_ and count(space) // n < self.full // 2:
            n //= 2
        loads = [ld for ld, _ in guarded(nest.updates) if not nest.is_acc(ld.source)]
        while n > 1:
            if multiple(last.extent, n) and all(
                lined(self.memory, o, last.var, n) for o in nest.outs
            ) and any(aligned(self.memory, ld, last.var, n) for ld in loads):  # fmt: skip
                return n
            n //= 2
        return 1

    def wide(self, nest: Nest, space: list[Iter], n: int) -> None:
        """A thread for `n` neighbouring results."""
        last = space[-1]
        head = [*space[:-1], Iter(last.var, sym.Analyzer().simplify(last.extent // n))]
        with items(product(it.extent for it in head)) as at:
            env = place(head, at)
            start = T.Bind(env.pop(last.var) * n)
            sums = [Partial(self, nest, {}, None) for _ in range(n)]
            first = Vector(self.memory, env, last.var, start, n)
            for k, part in enumerate(sums):
                part.begin(first.at(k))
            with ExitStack() as loops:
                point = dict(env)
                for it in nest.over:
                    var = loops.enter_context(T.serial(i64(0), tirx.Cast("int64", it.extent)))
                    point[it.var] = self.as_type(it.var, var)
                vector = Vector(self.memory, point, last.var, start, n)
                vector.fetch(nest, nest.updates)
                for k, part in enumerate(sums):
                    part.step(vector.at(k, part.hook()))
            vector = Vector(self.memory, env, last.var, start, n)
            vector.fetch(nest, [o.value for o in nest.outs])
            vector.store(nest, [part.hook() for part in sums])


def place(space: list[Iter], at: Any) -> dict[Any, Any]:
    """The variables of a box at a number in row-major order."""
    env: dict[Any, Any] = {}
    for it in reversed(space[1:]):
        extent = tirx.Cast("int64", it.extent)
        if it.size == 1:
            env[it.var] = i64(0)
            continue
        env[it.var] = T.Bind(tirx.FloorMod(at, extent))
        at = T.Bind(tirx.FloorDiv(at, extent))
    if space:
        env[space[0].var] = at
    return {v: Loops.as_type(v, e) for v, e in env.items()}
