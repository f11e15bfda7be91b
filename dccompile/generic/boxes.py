"""Cuts a nest into boxes in which its conditions are decided."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from tvm import ir, sym, tirx

from .lanes import loads, operation, rebuild, static, uses, walk
from .stages import Iter, Nest, Out, renamed


def split(nest: Nest, space: list[Iter]) -> tuple[int, list[tuple[Nest, list[Iter]]]]:
    """Cuts a nest where its conditions change, and resolves them.

    A condition of a reduction may depend on a dimension reduced over, too, as that of a window over
    padding: it is cut where it begins to hold, and where it ceases to, for the whole window.

    Returns how many leading dimensions have no cut, and the parts: padding, concatenation and
    slicing become plain copies.
    """
    cuts: dict[Any, set[int]] = {it.var: set() for it in space}
    sizes = {it.var: it.size or 0 for it in space}  # 0: symbolic
    for value in nest.values():
        for node in walk(value):
            if type(node).__name__ in ("LT", "LE", "GT", "GE", "EQ", "NE"):
                _cut(node, cuts, sizes, nest.over)
    edges = {
        v: [0, *sorted(c for c in found if 0 < c < sizes[v]), sizes[v]]
        for v, found in cuts.items()
        if found and sizes[v]
    }
    while edges and math.prod(len(e) - 1 for e in edges.values()) > 64:
        del edges[max(edges, key=lambda v: len(edges[v]))]
    lead = next((i for i, it in enumerate(space) if it.var in edges), len(space))
    parts: list[tuple[dict[Any, Any], list[Iter]]] = [({}, [])]
    for it in space:
        ranges = edges.get(it.var)
        if ranges is None:
            parts = [(names, [*iters, it]) for names, iters in parts]
            continue
        parts = [
            ({**names, it.var: it.var + lo} if lo else names,
             [*iters, Iter(it.var, tirx.const(hi - lo, str(it.var.ty)))])
            for names, iters in parts
            for lo, hi in itertools.pairwise(ranges)
        ]  # fmt: skip
    result = []
    for names, iters in parts:
        analyzer = sym.Analyzer()
        for it in [*iters, *nest.over]:
            if it.size is not None:
                analyzer.bind(it.var, ir.Range(tirx.const(0, str(it.var.ty)), it.extent))
        part = renamed(nest, names)
        outs = [Out(o.buffer, o.indices, resolve(o.value, analyzer)) for o in part.outs]
        inits, updates = ([resolve(v, analyzer) for v in vs] for vs in (part.inits, part.updates))
        result.append((replace(part, outs=outs, inits=inits, updates=updates), iters))
    return lead, result


def _cut(node: Any, cuts: dict[Any, set[int]], sizes: dict[Any, int], over: list[Iter]) -> None:
    """Adds the places where a comparison of one loop variable with a constant changes."""
    if str(node.a.ty) not in ("int32", "int64"):
        return
    difference = sym.Analyzer().simplify(node.a - node.b)
    names = [v for v in cuts if uses(difference, v)]
    if len(names) != 1 or not sizes[names[0]] or loads(difference):
        return
    inner = [it for it in over if uses(difference, it.var)]
    linear = sym.detect_linear_equation(difference, [*names, *(it.var for it in inner)])
    steps = [static(part) for part in linear]
    if len(steps) != 2 + len(inner) or None in steps or not steps[0]:
        return
    by, *rates, offset = (int(step or 0) for step in steps)
    reach = [0, 0]  # least and most that the dims reduced over add
    for rate, it in zip(rates, inner, strict=True):
        if it.size is None:
            return
        reach[rate > 0] += rate * (it.size - 1)
    for extra in reach:
        zero, exact = divmod(-(offset + extra), by)
        cuts[names[0]] |= {zero, zero + 1} if exact == 0 else {zero + 1}


def resolve(expr: Any, analyzer: Any) -> Any:
    """Decides conditions that hold, or fail, everywhere."""

    def change(node: Any) -> Any:
        kind = type(node).__name__
        if kind == "Select":
            parts = (node.condition, node.true_value, node.false_value)
        elif kind == "Call" and operation(node) == "if_then_else":
            parts = tuple(node.args)
        else:
            return None
        if loads(parts[0]):
            return None
        test = analyzer.simplify(parts[0])
        if isinstance(test, tirx.IntImm):
            return resolve(parts[1] if test.value else parts[2], analyzer)
        return None

    return rebuild(expr, change)
