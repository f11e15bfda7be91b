"""Loops over boxes: what elementwise nests and reductions share when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import sym, tirx
from tvm.tirx.script import builder as T

from ..machine import Machine
from .lanes import Lanes, Memory, loads, local, static, stride, uses, walk
from .stages import Iter, Nest, bare_use, heavy, renamed, slow

SYMBOLIC = 32  # iterations assumed of a loop whose extent is known only at run time
LAUNCH_NS = 50_000.0  # work below this does not pay for waking other threads


def integer(value: int) -> Any:
    return tirx.const(value, "int64")


def count(iters: list[Iter]) -> int:
    return math.prod(SYMBOLIC if it.size is None else it.size for it in iters)


def cost(nest: Nest) -> float:
    """Rough single-thread nanoseconds."""
    total = count([*nest.space, *nest.over])
    if any(slow(v) for v in nest.values()):
        return total * 0.5
    if nest.over and len(loads(nest.updates[0])) > 2:
        return total * 0.03
    return total * 0.15


class Loops:
    """Emits nests into the open IRBuilder scope; `remarks` collects what stayed scalar."""

    def __init__(self, machine: Machine, memory: Memory) -> None:
        self.machine, self.memory = machine, memory
        self.remarks: list[str] = []

    @contextmanager
    def grid(self, iters: list[Iter], parallel: bool = False) -> Iterator[dict[Any, Any]]:
        """Loops over a box; yields the loop variables by block variable."""
        env: dict[Any, Any] = {}
        with ExitStack() as stack:
            rest = list(iters)
            if parallel and rest:
                fused: list[Iter] = []
                while rest and count(fused) < 64:
                    fused.append(rest.pop(0))
                total: Any = integer(1)
                for it in fused:
                    total = total * it.extent
                index = stack.enter_context(T.parallel(0, sym.Analyzer().simplify(total)))
                for it in reversed(fused[1:]):
                    env[it.var] = T.Bind(tirx.FloorMod(index, it.extent))
                    index = T.Bind(tirx.FloorDiv(index, it.extent))
                env[fused[0].var] = index
            for it in rest:
                if it.size == 1:
                    env[it.var] = integer(0)
                else:
                    env[it.var] = stack.enter_context(T.serial(0, it.extent))
            yield {v: self.as_type(v, e) for v, e in env.items()}

    @staticmethod
    def as_type(var: Any, value: Any) -> Any:
        return value if str(var.ty) == str(value.ty) else tirx.Cast(str(var.ty), value)

    def across(self, extent: Any, width: int, body: Callable[[Any, int], None]) -> None:
        """Calls body(start, lanes) for a loop of full vectors and for its peeled tail."""
        size = static(extent)
        if size is None:
            with T.serial(0, tirx.FloorDiv(extent, integer(width))) as i:
                body(i * width, width)
            left = sym.Analyzer().simplify(tirx.FloorMod(extent, integer(width)))
            if static(left) != 0:
                with T.serial(0, left) as i:
                    body(extent - left + i, 1)
            return
        full = size // width
        if full > 1:
            with T.serial(0, integer(full)) as i:
                body(i * width, width)
        elif full:
            body(integer(0), width)
        for start, n in self.tail(full * width, size, width):
            body(integer(start), n)

    def tail(self, start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
        """Pieces of the rest: halves of `width` down to one register, then the exact rest."""
        while start < end:
            while width > self.machine.lanes and width > end - start:
                width //= 2
            n = min(width, end - start)
            yield start, n
            start += n

    def width(self, nest: Nest) -> int:
        """Lanes that fill four registers of the widest type, two where temporaries abound."""
        sizes = [n.ty.dtype.itemsize for v in nest.values() for n in walk(v) if _is_value(n)]
        sizes += [o.buffer.ty.dtype.dtype.itemsize for o in nest.outs]
        registers = 2 if any(slow(v) for v in nest.values()) else 4
        if max(sizes) == 1 and any(heavy(v) for v in nest.values()):
            registers = 1  # a look-up is long
        return max(4, registers * self.machine.bits // 8 // max(sizes))

    def store(self, nest: Nest, at: Lanes) -> None:
        if any(str(o.value.ty) == "int64" for o in nest.outs):
            at = self.counted(nest, at)
        values = [at.wide(o.value) for o in nest.outs]
        if len(values) > 1:
            values = [at.bind(v) for v in values]
        for out, value in zip(nest.outs, values, strict=True):
            buffer, index = self.memory.at(out.buffer, out.indices)
            self.put(buffer, index, value, at)

    def counted(self, nest: Nest, at: Lanes) -> Lanes:
        """The same with loop variables that are stored as numbers read from registers.

        TVM narrows a loop variable of few values to int32, and a vector of it as well, which it
        then stores into the int64 buffer as it is.
        """

        def slot(value: Any) -> Any:
            buffer = local(1, str(value.ty))
            T.buffer_store(buffer, value, [0])
            return buffer[0]

        env = {v: slot(e) if bare_use(nest, v) else e for v, e in at.env.items()}
        start = at.start
        if at.variable is not None and bare_use(nest, at.variable):
            start = slot(start)
        return Lanes(self.memory, env, at.variable, start, at.count, at.hook)

    def put(self, buffer: Any, index: Any, value: Any, at: Lanes) -> None:
        point = Lanes(self.memory, at.point)
        start = sym.Analyzer().simplify(point(index))
        if at.count == 1:
            T.buffer_store(buffer, value, [start])
            return
        step = stride(index, at.variable)
        if step is None:
            T.buffer_store(buffer, value, [at(index)])
        else:
            T.buffer_store(buffer, value, [tirx.Ramp(start, point(step), at.count)])

    def fused(self, nest: Nest, space: list[Iter]) -> tuple[Nest, list[Iter]]:
        """Drops unit dimensions and joins neighbours that every access walks as one."""
        ones = {it.var: tirx.const(0, str(it.var.ty)) for it in space if it.size == 1}
        nest = renamed(nest, ones)
        space = [it for it in space if it.size != 1]
        done: list[Iter] = []
        for it in reversed(space):
            if done and self.joinable(nest, it, done[0]):
                nest = renamed(nest, {it.var: tirx.const(0, str(it.var.ty))})
                extent = sym.Analyzer().simplify(it.extent * done[0].extent)
                done[0] = Iter(done[0].var, extent)
            else:
                done.insert(0, it)
        return nest, done

    def joinable(self, nest: Nest, outer: Iter, inner: Iter) -> bool:
        if bare_use(nest, outer.var) or bare_use(nest, inner.var):
            return False
        for buffer, indices in nest.accesses():
            index = self.memory.at(buffer, indices)[1]
            a, b = stride(index, outer.var), stride(index, inner.var)
            if a is None or b is None or uses(a, inner.var) or uses(b, outer.var):
                return False
            if not sym.Analyzer().can_prove_equal(a, b * inner.extent):
                return False
        return True

    def steps(self, nest: Nest, values: list[Any], var: Any) -> list[int | None]:
        """Strides of a variable in every load of `values`; None where unknown."""
        found = []
        for value in values:
            for n in loads(value):
                if not nest.is_acc(n.source):
                    step = stride(self.memory.at(n.source, n.indices)[1], var)
                    found.append(None if step is None else static(step))
        return found


def _is_value(node: Any) -> bool:
    return type(node).__name__ in ("TensorLoad", "Cast", "Add", "Mul", "Select")
