"""Functions that are no loop nests, as TVM wrote them for CPUs, on a GPU.

Every statement of the function becomes a kernel: with a thread for each iteration where it is a
parallel loop, else of one thread, which is right and slow.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, s_tir, tirx

from .elementwise import is_float
from .gpu_ir import THREADS, blocks_of, i32, i64
from .gpu_values import fenced
from .lanes import operation, rebuild


def write(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[Any]]:
    """The function as kernels, and the tensors that are its last parameters, for its own use."""
    body, extra = func.body, []
    if isinstance(body, s_tir.SBlockRealize) and body.block.name_hint == "root":
        extra = list(body.block.alloc_buffers)
        body = body.block.body
    kernels = [_kernel(part) for part in _parts(body)]
    whole = kernels[0] if len(kernels) == 1 else tirx.SeqStmt(kernels)
    new = tirx.PrimFunc([*func.params, *extra], whole, func.ret_type, func.attrs)
    return new.with_attrs({"tirx.noalias": True, "op_pattern": 8, "dcc.kernel": "plain"}), extra


def _parts(stmt: Any) -> list[Any]:
    """The statements of a function, those of blocks without variables apart."""
    if isinstance(stmt, tirx.SeqStmt):
        return [part for s in stmt.seq for part in _parts(s)]
    if isinstance(stmt, s_tir.SBlockRealize) and not stmt.block.iter_vars:
        if not stmt.block.alloc_buffers and not stmt.block.match_buffers:
            return _parts(stmt.block.body)
    return [stmt]


def _kernel(stmt: Any) -> Any:
    block, thread = tirx.Var("block", "int64"), tirx.Var("thread", "int32")
    if isinstance(stmt, tirx.For) and stmt.kind == tirx.ForKind.PARALLEL:
        at = block * THREADS + tirx.Cast("int64", thread)
        kind = str(stmt.loop_var.ty)
        here = tirx.Bind(stmt.loop_var, stmt.min + (at if kind == "int64" else tirx.Cast(kind, at)))
        each = tirx.SeqStmt([here, _ported(stmt.body)])
        inner = tirx.IfThenElse(at < tirx.Cast("int64", stmt.extent), each, None)
        grid, threads = blocks_of(stmt.extent, THREADS), THREADS
    else:
        inner, grid, threads = _ported(stmt), i64(1), 1
    for var, extent, tag in ((thread, i32(threads), "threadIdx.x"), (block, grid, "blockIdx.x")):
        zero = tirx.const(0, str(var.ty))
        bound = tirx.IterVar(ir.Range(zero, extent), var, tirx.IterVar.ThreadIndex, tag)
        inner = tirx.For(var, zero, extent, tirx.ForKind.THREAD_BINDING, inner, bound)
    return inner


def _ported(stmt: Any) -> Any:
    """The statement for one thread, with CUDA's meaning of every expression."""
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_ported(s) for s in stmt.seq])
    if isinstance(stmt, tirx.For):
        serial = tirx.ForKind.SERIAL
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, serial, _ported(stmt.body))
    if isinstance(stmt, tirx.While):
        return tirx.While(_value(stmt.condition), _ported(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        other = None if stmt.else_case is None else _ported(stmt.else_case)
        return tirx.IfThenElse(_value(stmt.condition), _ported(stmt.then_case), other)
    if isinstance(stmt, tirx.AttrStmt):
        return _ported(stmt.body)
    if isinstance(stmt, tirx.BufferStore):
        indices = [_value(i) for i in stmt.indices]
        return tirx.BufferStore(stmt.buffer, _value(stmt.value), indices)
    if isinstance(stmt, tirx.Bind):
        return tirx.Bind(stmt.var, _value(stmt.value))
    if isinstance(stmt, s_tir.SBlockRealize):
        return _opened(stmt)
    return stmt


def _opened(stmt: Any) -> Any:
    """What a block does, without the block."""
    block = stmt.block
    if block.alloc_buffers or block.match_buffers:
        raise NotImplementedError("a block with buffers of its own, on a GPU")
    pairs = list(zip(block.iter_vars, stmt.iter_values, strict=True))
    steps: list[Any] = [tirx.Bind(axis.var, value) for axis, value in pairs]
    if block.init is not None:
        over = [a for a in block.iter_vars if a.iter_type == tirx.IterVar.CommReduce]
        first = tirx.all(*(tirx.EQ(a.var, a.dom.min) for a in over))
        steps.append(tirx.IfThenElse(first, _ported(block.init), None))
    whole = tirx.SeqStmt([*steps, _ported(block.body), tirx.Evaluate(i32(0))])
    return tirx.IfThenElse(stmt.predicate, whole, None)


def _value(expr: Any) -> Any:
    def change(node: Any) -> Any:
        kind = type(node).__name__
        if kind in ("Max", "Min") and is_float(node):
            a, b = _value(node.a), _value(node.b)
            return tirx.Select(a > b if kind == "Max" else a < b, a, b)
        if kind == "Call" and operation(node) == "call_llvm_pure_intrin":
            return _value(fenced(node))
        return None

    return rebuild(expr, change)
