"""The k best of every row on a GPU, the best first, the earlier of equal ones before the later.

A thread for every value counts the values that come before its own: that is its place among the
best. The order is total, so that no two have the same place. A block holds 256 values of a row and
compares them with all others, 256 at a time in shared memory: n * n comparisons for a row of n.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .counted import wide
from .gpu_ir import (
    THREADS,
    attributes,
    barrier,
    blocks_of,
    flat,
    i32,
    i64,
    launch,
    parts,
    product,
    registers,
    shared,
    slot,
    when,
)
from .topk import Rank


def top(lead: list[Any], n: Any, k: Any, dtype: str, largest: bool) -> Any:
    """PrimFunc(x (*lead, n), values (*lead, k), places int64 (*lead, k)); NaN is the largest."""
    rows, count, most = product(lead), wide(n), wide(k)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("topk")
        source = T.arg("x", T.buffer([*lead, n], dtype))
        values = T.arg("values", T.buffer([*lead, k], dtype))
        places = T.arg("indices", T.buffer([*lead, k], "int64"))
        x = flat(source, product([rows, count]))
        best, place = flat(values, product([rows, most])), flat(places, product([rows, most]))
        rank = Rank(dtype, largest)
        groups = parts(count, THREADS)
        with launch(blocks_of(rows * groups, 1)) as (b, t):
            row = T.Bind(tirx.FloorDiv(b, groups))
            at = T.Bind(tirx.FloorMod(b, groups) * THREADS + tirx.Cast("int64", t))
            active = T.Bind(tirx.And(row < rows, at < count))
            own = registers(1, dtype)
            T.buffer_store(own, tirx.const(0, dtype), [0])
            with when(active):
                T.buffer_store(own, x[row * count + at], [0])
            before = preceding(
                lambda i: x[row * count + i], own[0], at, count, row < rows, t, dtype, rank
            )
            with when(tirx.And(active, before < most)):
                T.buffer_store(best, own[0], [row * most + before])
                T.buffer_store(place, at, [row * most + before])
    return builder.get()


def preceding(
    value: Any, own: Any, at: Any, count: Any, inside: Any, t: Any, dtype: str, rank: Rank,
    counts: Any = None,
) -> Any:  # fmt: skip
    """How many of `count` values come before `own`, that of place `at`.

    `value` gives the value of a place, `inside` whether there are values at all, `counts` which of
    them count. Every thread of the block comes here.
    """
    tile, before = shared(THREADS, dtype), registers(1, "int64")
    some = shared(THREADS, "bool") if counts is not None else None
    T.buffer_store(before, i64(0), [0])
    with T.serial(i64(0), parts(count, THREADS)) as i:
        start = T.Bind(i * THREADS)
        mine = T.Bind(start + tirx.Cast("int64", t))
        with when(tirx.And(inside, mine < count)):
            T.buffer_store(tile, value(mine), [t])
            if some is not None:
                T.buffer_store(some, counts(tile[t]), [t])
        barrier()
        size = T.Bind(tirx.Cast("int32", tirx.Min(count - start, i64(THREADS))))
        with when(inside), T.serial(i32(0), size) as j:
            other = slot(tile[j])
            # of values that are neither better, the first comes first
            one, zero = i64(1), i64(0)
            late = tirx.Select(rank.better(other, own), one, zero)
            early = tirx.Select(rank.better(own, other), zero, one)
            first = start + tirx.Cast("int64", j) < at
            ahead = slot(tirx.Select(first, early, late))
            if some is not None:
                ahead = tirx.Select(some[j], ahead, zero)
            T.buffer_store(before, before[0] + ahead, [0])
        barrier()
    return slot(before[0])
