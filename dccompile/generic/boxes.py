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
    """Cuts an elementwise nest where its conditions change, and resolves them.

    Returns how many leading dimensions have no cut, and the parts: padding, concatenation and
    slicing become plain copies.
    """
    cuts: dict[Any, set[int]] = {it.var: set() for it in space}
    sizes = {it.var: it.size or 0 for it in space}  # 0: symbolic
    for value in nest.values():
        for node in walk(value):
            if type(node).__name__ in ("LT", "LE", "GT", "GE", "EQ", "NE"):
                _cut(node, cuts, sizes)
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
        for it in iters:
            if it.size is not None:
                analyzer.bind(it.var, ir.Range(tirx.const(0, str(it.var.ty)), it.extent))
        part = renamed(nest, names)
        outs = [Out(o.buffer, o.indices, resolve(o.value, analyzer)) for o in part.outs]
        result.append((replace(part, outs=outs), iters))
    return lead, result


def _cut(node: Any, cuts: dict[Any, set[int]], sizes: dict[Any, int]) -> None:
    """Adds the places where a comparison of one loop variable with a constant changes."""
    if str(node.a.ty) not in ("int32", "int64"):
        return
    difference = sym.Analyzer().simplify(node.a - node.b)
    names = [v for v in cuts if uses(difference, v)]
    if len(names) != 1 or not sizes[names[0]] or loads(difference):
        return
    linear = sym.detect_linear_equation(difference, names)
    if len(linear) != 2 or static(linear[0]) not in (1, -1) or static(linear[1]) is None:
        return
    zero = -int(linear[1].value) * int(linear[0].value)
    cuts[names[0]] |= {zero, zero + 1}


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
