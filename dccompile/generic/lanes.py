"""Turns scalar TIR expressions into expressions on several lanes of one loop variable.

TVM's own vectorizer gives up on conditions and library calls and reads strided memory lane by
lane. This one decides per load: contiguous, shuffled from contiguous, or gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.tirx.script import builder as T

from . import byte_table
from .fastmath import FAST, cast, lanes

_BINARY = (
    "Add Sub Mul Div Mod FloorDiv FloorMod Min Max EQ NE LT LE GT GE And Or "
    "LShift RShift BitwiseAnd BitwiseOr BitwiseXor"
).split()
# Calls that the code generator takes on whole vectors.
_WIDE = set(
    (
        "round nearbyint floor ceil trunc fabs sqrt isnan bitwise_and bitwise_or bitwise_xor "
        "bitwise_not shift_left shift_right popcount reinterpret likely sin cos exp2 log2 log10 "
        "exp log"
    ).split()
)

ON_STACK = {"disable_lower_builtin": tirx.const(True, "bool")}

# (load, evaluator) -> the value to use instead of the load, or None.
Hook = Callable[[Any, "Lanes"], Any]


def static(expr: Any) -> int | None:
    """The value of a constant integer expression."""
    return int(expr.value) if isinstance(expr, tirx.IntImm) else None


def same(a: Any, b: Any) -> bool:
    return tvm_ffi.structural_equal(a, b)


def children(expr: Any) -> list[Any]:
    """Direct sub-expressions, a load's indices included."""
    kind = type(expr).__name__
    if kind in _BINARY:
        return [expr.a, expr.b]
    if kind == "TensorLoad":
        return list(expr.indices)
    if kind == "Call":
        return [a for a in expr.args if not isinstance(a, ir.StringImm)]
    if kind == "Select":
        return [expr.condition, expr.true_value, expr.false_value]
    if kind == "Cast":
        return [expr.value]
    if kind in ("Not", "BitwiseNot"):
        return [expr.a]
    if kind == "Let":
        return [expr.value, expr.body]
    return []


def walk(expr: Any) -> list[Any]:
    """All nodes of an expression, parents first."""
    found = [expr]
    for node in found:
        found.extend(children(node))
    return found


def operation(expr: Any) -> str:
    """The name of the operator that a call applies, without its dialect; "" for other nodes."""
    op = getattr(expr, "op", None)
    return op.name.rpartition(".")[2] if isinstance(op, ir.Op) else ""


def loads(expr: Any) -> list[Any]:
    return [n for n in walk(expr) if type(n).__name__ == "TensorLoad"]


def uses(expr: Any, variable: Any) -> bool:
    return any(n.same_as(variable) for n in walk(expr))


def rebuild(expr: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with `change(node)` in place of every node for which it is not None."""
    new = change(expr)
    if new is not None:
        return new
    old = children(expr)
    if not old:
        return expr
    parts = [rebuild(c, change) for c in old]
    if all(a.same_as(b) for a, b in zip(old, parts, strict=True)):
        return expr
    kind = type(expr).__name__
    if kind in _BINARY:
        return getattr(tirx, kind)(*parts)
    if kind == "TensorLoad":
        return tirx.BufferLoad(expr.source, parts)
    if kind == "Call":
        it = iter(parts)
        args = [a if isinstance(a, ir.StringImm) else next(it) for a in expr.args]
        return tirx.call_intrin(str(expr.ty), expr.op, *args)
    if kind == "Select":
        return tirx.Select(*parts)
    if kind == "Cast":
        return tirx.Cast(str(expr.ty), parts[0])
    if kind in ("Not", "BitwiseNot"):
        return getattr(tirx, kind)(parts[0])
    return tirx.Let(expr.var, *parts)


def substitute(expr: Any, values: dict[Any, Any]) -> Any:
    """Replaces variables by expressions."""
    if not values:
        return expr
    return rebuild(expr, lambda n: values.get(n) if isinstance(n, ir.Var) else None)


def flat_index(indices: Any, shape: Any) -> Any:
    """Row-major offset of an element, int64."""
    index: Any = tirx.const(0, "int64")
    for i, extent in zip(indices, shape, strict=True):
        index = index * tirx.Cast("int64", extent) + tirx.Cast("int64", i)
    return sym.Analyzer().simplify(index)


def stride(index: Any, variable: Any) -> Any:
    """Coefficient of a variable in a flat index; None where the index is not linear in it."""
    if not uses(index, variable):
        return tirx.const(0, "int64")
    linear = sym.detect_linear_equation(index, [variable])
    return linear[0] if len(linear) == 2 else None


def local(size: int, dtype: str) -> Any:
    """A buffer in registers or on the stack, if `stack.build` compiles it.

    Without the annotation TVM allocates it with a call of its runtime, in every iteration of a
    parallel loop.
    """
    return T.alloc_buffer((size,), dtype, scope="local", annotations=ON_STACK)


def name(value: Any) -> Any:
    """Computes a value once.

    Conditions on lanes stay unnamed: TVM's analyzer refuses them. A value with a Select goes
    through a local buffer, which becomes a register: the analyzer follows chains of names, in
    time that grows sixfold with every Select.
    """
    n, dtype = lanes(value), value.ty.dtype
    if n > 1 and dtype.startswith("bool"):
        return value
    if not any(isinstance(x, tirx.Select) for x in walk(value)):
        return T.Bind(value)
    where = T.ramp(0, 1, n) if n > 1 else 0
    buffer = local(n, str(dtype.with_lanes(1)))
    T.buffer_store(buffer, value, [where])
    return buffer[where]


class Memory:
    """Flat views of the buffers that a function's old loads and stores name.

    `bits` is the width of the machine's vectors.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.views: dict[Any, tuple[Any, list[Any], int]] = {}

    def add(self, old: Any, flat: Any, shape: list[Any], dropped: int = 0) -> None:
        """`flat` holds `old` without its first `dropped` dimensions."""
        self.views[old] = (flat, shape, dropped)

    def at(self, old: Any, indices: Any) -> tuple[Any, Any]:
        """Flat buffer and offset of an element, in the old variables."""
        flat, shape, dropped = self.views[old]
        return flat, flat_index(list(indices)[dropped:], shape[dropped:])


class Lanes:
    """Evaluates expressions at `count` consecutive values of `variable`, from `start` on.

    `env` gives the other variables. A result that does not depend on `variable` stays scalar;
    `wide` spreads it.
    """

    def __init__(
        self,
        memory: Memory,
        env: dict[Any, Any],
        variable: Any = None,
        start: Any = None,
        count: int = 1,
        hook: Hook | None = None,
    ) -> None:
        self.memory, self.env, self.hook = memory, env, hook
        self.variable, self.start, self.count = variable, start, count
        self.point = {**env, variable: start} if variable is not None else env
        self.guards: list[tuple[Any, bool]] = []
        self.guarded = False

    def wide(self, expr: Any) -> Any:
        value = self(expr)
        if self.count > 1 and lanes(value) == 1:
            return tirx.Broadcast(value, self.count)
        return value

    def bind(self, value: Any) -> Any:
        """Names a value; not under a condition, where its loads must not run early."""
        if self.guarded or isinstance(value, (ir.Var, tirx.IntImm, tirx.FloatImm)):
            return value
        return name(value)

    def __call__(self, expr: Any) -> Any:
        kind = type(expr).__name__
        if isinstance(expr, ir.Var):
            if self.variable is not None and expr.same_as(self.variable) and self.count > 1:
                return tirx.Ramp(self.start, tirx.const(1, str(expr.ty)), self.count)
            return self.point.get(expr, expr)
        if kind in ("IntImm", "FloatImm"):
            return expr
        if kind in _BINARY:
            return getattr(tirx, kind)(*self.level(self(expr.a), self(expr.b)))
        if kind == "Cast":
            return cast(self(expr.value), str(expr.ty))
        if kind in ("Not", "BitwiseNot"):
            return getattr(tirx, kind)(self(expr.a))
        if kind == "Let":
            value = self.bind(self(expr.value))
            old, self.point = self.point, {**self.point, expr.var: value}
            result = self(expr.body)
            self.point = old
            return result
        if kind == "TensorLoad":
            return self.load(expr)
        if kind == "Select":
            return self.select(*(self(c) for c in children(expr)))
        if kind == "Call":
            return self.call(expr)
        raise NotImplementedError(f"expression node {kind}")

    def level(self, *values: Any) -> list[Any]:
        """Spreads scalars where some other value is a vector."""
        n = max(lanes(v) for v in values)
        return [tirx.Broadcast(v, n) if lanes(v) < n else v for v in values]

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        a, b = self.level(a, b)
        if lanes(condition) == 1 and lanes(a) > 1:
            condition = tirx.Broadcast(condition, lanes(a))
        if lanes(condition) > 1:
            condition, a, b = self.level(condition, a, b)
        return self.bind(tirx.Select(condition, a, b))

    def call(self, expr: Any) -> Any:
        name = operation(expr)
        if name == "if_then_else":
            return self.branch(*expr.args)
        if name == "likely":
            return self(expr.args[0])
        if (found := byte_table.operands(expr)) is not None:
            table, _ = self.memory.at(found[1], [0])
            return byte_table.look_up(table, self.bind(self(found[0])), self.memory.bits, self.bind)
        dtype = expr.ty.dtype
        args = [a if isinstance(a, ir.StringImm) else self(a) for a in expr.args]
        if name in FAST and dtype == "float32":
            return FAST[name](self.bind(args[0]), self.bind)
        if name == "rsqrt":
            (x,) = args
            root = tirx.call_intrin(str(x.ty), "tirx.sqrt", x)
            return self.level(tirx.const(1.0, str(dtype)), root)[0] / root
        n = max((lanes(a) for a in args if not isinstance(a, ir.StringImm)), default=1)
        if n == 1:
            return tirx.call_intrin(str(dtype), expr.op, *args)
        if name in _WIDE:
            return tirx.call_intrin(f"{dtype}x{n}", expr.op, *self.level(*args))
        args = [a if isinstance(a, ir.StringImm) or lanes(a) == 1 else self.bind(a) for a in args]

        def lane(arg: Any, k: int) -> Any:
            if isinstance(arg, ir.StringImm) or lanes(arg) == 1:
                return arg
            return tirx.Shuffle([arg], [k])

        each = [
            tirx.call_intrin(str(dtype), expr.op, *(lane(a, k) for a in args)) for k in range(n)
        ]
        return tirx.Shuffle(each, list(range(n)))

    def branch(self, condition: Any, a: Any, b: Any) -> Any:
        """if_then_else: the loads of the branch not taken must not happen."""
        test = self(condition)
        if isinstance(test, tirx.IntImm):
            return self(a if test.value else b)
        safe = not (loads(a) or loads(b))
        if safe:
            return self.select(test, self(a), self(b))
        before, self.guarded = self.guarded, True
        if lanes(test) == 1:
            values = self.level(self(a), self(b))
            self.guarded = before
            return tirx.if_then_else(test, *values)
        sides = []
        for wanted, side in ((True, a), (False, b)):
            self.guards.append((condition, wanted))
            sides.append(self(side))
            self.guards.pop()
        self.guarded = before
        return self.select(test, *sides)

    def load(self, expr: Any) -> Any:
        if self.hook is not None:
            value = self.hook(expr, self)
            if value is not None:
                return value
        buffer, index = self.memory.at(expr.source, expr.indices)
        step = tirx.const(0, "int64") if self.count == 1 else stride(index, self.variable)
        if self.count > 1 and (step is None or self.guards):
            return self.gathered(expr)
        start = Lanes(self.memory, self.point)(index)
        start = sym.Analyzer().simplify(start)
        by = static(step)
        if by == 0:
            return buffer[start]
        if by == 1:
            return buffer[T.ramp(start, 1, self.count)]
        if by is not None and 2 <= by <= 4:
            return self.strided(buffer, start, by)
        if by == -1:
            block = buffer[T.ramp(start - (self.count - 1), 1, self.count)]
            return tirx.Shuffle([block], list(range(self.count - 1, -1, -1)))
        return buffer[tirx.Ramp(start, Lanes(self.memory, self.point)(step), self.count)]

    def gathered(self, expr: Any) -> Any:
        """Lane by lane, each under the conditions on its own lane."""
        parts = []
        for k in range(self.count):
            at = self.as_type(self.start + k)
            one = Lanes(self.memory, {**self.env, self.variable: at})
            one.guarded = True
            value = one(expr)
            for test, wanted in self.guards:
                condition = one(test) if wanted else tirx.Not(one(test))
                value = tirx.if_then_else(condition, value, tirx.const(0, str(value.ty)))
            parts.append(value)
        return tirx.Shuffle(parts, list(range(self.count)))

    def as_type(self, value: Any) -> Any:
        kind = str(self.variable.ty)
        return value if str(value.ty) == kind else tirx.Cast(kind, value)

    def strided(self, buffer: Any, start: Any, by: int) -> Any:
        """Every `by`-th element out of contiguous vectors that end at the last one needed."""
        n = self.count
        span = by * (n - 1) + 1
        starts = [*range(0, span - n, n), span - n]
        parts = [buffer[T.ramp(start + s, 1, n)] for s in starts]
        order = []
        for k in range(n):
            position = k * by
            part = next(i for i, s in enumerate(starts) if s <= position < s + n)
            order.append(part * n + position - starts[part])
        return tirx.Shuffle(parts, order)
