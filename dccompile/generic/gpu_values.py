"""Expressions as a thread of a GPU computes them: alone, or for a few neighbours at once.

Maxima and minima of floats are selections, as on CPUs: CUDA's own pass over NaN. Elementary
functions are those of CUDA's library, whose errors are a few units in the last place.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, sym, tirx
from tvm.tirx.script import builder as T

from . import byte_table
from .elementwise import is_float
from .gpu_ir import put, registers, slot, take, when
from .lanes import (
    Hook,
    Lanes,
    Memory,
    children,
    loads,
    operation,
    same,
    static,
    stride,
    substitute,
    walk,
)
from .stages import Nest

_BINARY = ("Add", "Sub", "Mul", "Div", "EQ", "NE", "LT", "LE", "GT", "GE")


class Scalar(Lanes):
    """Evaluates expressions at one point; `env` gives the variables."""

    def __init__(self, memory: Memory, env: dict[Any, Any], hook: Hook | None = None) -> None:
        super().__init__(memory, env, hook=hook)

    def __call__(self, expr: Any) -> Any:
        kind = type(expr).__name__
        if kind in ("Max", "Min") and is_float(expr):
            a, b = self.bind(self(expr.a)), self.bind(self(expr.b))
            c, d = (_widened(v) for v in (a, b))
            return self.bind(tirx.Select(c > d if kind == "Max" else c < d, a, b))
        if kind in _BINARY and str(expr.a.ty) == "float16":
            sides = (_widened(self(side)) for side in (expr.a, expr.b))
            return _narrow(getattr(tirx, kind)(*sides))
        return super().__call__(expr)

    def bind(self, value: Any) -> Any:
        """Names a value; not under a condition, where its loads must not run early."""
        if self.guarded or isinstance(value, (ir.Var, tirx.IntImm, tirx.FloatImm)):
            return value
        return slot(value)

    def load(self, expr: Any) -> Any:
        if self.hook is not None:
            value = self.hook(expr, self)
            if value is not None:
                return value
        buffer, index = self.memory.at(expr.source, expr.indices)
        return buffer[sym.Analyzer().simplify(self(index))]

    def call(self, expr: Any) -> Any:
        name = operation(expr)
        if (found := byte_table.operands(expr)) is not None:
            table, start = self.memory.at(found[1], [tirx.const(0, "int64")])
            return table[start + tirx.Cast("int64", self(found[0]))]
        if name == "call_llvm_pure_intrin":
            return self(fenced(expr))
        if name in ("if_then_else", "likely"):
            return super().call(expr)
        args = [a if isinstance(a, ir.StringImm) else self(a) for a in expr.args]
        dtype = str(expr.ty.dtype)
        if any(str(a.ty) == "float16" for a in args if not isinstance(a, ir.StringImm)):
            args = [a if isinstance(a, ir.StringImm) else _widened(a) for a in args]
            dtype = "float32" if dtype == "float16" else dtype
            value = self.applied(name, expr.op, args, dtype)
            return _narrow(value) if str(expr.ty.dtype) == "float16" else value
        return self.applied(name, expr.op, args, dtype)

    def applied(self, name: str, op: Any, args: list[Any], dtype: str) -> Any:
        if name == "rsqrt":
            return tirx.const(1.0, dtype) / tirx.call_intrin(dtype, "tirx.sqrt", *args)
        if name == "sigmoid":
            one, x = tirx.const(1.0, dtype), args[0]
            return one / (one + tirx.call_intrin(dtype, "tirx.exp", tirx.const(0.0, dtype) - x))
        if name == "isnan":
            return tirx.call_intrin("bool", op, self.bind(args[0]))
        return tirx.call_intrin(dtype, op, *args)


def _widened(value: Any) -> Any:
    return tirx.Cast("float32", value) if str(value.ty) == "float16" else value


def _narrow(value: Any) -> Any:
    """A float16 is computed in float32, whose result is then rounded; a comparison stays."""
    return value if str(value.ty) == "bool" else tirx.Cast("float16", value)


def fenced(expr: Any) -> Any:
    """The operand of LLVM's arithmetic fence: nothing is contracted on a GPU.

    Raises NotImplementedError where the call is of another intrinsic.
    """
    args = [a for a in expr.args if not isinstance(a, (tirx.IntImm, ir.StringImm))]
    names = [str(getattr(a, "value", a)) for a in expr.args]
    if len(args) != 1:
        raise NotImplementedError(f"LLVM's {names} on a GPU")
    return args[0]


class Vector:
    """Values at `count` consecutive values of `variable`, from `start` on, a multiple of `count`.

    What lies side by side in memory is loaded and stored in one access.
    """

    def __init__(
        self, memory: Memory, env: dict[Any, Any], variable: Any, start: Any, count: int
    ) -> None:
        self.memory, self.env, self.variable = memory, env, variable
        self.start, self.count = start, count
        self.taken: list[tuple[Any, Any]] = []

    def point(self, k: int) -> dict[Any, Any]:
        here = self.start + k if k else self.start
        kind = str(self.variable.ty)
        here = here if str(here.ty) == kind else tirx.Cast(kind, here)
        return {**self.env, self.variable: here}

    def fetch(self, nest: Nest, values: list[Any]) -> None:
        """Loads what the values have side by side."""
        for load, guards in _distinct(guarded(values)):
            if nest.is_acc(load.source) or any(same(load, old) for old, _ in self.taken):
                continue
            if not aligned(self.memory, load, self.variable, self.count):
                continue
            if not all(self.uniform(test) for test, _ in guards):
                continue
            buffer, index = self.memory.at(load.source, load.indices)
            at = Scalar(self.memory, self.point(0))
            at.guarded = True
            dtype = str(buffer.ty.dtype.dtype)
            target = registers(self.count, dtype)
            nbytes = self.count * buffer.ty.dtype.dtype.itemsize
            tests = [at(t) if wanted else tirx.Not(at(t)) for t, wanted in guards]
            where = sym.Analyzer().simplify(at(index))
            if tests:
                with when(tirx.all(*tests)):
                    take(target, buffer, where, nbytes)
            else:
                take(target, buffer, where, nbytes)
            self.taken.append((load, target))

    def uniform(self, test: Any) -> bool:
        """Whether a condition is the same at all places."""
        if loads(test):
            return False
        analyzer = sym.Analyzer()
        base = tirx.Var("base", str(self.variable.ty))
        zero, most = (tirx.const(v, str(base.ty)) for v in (0, 1 << 30))
        analyzer.bind(base, ir.Range(zero, most))
        sides = []
        for k in range(self.count):
            at = Scalar(self.memory, {self.variable: base * self.count + k})
            at.guarded = True
            sides.append(analyzer.simplify(at(test)))
        return all(same(sides[0], s) for s in sides[1:])

    def at(self, k: int, hook: Hook | None = None) -> Scalar:
        """The evaluator of place `k`."""

        def found(load: Any, own: Lanes) -> Any:
            value = hook(load, own) if hook is not None else None
            if value is not None:
                return value
            for old, target in self.taken:
                if same(old, load):
                    return target[k]
            return None

        return Scalar(self.memory, self.point(k), found)

    def store(self, nest: Nest, hooks: list[Hook | None] | None = None) -> None:
        """Writes the results of all places."""
        values = []
        for k in range(self.count):
            at = self.at(k, hooks[k] if hooks else None)
            found = [at(o.value) for o in nest.outs]
            values.append([at.bind(v) for v in found] if len(found) > 1 else found)
        for i, out in enumerate(nest.outs):
            buffer, index = self.memory.at(out.buffer, out.indices)
            target = registers(self.count, str(buffer.ty.dtype.dtype))
            for k in range(self.count):
                T.buffer_store(target, values[k][i], [k])
            where = sym.Analyzer().simplify(Scalar(self.memory, self.point(0))(index))
            put(buffer, where, target, self.count * buffer.ty.dtype.dtype.itemsize)


def guarded(values: list[Any]) -> list[tuple[Any, list[tuple[Any, bool]]]]:
    """Every load, with the conditions under which it is evaluated."""
    found: list[tuple[Any, list[tuple[Any, bool]]]] = []

    def visit(expr: Any, guards: list[tuple[Any, bool]]) -> None:
        if type(expr).__name__ == "TensorLoad":
            found.append((expr, guards))
        if operation(expr) == "if_then_else":
            test, a, b = expr.args
            visit(test, guards)
            visit(a, [*guards, (test, True)])
            visit(b, [*guards, (test, False)])
            return
        for child in children(expr):
            visit(child, guards)

    for value in values:
        visit(value, [])
    return found


def _distinct(
    found: list[tuple[Any, list[tuple[Any, bool]]]],
) -> list[tuple[Any, list[tuple[Any, bool]]]]:
    """Every load once. Those that different conditions guard only if one is without any."""
    kept: list[tuple[Any, list[tuple[Any, bool]]]] = []
    for load, guards in found:
        others = [g for other, g in found if same(other, load)]
        if any(same(load, old) for old, _ in kept):
            continue
        if [] in others:
            kept.append((load, []))
        elif all(_equal(guards, g) for g in others):
            kept.append((load, guards))
    return kept


def _equal(a: list[tuple[Any, bool]], b: list[tuple[Any, bool]]) -> bool:
    return len(a) == len(b) and all(
        x[1] == y[1] and same(x[0], y[0]) for x, y in zip(a, b, strict=True)
    )


def aligned(memory: Memory, load: Any, variable: Any, count: int) -> bool:
    """Whether `count` elements from a multiple of `count` on lie side by side, aligned."""
    return _lined(*memory.at(load.source, load.indices), variable, count)


def lined(memory: Memory, out: Any, variable: Any, count: int) -> bool:
    """The same of what an Out stores."""
    return _lined(*memory.at(out.buffer, out.indices), variable, count)


def _lined(buffer: Any, index: Any, variable: Any, count: int) -> bool:
    if str(buffer.ty.storage_scope) in ("shared", "local"):
        return False
    if static(stride(index, variable)) != 1:
        return False
    base = tirx.Var("base", str(variable.ty))
    names = {variable: base * count}
    here = substitute(index, names)
    return multiple(here, count)


def multiple(expr: Any, n: int) -> bool:
    """Whether an integer is known to be a multiple of `n`."""
    rest = tirx.FloorMod(expr, tirx.const(n, str(expr.ty)))
    return bool(sym.Analyzer().can_prove_equal(rest, tirx.const(0, str(expr.ty))))


def widest(nest: Nest, memory: Memory, variable: Any) -> int:
    """Bytes of the largest element that an access walks side by side."""
    sizes = [o.buffer.ty.dtype.dtype.itemsize for o in nest.outs]
    for value in nest.values():
        for load in loads(value):
            if nest.is_acc(load.source):
                continue
            buffer, index = memory.at(load.source, load.indices)
            if static(stride(index, variable)) == 1:
                sizes.append(buffer.ty.dtype.dtype.itemsize)
    return max(sizes)


def looks_up(nest: Nest) -> bool:
    """Whether a value has a look-up in a table of bytes."""
    nodes = [n for v in nest.values() for n in walk(v) if type(n).__name__ == "Call"]
    return any(byte_table.operands(n) for n in nodes)
