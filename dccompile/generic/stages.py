"""Reads a TensorIR PrimFunc as a short list of loop nests and merges what belongs together.

A nest computes one tensor, or the tensors of one reduction, over a box of iterations. Legalized
and fused Relax operators all have this form; library calls, sorting and scatters do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tvm import ir, s_tir, sym, tirx

from . import byte_table
from .fastmath import FAST
from .lanes import loads, operation, rebuild, same, static, substitute, uses, walk


class NotANest(Exception):
    """The function does not have the form that the generic schedule understands."""


@dataclass(frozen=True)
class Iter:
    """A block variable that runs from 0 to `extent`."""

    var: Any
    extent: Any

    @property
    def size(self) -> int | None:
        return static(self.extent)


@dataclass(frozen=True)
class Out:
    """`value` goes to `buffer[indices]`."""

    buffer: Any
    indices: list[Any]
    value: Any


@dataclass
class Nest:
    """`outs` over `space`; with `over`, after every `acc` went from init through all updates.

    In `updates` and `outs`, a load of an `acc` buffer means the accumulator. A nest without
    `over` has no accumulators.
    """

    name: str
    space: list[Iter]
    outs: list[Out]
    over: list[Iter] = field(default_factory=list)
    acc: list[Any] = field(default_factory=list)
    inits: list[Any] = field(default_factory=list)
    updates: list[Any] = field(default_factory=list)

    def values(self) -> list[Any]:
        """All expressions evaluated, the accumulators' loads left in."""
        return [*self.inits, *self.updates, *(o.value for o in self.outs)]

    def is_acc(self, buffer: Any) -> bool:
        return any(buffer.same_as(a) for a in self.acc)

    def accesses(self) -> list[tuple[Any, list[Any]]]:
        """Every (buffer, indices) read or written, accumulators apart."""
        found: list[tuple[Any, list[Any]]] = [(o.buffer, o.indices) for o in self.outs]
        for value in self.values():
            found += [
                (n.source, list(n.indices)) for n in loads(value) if not self.is_acc(n.source)
            ]
        return found

    def reads(self, buffer: Any) -> list[Any]:
        return [
            n
            for v in self.values()
            for n in loads(v)
            if n.source.same_as(buffer) and not self.is_acc(buffer)
        ]


def slow(expr: Any) -> bool:
    """Whether the expression takes long to compute: a division or an elementary function."""
    for node in walk(expr):
        if operation(node) in FAST or operation(node) == "pow":
            return True
        if type(node).__name__ in ("Div", "Mod", "FloorDiv", "FloorMod"):
            return True
    return False


def heavy(expr: Any) -> bool:
    """Whether recomputing the expression costs much more than loading its value."""
    looked_up = any(type(n).__name__ == "Call" and byte_table.operands(n) for n in walk(expr))
    return looked_up or slow(expr)


def read(func: tirx.PrimFunc) -> tuple[list[Nest], dict[Any, list[Any]]]:
    """Nests in order, and the shapes of the buffers that live inside the function.

    Raises NotANest.
    """
    root = func.body
    if type(root).__name__ != "SBlockRealize":
        raise NotANest("no root block")
    body = root.block.body
    parts = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    shapes = {b: list(b.ty.shape) for b in root.block.alloc_buffers}
    nests = [_looking_up(_nest(p), list(func.params)) for p in parts]
    return nests, shapes


def _looking_up(nest: Nest, params: list[Any]) -> Nest:
    """The nest with the look-ups in those of its parameters that are tables of bytes as calls."""

    def change(node: Any) -> Any:
        if type(node).__name__ != "TensorLoad" or not any(node.source.same_as(p) for p in params):
            return None
        call = byte_table.entry(node)
        return None if call is None else rebuild(call, change)

    return _mapped(nest, lambda expr: rebuild(expr, change))


def _nest(stmt: Any) -> Nest:
    loops: dict[Any, Any] = {}
    while isinstance(stmt, tirx.For):
        if stmt.kind != tirx.ForKind.SERIAL or static(stmt.min) != 0 or stmt.annotations:
            raise NotANest("a loop that is not a plain serial one")
        loops[stmt.loop_var] = stmt.extent
        stmt = stmt.body
    if not isinstance(stmt, s_tir.SBlockRealize):
        raise NotANest("loops around something other than one block")
    if static(stmt.predicate) != 1:
        raise NotANest("a block with a condition")
    block = stmt.block
    if block.alloc_buffers or block.match_buffers:
        raise NotANest("a block with buffers of its own")
    space: list[Iter] = []
    over: list[Iter] = []
    for axis, value in zip(block.iter_vars, stmt.iter_values, strict=True):
        if not (value in loops or (static(axis.dom.extent) == 1 and static(value) == 0)):
            raise NotANest("a block variable that is not a loop variable")
        kind = {tirx.IterVar.DataPar: space, tirx.IterVar.CommReduce: over}.get(axis.iter_type)
        if kind is None:
            raise NotANest("a loop whose order matters")
        kind.append(Iter(axis.var, axis.dom.extent))
    stores = _stores(block.body)
    if not over:
        if block.init is not None:
            raise NotANest("an initial value without a reduction")
        return Nest(block.name_hint, space, [Out(s.buffer, list(s.indices), v) for s, v in stores])
    inits = _stores(block.init) if block.init is not None else []
    if len(inits) != len(stores):
        raise NotANest("a reduction without initial values")
    acc = [s.buffer for s, _ in stores]
    for (a, _), (b, _) in zip(stores, inits, strict=True):
        if not a.buffer.same_as(b.buffer) or not all(map(same, a.indices, b.indices)):
            raise NotANest("a reduction that starts elsewhere")
    for s, v in stores:
        for n in loads(v):
            if any(n.source.same_as(a) for a in acc) and not all(map(same, n.indices, s.indices)):
                raise NotANest("a reduction that reads other elements of its result")
    outs = [Out(s.buffer, list(s.indices), tirx.BufferLoad(s.buffer, s.indices)) for s, _ in stores]
    return Nest(
        block.name_hint, space, outs, over, acc, [v for _, v in inits], [v for _, v in stores]
    )


def _stores(stmt: Any) -> list[tuple[Any, Any]]:
    """Stores of a block body with bound names put back into the values."""
    names: dict[Any, Any] = {}
    found = []
    for part in list(stmt.seq) if isinstance(stmt, tirx.SeqStmt) else [stmt]:
        if isinstance(part, tirx.Bind):
            names[part.var] = substitute(part.value, names)
        elif isinstance(part, tirx.BufferStore):
            found.append((part, substitute(part.value, names)))
        else:
            raise NotANest(f"a block with a {type(part).__name__}")
    return found


def merge(
    nests: list[Nest], inner: dict[Any, list[Any]], lazy: Callable[[Nest, Any], bool] | None = None
) -> list[Nest]:
    """Inlines cheap producers and gives reductions the elementwise work that follows them.

    `lazy` tells of a nest and a buffer whether it computes only those of the buffer's elements that
    it needs, each once: then producers are inlined whatever they cost.
    """

    def inline(nests: list[Nest], at: int, inner: dict[Any, list[Any]]) -> list[Nest] | None:
        return _inline(nests, at, inner, lazy)

    for step in (inline, _finish):
        at = 0
        while at < len(nests):
            new = step(nests, at, inner)
            if new is None:
                at += 1
            else:
                nests, at = new, 0
    return nests


def _plain(out: Out, space: list[Iter]) -> bool:
    """Whether a store goes to the element that its iteration names."""
    left = list(space)
    for i in out.indices:
        if left and i.same_as(left[0].var):
            left.pop(0)
        elif static(i) != 0:
            return False
    return all(it.size == 1 for it in left)


def _inline(
    nests: list[Nest],
    at: int,
    inner: dict[Any, list[Any]],
    lazy: Callable[[Nest, Any], bool] | None = None,
) -> list[Nest] | None:
    """Without nest `at`, computed where its result is used; None if that does not pay."""
    nest = nests[at]
    if nest.over or len(nest.outs) != 1 or not any(nest.outs[0].buffer.same_as(b) for b in inner):
        return None
    out = nest.outs[0]
    if not _plain(out, nest.space):
        return None
    users = [n for n in nests if n.reads(out.buffer)]
    times = sum(len(n.reads(out.buffer)) for n in users)
    costly = heavy(out.value)
    if costly and lazy is not None and len(users) == 1:
        costly = not lazy(users[0], out.buffer)
    if costly and (times > 1 or any(_size(n) != _size(nest) for n in users)):
        return None
    if len(walk(out.value)) * times > 400:
        return None

    def put(expr: Any) -> Any:
        def change(node: Any) -> Any:
            if type(node).__name__ != "TensorLoad" or not node.source.same_as(out.buffer):
                return None
            where = [put(i) for i in node.indices]
            values = {
                i: w for i, w in zip(out.indices, where, strict=True) if isinstance(i, ir.Var)
            }
            for it in nest.space:
                if it.var not in values:
                    values[it.var] = tirx.const(0, str(it.var.ty))
            return substitute(out.value, values)

        return rebuild(expr, change)

    result = []
    for n in nests:
        if n is nest:
            continue
        outs = [Out(o.buffer, [put(i) for i in o.indices], put(o.value)) for o in n.outs]
        result.append(
            replace(n, outs=outs, inits=[*map(put, n.inits)], updates=[*map(put, n.updates)])
        )
    return result


def _size(nest: Nest) -> int | str:
    """Iterations, comparable between nests."""
    total: Any = tirx.const(1, "int64")
    for it in [*nest.space, *nest.over]:
        total = total * tirx.Cast("int64", it.extent)
    return str(sym.Analyzer().simplify(total))


def _finish(nests: list[Nest], at: int, inner: dict[Any, list[Any]]) -> list[Nest] | None:
    """Reduction `at` with its only reader, an elementwise nest, as its last step."""
    nest = nests[at]
    if not nest.over or any(
        not o.buffer.same_as(a) for o, a in zip(nest.outs, nest.acc, strict=False)
    ):
        return None
    if not all(_plain(o, nest.space) for o in nest.outs):
        return None
    readers = [n for n in nests if any(n.reads(o.buffer) for o in nest.outs)]
    if len(readers) != 1 or readers[0].over or not all(o.buffer in inner for o in nest.outs):
        return None
    last = readers[0]
    between = nests[at + 1 : nests.index(last)]
    made = [o.buffer for n in between for o in n.outs]
    if any(last.reads(b) for b in made):
        return None
    space = [it for it in last.space if it.size != 1]
    mine = [it for it in nest.space if it.size != 1]
    if len(space) != len(mine) or not all(
        same(a.extent, b.extent) for a, b in zip(space, mine, strict=True)
    ):
        return None
    names = {a.var: b.var for a, b in zip(space, mine, strict=True)}
    for it in last.space:
        if it.size == 1:
            names[it.var] = tirx.const(0, str(it.var.ty))
    outs = []
    for o in last.outs:
        value = substitute(o.value, names)
        for n in loads(value):
            for own in nest.outs:
                if n.source.same_as(own.buffer) and not all(
                    map(_same_index, n.indices, own.indices, n.source.ty.shape)
                ):
                    return None
        outs.append(Out(o.buffer, [substitute(i, names) for i in o.indices], value))
    merged = replace(nest, outs=outs)
    return [merged if n is nest else n for n in nests if n is not last]


def _same_index(a: Any, b: Any, extent: Any) -> bool:
    return static(extent) == 1 or same(a, b)


def renamed(nest: Nest, names: dict[Any, Any]) -> Nest:
    """The nest with variables replaced."""
    return _mapped(nest, lambda expr: substitute(expr, names)) if names else nest


def _mapped(nest: Nest, put: Callable[[Any], Any]) -> Nest:
    """The nest with `put` of each of its expressions."""
    outs = [Out(o.buffer, [put(i) for i in o.indices], put(o.value)) for o in nest.outs]
    return replace(
        nest, outs=outs, inits=[*map(put, nest.inits)], updates=[*map(put, nest.updates)]
    )


def shared_prefix(nests: list[Nest], inner: dict[Any, list[Any]]) -> int:
    """Leading dimensions that all nests walk in step, so that they can run inside common loops.

    An element of an inner buffer must then be read only in the iteration that made it.
    """
    depth = 0
    most = max(len(n.space) for n in nests) - 1  # the last dimension is for lanes
    while depth < most and all(len(n.space) > depth for n in nests):
        extent = nests[0].space[depth].extent
        for n in nests:
            var = n.space[depth].var
            if not same(n.space[depth].extent, extent):
                return depth
            for buffer, indices in n.accesses():
                if buffer in inner and not (
                    len(indices) > depth and _at(indices[depth], var, extent)
                ):
                    return depth
            for o in n.outs:
                if o.buffer not in inner and any(m.reads(o.buffer) for m in nests):
                    return depth
        depth += 1
    return depth


def _at(index: Any, var: Any, extent: Any) -> bool:
    return index.same_as(var) or (static(extent) == 1 and static(index) == 0)


def bare_use(nest: Nest, var: Any) -> bool:
    """Whether a variable matters other than through the address of an access."""

    def bare(expr: Any) -> bool:
        kind = type(expr).__name__
        if kind == "TensorLoad":
            return False
        if isinstance(expr, ir.Var):
            return bool(expr.same_as(var))
        from .lanes import children

        return any(bare(c) for c in children(expr))

    return any(bare(v) for v in nest.values())


__all__ = ["Iter", "Nest", "NotANest", "Out", "bare_use", "merge", "read", "shared_prefix", "uses"]
