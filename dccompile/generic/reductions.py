"""Writes reductions: register tiles over kept dimensions, or partial results along reduced ones."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from tvm import sym, tirx
from tvm.tirx.script import builder as T

from .fastmath import lanes as lanes_of
from .lanes import Lanes, loads, local, name, rebuild, same, static, uses
from .loops import SYMBOLIC, Loops, count, integer
from .stages import Iter, Nest


class Reductions(Loops):
    def reduction(self, nest: Nest, space: list[Iter], env: dict[Any, Any], parallel: bool) -> None:
        nest, space = self.fused(nest, space)
        nest, over = self.fused(nest, nest.over)
        nest = replace(nest, over=over)
        inner = space[-1] if space else None
        steps = self.steps(nest, nest.updates, inner.var) if inner else []
        smooth = bool(steps) and set(steps) <= {0, 1} and 1 in steps
        lengthwise = next(
            (
                it
                for it in reversed(over)
                if set(s := self.steps(nest, nest.updates, it.var)) <= {0, 1} and 1 in s
            ),
            None,
        )
        size = SYMBOLIC if inner is None or inner.size is None else inner.size
        if lengthwise is not None and not (smooth and (size >= 8 or count([lengthwise]) < 8)):
            if not smooth and inner and set(steps) <= {0, 1, 2, 3, 4} and count([lengthwise]) < 8:
                self.sideways(nest, space, env, parallel)
                return
            terms = operands(nest)
            if terms is not None:
                self.lengthwise(nest, space, lengthwise, terms, env, parallel)
                return
        if inner is not None:
            self.sideways(nest, space, env, parallel)
            return
        self.remarks.append(f"{nest.name}: a reduction to one value that stays scalar")
        self.micro(nest, env, None, integer(0), 1, None, integer(0), 1)

    def sideways(self, nest: Nest, space: list[Iter], env: dict[Any, Any], parallel: bool) -> None:
        """Lanes over the last kept dimension, a register tile of rows that share its loads."""
        last, others = space[-1], space[:-1]
        rows = next((it for it in reversed(others) if self.reuses(nest, it, last)), None)
        itemsize = max(a.ty.dtype.dtype.itemsize for a in nest.acc)
        one = self.machine.bits // 8 // itemsize
        budget = self.machine.registers * 3 // 4 // len(nest.acc)
        wide = (4 if budget >= 24 else 2) if rows is not None else min(8, budget)
        width = one * wide
        if last.size is not None:
            width = min(width, -(-last.size // one) * one)
        tall = 1
        if rows is not None:
            tall = max(1, budget // (width // one))
            if rows.size is not None:
                tall = -(-rows.size // -(-rows.size // tall))
            if rows.size is None:
                tall = min(tall, 4)
        outer = [it for it in others if it is not rows]
        groups: list[tuple[Any, Any, int]] = [(integer(0), integer(1), 1)]
        if rows is not None:
            whole = sym.Analyzer().simplify(tirx.FloorDiv(rows.extent, integer(tall)))
            left = sym.Analyzer().simplify(tirx.FloorMod(rows.extent, integer(tall)))
            groups = [(integer(0), whole, tall)]
            base = sym.Analyzer().simplify(whole * tall)
            groups.append((base, integer(1), int(left.value)) if static(left) is not None
                          else (base, left, 1))  # fmt: skip
        for base, times, height in groups:
            if static(times) == 0 or height == 0:
                continue
            tile = tirx.Var("tile", "int64")
            iters = [*outer, Iter(tile, times)]
            column = tirx.Var("column", "int64")
            split_columns = (
                parallel and count(iters) < 16 and last.size is not None and last.size >= 2 * width
            )

            def body(point: dict[Any, Any], v: Any, n: int, base: Any = base, height: int = height,
                     tile: Any = tile) -> None:  # fmt: skip
                first = base + point[tile] * height
                inside = {k: e for k, e in point.items() if k is not tile}
                self.micro(nest, inside, rows, first, height, last, v, n)

            if split_columns and last.size is not None:
                whole_columns = last.size // width
                with self.grid([*iters, Iter(column, integer(whole_columns))], True) as loop:
                    v = loop.pop(column)
                    body({**env, **loop}, v * width, width)
                if last.size % width:
                    with self.grid(iters, False) as loop:
                        for s, n in self.tail(whole_columns * width, last.size, width):
                            body({**env, **loop}, integer(s), n)
                continue
            with self.grid(iters, parallel) as loop:
                point = {**env, **loop}
                self.across(last.extent, width, functools.partial(body, point))

    def reuses(self, nest: Nest, it: Iter, last: Iter) -> bool:
        """Whether some load of a vector along `last` serves all rows of `it`."""
        for u in nest.updates:
            for n in loads(u):
                if not nest.is_acc(n.source):
                    index = self.memory.at(n.source, n.indices)[1]
                    if uses(index, last.var) and not uses(index, it.var):
                        return True
        return False

    def micro(self, nest: Nest, env: dict[Any, Any], rows: Iter | None, first: Any, height: int,
              last: Iter | None, start: Any, n: int) -> None:  # fmt: skip
        """A tile of accumulators of `height` rows by `n` lanes, from init to the stores."""
        types = [str(a.ty.dtype.dtype) for a in nest.acc]
        acc = [local(height * n, t) for t in types]

        def where(k: int) -> Any:
            return [T.ramp(integer(k * n), 1, n)] if n > 1 else [integer(k)]

        def at(point: dict[Any, Any], k: int) -> Lanes:
            def hook(load: Any, _: Lanes) -> Any:
                for own, a in zip(acc, nest.acc, strict=True):
                    if load.source.same_as(a):
                        return own[where(k)[0]]
                return None

            here = dict(point)
            if rows is not None:
                here[rows.var] = self.as_type(rows.var, first + k)
            if last is None:
                return Lanes(self.memory, here, hook=hook)
            v = self.as_type(last.var, start)
            if n == 1:
                return Lanes(self.memory, {**here, last.var: v}, hook=hook)
            return Lanes(self.memory, here, last.var, v, n, hook)

        for k in range(height):
            for own, init in zip(acc, nest.inits, strict=True):
                T.buffer_store(own, at(env, k).wide(init), where(k))
        with self.grid(nest.over) as loop:
            for k in range(height):
                lanes = at({**env, **loop}, k)
                values = [lanes.wide(u) for u in nest.updates]
                if len(values) > 1:
                    values = [name(v) for v in values]
                for own, value in zip(acc, values, strict=True):
                    T.buffer_store(own, value, where(k))
        for k in range(height):
            self.store(nest, at(env, k))

    def lengthwise(self, nest: Nest, space: list[Iter], along: Iter, terms: list[Any],
                   env: dict[Any, Any], parallel: bool) -> None:  # fmt: skip
        """Lanes of partial results along a reduced dimension, folded at the end."""
        others = [it for it in nest.over if it is not along]
        width = self.width(nest)
        types = [str(a.ty.dtype.dtype) for a in nest.acc]
        size = along.size
        if size is None:
            full, left = tirx.FloorDiv(along.extent, integer(width)), None
        else:
            while width > self.machine.lanes and width > size:
                width //= 2
            width = min(width, size)
            full, left = integer(size // width), size % width
        with self.grid(space, parallel) as outer:
            point = {**env, **outer}

            def start(n: int) -> list[Any]:
                acc = [local(n, t) for t in types]
                for own, init in zip(acc, nest.inits, strict=True):
                    T.buffer_store(own, Lanes(self.memory, point, tirx.Var("_", "int64"),
                                              integer(0), n).wide(init), [_lanes(n)])  # fmt: skip
                return acc

            def update(acc: list[Any], here: dict[Any, Any], begin: Any, n: int) -> None:
                def hook(load: Any, _: Lanes) -> Any:
                    for own, a in zip(acc, nest.acc, strict=True):
                        if load.source.same_as(a):
                            return own[_lanes(n)]
                    return None

                begin = self.as_type(along.var, begin)
                if n == 1:
                    at = Lanes(self.memory, {**here, along.var: begin}, hook=hook)
                else:
                    at = Lanes(self.memory, here, along.var, begin, n, hook)
                values = [at.wide(u) for u in nest.updates]
                if len(values) > 1:
                    values = [name(v) for v in values]
                for own, value in zip(acc, values, strict=True):
                    T.buffer_store(own, value, [_lanes(n)])

            main = start(width)
            rest = start(left or 1) if left != 0 else None
            with self.grid(others) as loop:
                here = {**point, **loop}
                with T.serial(0, full) as i:
                    update(main, here, i * width, width)
                if rest is not None and left is not None:
                    update(rest, here, full * width, left)
                elif rest is not None:
                    with T.serial(0, tirx.FloorMod(along.extent, integer(width))) as i:
                        update(rest, here, full * width + i, 1)
            result = self.fold(nest, terms, [a[_lanes(width)] for a in main], width)
            if rest is not None:
                n = left or 1
                other = self.fold(nest, terms, [a[_lanes(n)] for a in rest], n)
                result = self.combine(nest, terms, result, other)

            def final(load: Any, _: Lanes) -> Any:
                for value, a in zip(result, nest.acc, strict=True):
                    if load.source.same_as(a):
                        return value
                return None

            self.store(nest, Lanes(self.memory, point, hook=final))

    def fold(self, nest: Nest, terms: list[Any], values: list[Any], n: int) -> list[Any]:
        """All lanes combined into scalars, by halves."""
        values = [name(v) for v in values]
        while n > 1:
            half = n // 2
            low = [_part(v, 0, half) for v in values]
            high = [_part(v, half, half) for v in values]
            odd = [_part(v, n - 1, 1) for v in values] if n % 2 else None
            values = self.combine(nest, terms, low, high)
            n = half
            if odd is not None:
                first = [_part(v, 0, 1) for v in values] if n > 1 else values
                first = self.combine(nest, terms, first, odd)
                if n == 1:
                    values = first
                else:
                    values = [
                        name(tirx.Shuffle([v, tirx.Broadcast(f, n)], [n, *range(1, n)]))
                        for v, f in zip(values, first, strict=True)
                    ]
        return values

    def combine(self, nest: Nest, terms: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
        """The reduction's own step applied to two partial results."""
        n = lanes_of(a[0])

        def hook(load: Any, _: Lanes) -> Any:
            for value, own in zip(a, nest.acc, strict=True):
                if load.source.same_as(own):
                    return value
            return None

        names = [tirx.Var(f"b{i}", str(t.ty)) for i, t in enumerate(terms)]
        env = dict(zip(names, b, strict=True))

        def change(node: Any) -> Any:
            return next((v for v, t in zip(names, terms, strict=True) if same(node, t)), None)

        at = Lanes(self.memory, env, tirx.Var("_", "int64"), integer(0), n, hook)
        return [name(at.wide(rebuild(u, change))) for u in nest.updates]


def _lanes(n: int) -> Any:
    return T.ramp(integer(0), 1, n) if n > 1 else integer(0)


def _part(value: Any, start: int, n: int) -> Any:
    if lanes_of(value) == n:
        return value
    return name(tirx.Shuffle([value], list(range(start, start + n))))


def operands(nest: Nest) -> list[Any] | None:
    """What each update adds to its accumulator; None if its form is not known."""
    found = []
    for own, update in zip(nest.acc, nest.updates, strict=True):

        def mine(node: Any, own: Any = own) -> bool:
            return type(node).__name__ == "TensorLoad" and node.source.same_as(own)

        if type(update).__name__ in ("Add", "Mul", "Max", "Min", "And", "Or"):
            sides = (update.a, update.b)
        elif type(update).__name__ == "Select":
            sides = (update.true_value, update.false_value)
        elif type(update).__name__ == "Call" and len(update.args) == 2:
            sides = tuple(update.args)
        else:
            return None
        term = [s for s in sides if not mine(s)]
        if len(term) != 1 or any(nest.is_acc(n.source) for n in loads(term[0])):
            return None
        found.append(term[0])
    return found
