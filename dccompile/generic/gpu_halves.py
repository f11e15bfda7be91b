"""Reductions of much to little in two steps, so that more than one block works on them.

The outer dimensions that are reduced over are kept at first: partial results go to a tensor of
their own, which a second reduction reads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import tirx

from .lanes import loads, rebuild, same
from .loops import count
from .reductions import operands
from .stages import Iter, Nest, Out

_RESULTS = 64  # of a reduction, for which its blocks are too few
_STEPS = 1 << 12  # from which two launches take less than one
_PARTS = 64


def halves(nest: Nest) -> tuple[list[Nest], Any]:
    """The nest alone and None, or two that make the same, and the buffer between them."""
    over = [it for it in nest.over if it.size != 1]
    terms = operands(nest)
    if len(nest.acc) != 1 or len(over) < 2 or terms is None:
        return [nest], None
    if count(nest.space) > _RESULTS or count(over) < _STEPS:
        return [nest], None
    outer: list[Iter] = []
    while len(over) > 1 and count(outer) < _PARTS:
        outer.append(over.pop(0))
    kept = [*nest.space, *outer]
    own = nest.acc[0]
    shape = [tirx.Cast("int64", it.extent) for it in kept]
    buffer = tirx.decl_buffer(shape, str(own.ty.dtype.dtype), f"{nest.name}_parts")
    place = [it.var for it in kept]
    load = next(n for o in nest.outs for n in loads(o.value) if n.source.same_as(own))
    ones = [it for it in nest.over if it.size == 1]
    first = replace(nest, space=kept, over=[*ones, *over], outs=[Out(buffer, place, load)])
    part = tirx.BufferLoad(buffer, place)

    def change(node: Any) -> Any:
        return part if same(node, terms[0]) else None

    updates = [rebuild(u, change) for u in nest.updates]
    return [first, replace(nest, over=outer, updates=updates)], buffer
