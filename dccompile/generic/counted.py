"""Functions whose output has as many rows as the data decide.

The output buffer has room for the most rows there can be. A function writes it as a row-major
tensor of the rows there are, and their number to its last output, int64 (1,).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import local


def i64(value: int) -> Any:
    return tirx.const(value, "int64")


def size(shape: list[Any]) -> Any:
    """Elements of a shape, an int64 expression."""
    total: Any = i64(1)
    for extent in shape:
        total = total * extent
    return total


def attributes(name: str) -> None:
    """What marks a function as written by hand: nothing fuses or schedules it."""
    T.func_name(name)
    T.func_attr({"tirx.noalias": True, "op_pattern": 8, "dcc.kernel": name})


def nonzero(shape: list[Any], dtype: str, count: Any) -> Any:
    """PrimFunc(x, places int64 (rank, count), count): where x is not 0, in row-major order."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("nonzero")
        x = T.arg("x", T.buffer(shape, dtype))
        places = T.arg("places", T.buffer([len(shape), count], "int64"))
        found = T.arg("found", T.buffer((1,), "int64"))
        with T.sblock("root"):
            flat = T.decl_buffer((size(shape),), dtype, data=tirx.buffer_data(x))
            room = size([len(shape), count])
            out = T.decl_buffer((room,), "int64", data=tirx.buffer_data(places))
            total, at = local(1, "int64"), local(1, "int64")
            T.buffer_store(total, i64(0), [0])
            with T.serial(i64(0), size(shape)) as i:
                hit = is_set(flat[i], dtype)
                T.buffer_store(total, total[0] + tirx.Select(hit, i64(1), i64(0)), [0])
            rows = T.Bind(total[0])
            T.buffer_store(found, rows, [0])
            T.buffer_store(at, i64(0), [0])
            with ExitStack() as loops:
                index = [loops.enter_context(T.serial(i64(0), wide(d))) for d in shape]
                with T.If(is_set(x[tuple(index)], dtype)), T.Then():
                    here = T.Bind(at[0])
                    for axis, i in enumerate(index):
                        T.buffer_store(out, i, [rows * axis + here])
                    T.buffer_store(at, here + 1, [0])
    return builder.get()


def is_set(value: Any, dtype: str) -> Any:
    """Whether a value is not 0. TVM's comparison says of NaN that it is not unequal."""
    if dtype == "bool":
        return value
    differs = value != tirx.const(0, dtype)
    return tirx.Or(differs, tirx.isnan(value)) if dtype.startswith("float") else differs


def wide(value: Any) -> Any:
    return i64(value) if isinstance(value, int) else value
