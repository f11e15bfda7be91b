"""Scatters on a GPU: a copy of the tensor, then the updates in the order of the indices.

Of updates to the same place the last one stays, as on CPUs: so one thread makes all the updates
that may meet. It is slow where many updates are of single elements, of which nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .elementwise import is_float
from .gpu_ir import attributes, flat, i64, items, product, slot

_RULES: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": lambda old, new: _select(old > new, old, new, tirx.Max),
    "min": lambda old, new: _select(old < new, old, new, tirx.Min),
}


def _select(first: Any, old: Any, new: Any, plain: Any) -> Any:
    """CUDA's own maxima and minima pass over NaN."""
    return tirx.Select(first, old, new) if is_float(old) else plain(old, new)


def elements(shape: list[Any], places: list[Any], axis: int, dtype: str, reduction: str) -> Any:
    """PrimFunc(x, indices int64, updates, y): indices along an axis, counted from zero, in range.

    A thread for every line of `places` along the axis.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        _, at, updates, y = _begin("scatter_elements", shape, places, places, dtype)
        lines = [*places[:axis], 1, *places[axis + 1 :]]
        with items(product(lines)) as line:
            index: list[Any] = []
            rest = line
            for extent in reversed(lines):
                index.insert(0, T.Bind(tirx.FloorMod(rest, product([extent]))))
                rest = T.Bind(tirx.FloorDiv(rest, product([extent])))
            with T.serial(i64(0), product([places[axis]])) as k:
                index[axis] = k
                source = T.Bind(_offset(index, places))
                target = list(index)
                target[axis] = slot(at[source])
                _store(y, T.Bind(_offset(target, shape)), slot(updates[source]), reduction)
    return builder.get()


def slices(shape: list[Any], places: list[Any], dtype: str, reduction: str) -> Any:
    """PrimFunc(x, indices int64, updates, y): ScatterND, indices counted from zero, in range.

    A thread for every element of a slice.
    """
    depth = int(places[-1])
    inner, count = shape[depth:], product(places[:-1])
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        _, at, updates, y = _begin("scatter_nd", shape, places, [*places[:-1], *inner], dtype)
        size = product(inner)
        with items(size) as column, T.serial(i64(0), count) as k:
            index = [slot(at[k * depth + i]) for i in range(depth)]
            start = T.Bind(_offset(index, shape[:depth]) * size + column)
            _store(y, start, slot(updates[k * size + column]), reduction)
    return builder.get()


def _begin(
    name: str, shape: list[Any], places: list[Any], updates: list[Any], dtype: str
) -> list[Any]:
    """Declares the function and its flat parameters, and copies the first to the last."""
    attributes(name)
    dims = [(shape, dtype), (places, "int64"), (updates, dtype), (shape, dtype)]
    args = [
        T.arg(n, T.buffer(s, t))
        for n, (s, t) in zip(("x", "indices", "updates", "y"), dims, strict=True)
    ]
    views = [flat(a, product(s)) for a, (s, _) in zip(args, dims, strict=True)]
    with items(product(shape)) as i:
        T.buffer_store(views[3], views[0][i], [i])
    return views


def _store(y: Any, at: Any, new: Any, reduction: str) -> None:
    T.buffer_store(y, _RULES[reduction](slot(y[at]), new), [at])


def _offset(index: list[Any], shape: list[Any]) -> Any:
    place: Any = i64(0)
    for i, extent in zip(index, shape, strict=True):
        place = place * product([extent]) + i
    return place
