"""Gather and integer division: the operators that could read or trap outside their operands.

Indices known at compile time are checked then. Others go through a small function that raises a
data error, and whose output, the indices counted from zero, is what the reading operator uses.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dccompile.generic import gpu_checks, gpu_scatter
from dccompile.generic.elementwise import broadcast, one

from .operator_tools import Converter, Node, constant, dtype_of, shape_of
from .symbolic import literal


def _size(shape: list[Any]) -> Any:
    total: Any = tirx.const(1, "int64")
    for extent in shape:
        total = total * extent
    return total


def _fail_unless(condition: Any, message: str) -> None:
    # AssertStmt's constructor hands its first two arguments on in the order condition, kind.
    T.add_to_parent(tirx.AssertStmt(condition, StringImm("ValueError"), [StringImm(message)]))


def checked_indices(node: Node, indices: Any, data: Any, axes: list[int]) -> Any:
    """Indices into `axes` of `data`, the last dimension of `indices` running over the axes if
    there are several: int64, counted from zero, in range or an error."""
    extents = [shape_of(data)[a] for a in axes]
    known = constant(indices)
    if known is not None and all(isinstance(e, int) for e in extents):
        return literal(_constant_indices(node, known, extents))
    kind = dtype_of(indices)
    shape = shape_of(indices)
    several = len(axes) > 1
    first = extents[0]
    rows = f"{first} rows" if len(axes) == 1 and isinstance(first, int) else "what it indexes"
    message = (
        f"DC2110: {node.where}: an index is outside {rows}; indices must be from -rows to rows - 1"
    )
    symbolic = any(not isinstance(e, int) for e in extents)
    args = [indices, data] if symbolic else [indices]
    if node.symbols.gpu:
        sizes = (shape_of(data), dtype_of(data)) if symbolic else None
        func = gpu_checks.indices(shape, kind, extents, sizes, message)
        return node.call(func, "check_indices", args, relax.TensorType(shape, "int64"))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("check_indices")
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "dcc.kernel": "check_indices"})
        source = T.arg("indices", T.buffer(shape, kind))
        if symbolic:
            T.arg("data", T.buffer(shape_of(data), dtype_of(data)))
        target = T.arg("checked", T.buffer(shape, "int64"))
        with T.sblock("root"):
            flat = T.decl_buffer((_size(shape),), kind, data=tirx.buffer_data(source))
            out = T.decl_buffer((_size(shape),), "int64", data=tirx.buffer_data(target))
            count = len(axes) if several else 1
            with T.serial(0, tirx.FloorDiv(_size(shape), tirx.const(count, "int64"))) as i:
                for k in range(count):
                    extent = tirx.const(extents[k], "int64") if isinstance(extents[k], int) else (
                        extents[k]
                    )  # fmt: skip
                    value = T.Bind(tirx.Cast("int64", flat[i * count + k]))
                    _fail_unless(tirx.And(value >= 0 - extent, value < extent), message)
                    T.buffer_store(
                        out, value + tirx.Select(value < 0, extent, tirx.const(0, "int64")),
                        [i * count + k],
                    )  # fmt: skip
    return node.call(builder.get(), "check_indices", args, relax.TensorType(shape, "int64"))


def _constant_indices(node: Node, indices: np.ndarray, extents: list[int]) -> np.ndarray:
    extent = np.array(extents if len(extents) > 1 else extents[0], np.int64)
    value = indices.astype(np.int64)
    bad = (value < -extent) | (value >= extent)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise node.wrong(
            f"index {int(value[at])} at {at} is outside {extents}",
            "correct the constant indices",
        )
    return np.asarray(np.where(value < 0, value + extent, value), np.int64)


class Gather(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        data, indices = node.get(0), node.get(1)
        rank = len(shape_of(data))
        axis = int(node.attr.get("axis", 0)) % rank
        known = constant(data), constant(indices)
        if known[0] is not None and known[1] is not None:
            extent = [known[0].shape[axis]]
            places = _constant_indices(node, known[1], extent)
            return literal(np.asarray(np.take(known[0], places, axis)))
        place = checked_indices(node, indices, data, [axis])
        middle = len(shape_of(indices))

        def take(x: te.Tensor, at: te.Tensor) -> te.Tensor:
            shape = [*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]]

            def value(*i: Any) -> Any:
                return x(*i[:axis], at(*i[axis : axis + middle]), *i[axis + middle :])

            return te.compute(shape, value, name="take")

        return node.compute(take, data, place)


class GatherElements(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        data, indices = node.get(0), node.get(1)
        axis = int(node.attr.get("axis", 0)) % len(shape_of(data))
        place = checked_indices(node, indices, data, [axis])

        def take(x: te.Tensor, at: te.Tensor) -> te.Tensor:
            return te.compute(
                at.shape, lambda *i: x(*i[:axis], at(*i), *i[axis + 1 :]), name="gather_elements"
            )

        return node.compute(take, data, place)


class GatherND(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        data, indices = node.get(0), node.get(1)
        batch = int(node.attr.get("batch_dims", 0))
        depth = shape_of(indices)[-1]
        if not isinstance(depth, int):
            raise node.refuse("the last dimension of its indices is symbolic", "fix it")
        axes = [batch + k for k in range(depth)]
        place = checked_indices(node, indices, data, axes)
        outer = len(shape_of(indices)) - 1

        def take(x: te.Tensor, at: te.Tensor) -> te.Tensor:
            shape = [*at.shape[:-1], *x.shape[batch + depth :]]

            def value(*i: Any) -> Any:
                where = [at(*i[:outer], tirx.const(k, "int64")) for k in range(depth)]
                return x(*i[:batch], *where, *i[outer:])

            return te.compute(shape, value, name="gather_nd")

        return node.compute(take, data, place)


def _scatter(node: Node, axes: list[int] | None) -> list[Any]:
    """Inputs of a scatter, indices checked."""
    data, indices, updates = (node.get(i) for i in range(3))
    if axes is None:
        axes = list(range(int(shape_of(indices)[-1])))
    return [data, checked_indices(node, indices, data, axes), updates]


def _reduction(node: Node) -> str:
    kind = node.text("reduction", "none")
    return "update" if kind == "none" else kind


class ScatterElements(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        axis = int(node.attr.get("axis", 0)) % len(shape_of(node.get(0)))
        args = _scatter(node, [axis])
        if node.symbols.gpu:
            x, at = args[0], args[1]
            kind = dtype_of(x)
            func = gpu_scatter.elements(shape_of(x), shape_of(at), axis, kind, _reduction(node))
            return node.call(func, "scatter_elements", args, relax.TensorType(shape_of(x), kind))
        return relax.op.scatter_elements(*args, axis=axis, reduction=_reduction(node))


class ScatterND(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        args = _scatter(node, None)
        if node.symbols.gpu:
            x, at = args[0], args[1]
            kind = dtype_of(x)
            func = gpu_scatter.slices(shape_of(x), shape_of(at), kind, _reduction(node))
            return node.call(func, "scatter_nd", args, relax.TensorType(shape_of(x), kind))
        return relax.op.scatter_nd(*args, _reduction(node))


# Integer division


def _floor_remainder(a: Any, b: Any) -> Any:
    r = tirx.truncmod(a, b)
    zero = tirx.const(0, str(r.ty))
    apart = tirx.Or(tirx.And(r < zero, b > zero), tirx.And(r > zero, b < zero))
    return r + tirx.Select(apart, b, zero)


def divided(node: Node, kind: str) -> Any:
    """Integer `quotient`, `floor` remainder or `trunc` remainder; an error where C would trap."""
    a, b = node.get(0), node.get(1)
    dtype = dtype_of(a)
    known = constant(b)
    signed = dtype.startswith("int")
    rule = {
        "quotient": lambda x, y: tirx.truncdiv(x, y),
        "trunc": lambda x, y: tirx.truncmod(x, y),
        "floor": _floor_remainder,
    }[kind]
    if known is not None and (known == 0).any():
        raise node.wrong("its constant divisor contains 0", "correct the divisor")
    if known is not None and not (signed and (known == -1).any()):
        return node.emit(rule, a, b)
    shape = broadcast([shape_of(a), shape_of(b)])
    message = (
        f"DC2111: {node.where}: integer division by zero, or of the least {dtype} by -1; "
        "the result must be a number of its type"
    )
    if node.symbols.gpu:
        dims = (shape_of(a), shape_of(b), shape)
        func = gpu_checks.division(*dims, dtype, kind == "quotient", rule, message)
        return node.call(func, "checked_division", [a, b], relax.TensorType(shape, dtype))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("checked_division")
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "dcc.kernel": "checked_division"})
        left = T.arg("a", T.buffer(shape_of(a), dtype))
        right = T.arg("b", T.buffer(shape_of(b), dtype))
        target = T.arg("out", T.buffer(shape, dtype))
        with T.sblock("root"), ExitStack() as loops:
            index = [loops.enter_context(T.serial(0, d)) for d in shape]

            def at(buffer: Any, dims: list[Any]) -> Any:
                own = index[len(index) - len(dims) :]
                place = [
                    tirx.const(0, "int64") if one(d) else i for i, d in zip(own, dims, strict=True)
                ]
                return buffer[tuple(place)] if place else buffer[()]

            x = T.Bind(at(left, shape_of(a)))
            y = T.Bind(at(right, shape_of(b)))
            fine = y != tirx.const(0, dtype)
            if signed:
                least = tirx.min_value(dtype)
                minus = tirx.const(-1, dtype)
                if kind == "quotient":
                    fine = tirx.And(fine, tirx.Or(x != least, y != minus))
            _fail_unless(fine, message)
            if signed and kind != "quotient":
                safe = T.Bind(tirx.Select(y == tirx.const(-1, dtype), tirx.const(1, dtype), y))
                value = rule(x, safe)
            else:
                value = rule(x, y)
            T.buffer_store(target, value, index)
    return node.call(builder.get(), "checked_division", [a, b], relax.TensorType(shape, dtype))


class Div(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        a, b = node.get(0), node.get(1)
        if dtype_of(a).startswith(("int", "uint")):
            return divided(node, "quotient")
        return relax.op.divide(a, b)


class Mod(Converter):
    @classmethod
    def convert(cls, node: Node) -> Any:
        a, b = node.get(0), node.get(1)
        exact = int(node.attr.get("fmod", 0)) == 1
        if dtype_of(a).startswith(("int", "uint")):
            return divided(node, "trunc" if exact else "floor")
        if not exact:
            raise node.wrong("fmod is 0 on floats; it must be 1", "set the attribute fmod to 1")
        name = {"float32": "fmodf", "float64": "fmod"}.get(dtype_of(a))
        if name is None:
            raise node.refuse(f"type {dtype_of(a)} is not supported", "use float32")
        return node.emit(lambda x, y: tirx.call_pure_extern(str(x.ty), name, x, y), a, b)
