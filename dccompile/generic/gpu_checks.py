"""Checked operands on a GPU: an error is reported, and what follows works on a safe value instead.

The same functions for CPUs are in `frontend.indexing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .elementwise import one
from .gpu_ir import attributes, flat, i64, items, product, report, slot, when


def indices(
    shape: list[Any], dtype: str, extents: list[Any], data: tuple[list[Any], str] | None,
    message: str,
) -> Any:  # fmt: skip
    """PrimFunc(indices, [data], checked int64): counted from zero; 0 where out of range.

    The last dimension of `indices` runs over the extents if there are several. `data`, shape and
    type, only tells the sizes. Reports `message` where an index is out of range.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("check_indices")
        source = T.arg("indices", T.buffer(shape, dtype))
        if data is not None:
            T.arg("data", T.buffer(*data))
        target = T.arg("checked", T.buffer(shape, "int64"))
        total = product(shape)
        given, out = flat(source, total), flat(target, total)
        with items(total) as at:
            column = T.Bind(tirx.FloorMod(at, i64(len(extents))))
            extent: Any = _wide(extents[-1])
            for k, size in enumerate(extents[:-1]):
                extent = tirx.Select(tirx.EQ(column, i64(k)), _wide(size), extent)
            extent = slot(extent)
            value = slot(tirx.Cast("int64", given[at]))
            fine = slot(tirx.And(value >= 0 - extent, value < extent))
            with when(tirx.Not(fine)):
                report(message)
            counted = value + tirx.Select(value < 0, extent, i64(0))
            T.buffer_store(out, tirx.Select(fine, counted, i64(0)), [at])
    return builder.get()


def _wide(value: Any) -> Any:
    return i64(value) if isinstance(value, int) else value


def division(
    left: list[Any], right: list[Any], shape: list[Any], dtype: str, quotient: bool,
    rule: Callable[[Any, Any], Any], message: str,
) -> Any:  # fmt: skip
    """PrimFunc(a, b, out): `rule` of integers that numpy would broadcast together.

    Reports `message` where the rule has no answer, and divides by 1 there.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("checked_division")
        args = [T.arg(n, T.buffer(s, dtype)) for n, s in (("a", left), ("b", right))]
        target = T.arg("out", T.buffer(shape, dtype))
        views = [flat(a, product(s)) for a, s in zip(args, (left, right), strict=True)]
        out = flat(target, product(shape))
        with items(product(shape)) as at:
            rest: Any = at
            index: list[Any] = []
            for extent in reversed(shape):
                index.insert(0, T.Bind(tirx.FloorMod(rest, _wide(extent))))
                rest = T.Bind(tirx.FloorDiv(rest, _wide(extent)))

            def value(view: Any, dims: list[Any]) -> Any:
                place: Any = i64(0)
                for i, d in zip(index[len(index) - len(dims) :], dims, strict=True):
                    place = place * _wide(d) + (i64(0) if one(d) else i)
                return slot(view[place])

            x, y = (value(v, s) for v, s in zip(views, (left, right), strict=True))
            zero, unit = tirx.const(0, dtype), tirx.const(1, dtype)
            fine: Any = tirx.NE(y, zero)
            if dtype.startswith("int"):
                minus = tirx.const(-1, dtype)
                if quotient:
                    least = tirx.min_value(dtype)
                    fine = tirx.And(fine, tirx.Or(tirx.NE(x, least), tirx.NE(y, minus)))
                else:
                    y = slot(tirx.Select(tirx.EQ(y, minus), unit, y))
            fine = slot(fine)
            with when(tirx.Not(fine)):
                report(message)
            T.buffer_store(out, rule(x, slot(tirx.Select(fine, y, unit))), [at])
    return builder.get()
