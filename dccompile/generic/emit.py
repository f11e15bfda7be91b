"""Writes nests: flat vector loops with peeled tails, and transpositions by register blocks."""

from __future__ import annotations

from typing import Any

from tvm import sym, tirx
from tvm.tirx.script import builder as T

from .boxes import split
from .lanes import Lanes, loads, name, same, static, stride
from .loops import integer
from .reductions import Reductions
from .stages import Iter, Nest, bare_use

_NARROW = 4  # elements of a last dimension that vectors are interleaved for


class Writer(Reductions):
    """Emits whole nests into the open IRBuilder scope."""

    def nest(self, nest: Nest, space: list[Iter], env: dict[Any, Any], parallel: bool) -> None:
        """One nest over `space`, the part of its space that no outer loop walks."""
        write = self.reduction if nest.over else self.box
        lead, boxes = split(nest, space)
        if len(boxes) == 1:
            write(boxes[0][0], boxes[0][1], env, parallel)
            return
        with self.grid(space[:lead], parallel) as outer:
            for part, iters in boxes:
                write(part, iters[lead:], {**env, **outer}, parallel and lead == 0)

    def box(self, nest: Nest, space: list[Iter], env: dict[Any, Any], parallel: bool) -> None:
        """An elementwise nest without conditions that depend on where in the box it is."""
        nest, space = self.fused(nest, space)
        if not space:
            self.store(nest, Lanes(self.memory, env))
            return
        last = space[-1]
        beside = self.interleaved(nest, space)
        if beside is not None:
            self.interleave(nest, space, beside, env, parallel)
            return
        blocked = self.transposed(nest, space)
        if blocked is not None:
            self.transpose(nest, space, blocked, env, parallel)
            return
        width = self.width(nest)
        if parallel and len(space) == 1:
            self.chunks(nest, last, width, env)
            return
        with self.grid(space[:-1], parallel) as outer:
            point = {**env, **outer}
            self.across(last.extent, width, lambda s, n: self.vector(nest, point, last.var, s, n))

    def chunks(self, nest: Nest, it: Iter, width: int, env: dict[Any, Any]) -> None:
        """A flat loop in parallel: equal chunks of whole vectors, then the rest."""
        block = width * 64 if it.size is None else -(-it.size // (64 * width)) * width
        block = max(block, width * 16)

        def part(base: Any, extent: Any) -> None:
            self.across(extent, width, lambda s, n: self.vector(nest, env, it.var, base + s, n))

        full = sym.Analyzer().simplify(tirx.FloorDiv(it.extent, integer(block)))
        if static(full) != 0:
            with T.parallel(0, full) as i:
                part(i * block, integer(block))
        left = sym.Analyzer().simplify(tirx.FloorMod(it.extent, integer(block)))
        if static(left) != 0:
            part(sym.Analyzer().simplify(full * block), left)

    def vector(self, nest: Nest, env: dict[Any, Any], var: Any, start: Any, n: int) -> None:
        start = self.as_type(var, start)
        if n == 1:
            self.store(nest, Lanes(self.memory, {**env, var: start}))
        else:
            self.store(nest, Lanes(self.memory, env, var, start, n))

    def interleaved(self, nest: Nest, space: list[Iter]) -> Iter | None:
        """A dimension that loads walk contiguously, beside a last one of 2 to 4 elements."""
        last = space[-1]
        if last.size is None or not 2 <= last.size <= _NARROW or len(space) < 2:
            return None
        if len(nest.outs) != 1 or bare_use(nest, last.var):
            return None
        it, out = space[-2], nest.outs[0]
        if it.size is None or it.size < self.machine.lanes or bare_use(nest, it.var):
            return None
        index = self.memory.at(out.buffer, out.indices)[1]
        if static(stride(index, last.var)) != 1 or static(stride(index, it.var)) != last.size:
            return None
        steps = self.steps(nest, [out.value], it.var)
        return it if set(steps) <= {0, 1} and 1 in steps else None

    def interleave(
        self, nest: Nest, space: list[Iter], it: Iter, env: dict[Any, Any], parallel: bool
    ) -> None:
        """Vectors along `it`, one for each element of the last dimension, stored interleaved."""
        last, out = space[-1], nest.outs[0]
        assert last.size is not None
        columns = last.size

        def block(point: dict[Any, Any], start: Any, n: int) -> None:
            start = self.as_type(it.var, start)
            if n == 1:
                for j in range(columns):
                    self.vector(nest, {**point, it.var: start}, last.var, integer(j), 1)
                return
            parts = []
            for j in range(columns):
                here = {**point, last.var: self.as_type(last.var, integer(j))}
                parts.append(name(Lanes(self.memory, here, it.var, start, n).wide(out.value)))
            order = [k % columns * n + k // columns for k in range(n * columns)]
            buffer, index = self.memory.at(out.buffer, out.indices)
            zero = self.as_type(last.var, integer(0))
            first = Lanes(self.memory, {**point, it.var: start, last.var: zero})(index)
            first = sym.Analyzer().simplify(first)
            T.buffer_store(buffer, tirx.Shuffle(parts, order), [T.ramp(first, 1, n * columns)])

        with self.grid(space[:-2], parallel) as outer:
            point = {**env, **outer}
            self.across(it.extent, self.machine.lanes, lambda s, n: block(point, s, n))

    def transposed(self, nest: Nest, space: list[Iter]) -> tuple[Iter, list[Any]] | None:
        """A dimension that some loads walk contiguously instead of the last one, and them."""
        last = space[-1]
        if last.size is None or last.size < 2:
            return None
        bad = []
        for o in nest.outs:
            for n in loads(o.value):
                step = stride(self.memory.at(n.source, n.indices)[1], last.var)
                by = None if step is None else static(step)
                if by is None or not -1 <= by <= 4:
                    if step is None:
                        return None
                    bad.append(n)
        if not bad:
            return None
        for it in reversed(space[:-1]):
            if it.size is not None and it.size >= 4 and not bare_use(nest, it.var):
                steps = [stride(self.memory.at(n.source, n.indices)[1], it.var) for n in bad]
                if all(s is not None and static(s) == 1 for s in steps):
                    return it, bad
        return None

    def transpose(
        self,
        nest: Nest,
        space: list[Iter],
        blocked: tuple[Iter, list[Any]],
        env: dict[Any, Any],
        parallel: bool,
    ) -> None:
        """Blocks of one register by one register, transposed by shuffles."""
        along, bad = blocked
        last, side = space[-1], self.machine.lanes
        others = [it for it in space[:-1] if it is not along]
        rows = tirx.Var("block", "int64")
        outer = [*others]
        full = along.size // side if along.size else 0

        def block(point: dict[Any, Any], u: Any, nu: int, v: Any, nv: int) -> None:
            turned: list[list[Any]] = []
            for load in bad:
                lines = []
                for j in range(nv):
                    at = Lanes(self.memory, {**point, last.var: v + j}, along.var, u, nu)
                    line = at.wide(load) if nu > 1 else at(load)
                    if nu < side:
                        copies = [line] * -(-side // nu)
                        line = tirx.Shuffle(copies, list(range(side)))
                    lines.append(name(line))
                lines += [lines[-1]] * (side - nv)
                turned.append(turn(lines))
            for i in range(nu):

                def hook(load: Any, _: Lanes, i: int = i) -> Any:
                    for k, b in enumerate(bad):
                        if same(b, load):
                            line = turned[k][i]
                            if nv < side:
                                line = tirx.Shuffle([line], list(range(nv)))
                            return line
                    return None

                here = {**point, along.var: u + i}
                if nv == 1:
                    at = Lanes(self.memory, {**here, last.var: v}, hook=hook)
                else:
                    at = Lanes(self.memory, here, last.var, v, nv, hook)
                self.store(nest, at)

        def strip(point: dict[Any, Any], u: Any, nu: int) -> None:
            self.across(last.extent, side, lambda v, n: block(point, u, nu, v, n))

        if full:
            with self.grid([*outer, Iter(rows, integer(full))], parallel) as loop:
                u = loop.pop(rows)
                strip({**env, **loop}, u * side, side)
        if along.size and along.size % side:
            with self.grid(outer, parallel) as loop:
                strip({**env, **loop}, integer(full * side), along.size % side)


def turn(rows: list[Any]) -> list[Any]:
    """Transposes n vectors of n lanes: log2(n) rounds of interleaving row i with row i + n/2."""
    n = len(rows)
    half = n // 2
    low = [x for i in range(half) for x in (i, n + i)]
    high = [x for i in range(half, n) for x in (i, n + i)]
    for _ in range(n.bit_length() - 1):
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [name(tirx.Shuffle([a, b], order)) for a, b in pairs for order in (low, high)]
    return rows
