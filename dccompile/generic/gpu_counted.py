"""Functions on a GPU whose output has as many rows as the data decide; see `counted`.

One block does all of it: rows come out in order and their number is exact. Each of its threads has
a run of neighbouring elements, so that sums of counts tell where its rows begin.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .counted import is_set
from .gpu_ir import (
    attributes,
    barrier,
    blocks_of,
    flat,
    i64,
    launch,
    parts,
    product,
    registers,
    shared,
    slot,
    when,
)

_THREADS = 1024


def nonzero(shape: list[Any], dtype: str, count: Any) -> Any:
    """PrimFunc(x, places int64 (rank, count), count): where x is not 0, in row-major order."""
    rank, total = len(shape), product(shape)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("nonzero")
        x = T.arg("x", T.buffer(shape, dtype))
        places = T.arg("places", T.buffer([rank, count], "int64"))
        found = T.arg("found", T.buffer((1,), "int64"))
        values, out = flat(x, total), flat(places, product([rank, count]))
        with launch(i64(1), _THREADS) as (_, t):
            each = T.Bind(parts(total, _THREADS))
            first = T.Bind(tirx.Cast("int64", t) * each)
            last = T.Bind(tirx.Min(first + each, total))
            mine = registers(1, "int64")
            T.buffer_store(mine, i64(0), [0])
            with T.serial(i64(0), tirx.Max(last - first, i64(0))) as i:
                with when(is_set(values[first + i], dtype)):
                    T.buffer_store(mine, mine[0] + 1, [0])
            before, rows = running_sum(mine[0], t, _THREADS, "int64")
            with when(tirx.EQ(t, 0)):
                T.buffer_store(found, rows, [0])
            at = registers(1, "int64")
            T.buffer_store(at, before, [0])
            with T.serial(i64(0), tirx.Max(last - first, i64(0))) as i:
                with when(is_set(values[first + i], dtype)):
                    rest: Any = first + i
                    for axis in reversed(range(rank)):
                        extent = tirx.Cast("int64", tirx.convert(shape[axis]))
                        place = T.Bind(tirx.FloorMod(rest, extent))
                        T.buffer_store(out, place, [rows * axis + at[0]])
                        rest = T.Bind(tirx.FloorDiv(rest, extent))
                    T.buffer_store(at, at[0] + 1, [0])
    return builder.get()


def running_sum(value: Any, t: Any, threads: int, dtype: str) -> tuple[Any, Any]:
    """The sum of the values of the threads before this one, and of all. Every thread comes here."""
    sums = shared(threads, dtype)
    own = slot(value)
    T.buffer_store(sums, own, [t])
    barrier()
    gap = 1
    while gap < threads:
        less = registers(1, dtype)
        T.buffer_store(less, tirx.const(0, dtype), [0])
        with when(t >= gap):
            T.buffer_store(less, sums[t - gap], [0])
        barrier()
        T.buffer_store(sums, sums[t] + less[0], [t])
        barrier()
        gap *= 2
    result = slot(sums[t] - own), slot(sums[threads - 1])
    barrier()  # TVM may give the same memory to what the block does next
    return result


def cumulative(shape: list[Any], axis: int, dtype: str, exclusive: bool, backward: bool) -> Any:
    """PrimFunc(x, y): running sums along an axis, a thread for every line."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("cumsum")
        source = T.arg("x", T.buffer(shape, dtype))
        target = T.arg("y", T.buffer(shape, dtype))
        a, b = flat(source, product(shape)), flat(target, product(shape))
        n, inner = product([shape[axis]]), product(shape[axis + 1 :])
        lines = product([*shape[:axis], *shape[axis + 1 :]])
        with launch(blocks_of(lines, 32), 32) as (block, t):
            line = T.Bind(block * 32 + tirx.Cast("int64", t))
            with when(line < lines):
                base = T.Bind(tirx.FloorDiv(line, inner) * n * inner + tirx.FloorMod(line, inner))
                total = registers(1, dtype)
                T.buffer_store(total, tirx.const(0, dtype), [0])
                with T.serial(i64(0), n) as i:
                    at = T.Bind(base + (n - 1 - i if backward else i) * inner)
                    value = slot(a[at])
                    if exclusive:
                        T.buffer_store(b, total[0], [at])
                    T.buffer_store(total, total[0] + value, [0])
                    if not exclusive:
                        T.buffer_store(b, total[0], [at])
    return builder.get()
