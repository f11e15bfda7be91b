"""Small buffers of kernels on the stack instead of in memory that TVM's runtime hands out."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import ir, s_tir, tirx

from .lanes import ON_STACK, static

# The pass would drop the annotation that this module sets.
CONFIG = {"tirx.disable_storage_rewrite": True}
LIMIT = 64 << 10  # bytes of one buffer
# Passes that take up to two thirds of the time of lowering hand-written kernels, which have
# nothing for them to do: without them the instructions are the same, but for the sizes of
# workspaces, which are then those that the kernel asks for (of open sizes, shorter to compute).
NEEDLESS = [
    "s_tir.CompactBufferAllocation",
    "s_tir.HoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
    "tirx.RemoveNoOp",
]


def build(mod: ir.IRModule, target: Any) -> Any:
    """``tvm.tirx.build`` with every local buffer of constant size on the stack.

    Without it an f32 GEMM of 64x512x512 takes 342 us, with it 288; a softmax of 64 rows 39 and 24.
    Hand-written kernels are those whose attribute ``dcc.kernel`` names them.
    """
    mod = ir.IRModule(dict(mod.functions_items()), attrs=mod.attrs, global_infos=mod.global_infos)
    for gv, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            mod.update_func(gv, func.with_body(on_stack(func.body)))
    functions = mod.functions.values()
    by_hand = all(func.attrs is not None and "dcc.kernel" in func.attrs for func in functions)
    needless = NEEDLESS if by_hand else []
    with tvm.transform.PassContext(config=CONFIG, disabled_pass=needless):
        return tvm.tirx.build(mod, target)


def on_stack(stmt: Any) -> Any:
    """A statement with its local buffers of constant size marked for the stack."""
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([on_stack(s) for s in stmt.seq])
    if isinstance(stmt, tirx.For):
        return tirx.For(
            stmt.loop_var,
            stmt.min,
            stmt.extent,
            stmt.kind,
            on_stack(stmt.body),
            stmt.thread_binding,
            stmt.annotations,
            stmt.step,
        )
    if isinstance(stmt, tirx.While):
        return tirx.While(stmt.condition, on_stack(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        other = None if stmt.else_case is None else on_stack(stmt.else_case)
        return tirx.IfThenElse(stmt.condition, on_stack(stmt.then_case), other)
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, on_stack(stmt.body))
    if isinstance(stmt, s_tir.SBlockRealize):
        return s_tir.SBlockRealize(stmt.iter_values, stmt.predicate, on_stack(stmt.block))
    if isinstance(stmt, s_tir.SBlock):
        return s_tir.SBlock(
            stmt.iter_vars,
            stmt.reads,
            stmt.writes,
            stmt.name_hint,
            on_stack(stmt.body),
            stmt.init,
            stmt.alloc_buffers,
            stmt.match_buffers,
            stmt.annotations,
        )
    if isinstance(stmt, tirx.AllocBuffer) and _fits(stmt.buffer):
        return tirx.AllocBuffer(stmt.buffer, {**dict(stmt.annotations or {}), **ON_STACK})
    return stmt


def _fits(buffer: Any) -> bool:
    if str(buffer.ty.storage_scope) != "local":
        return False
    nbytes = buffer.ty.dtype.dtype.itemsize
    for extent in buffer.ty.shape:
        size = static(extent)
        if size is None:
            return False
        nbytes *= size
    return bool(nbytes <= LIMIT)
