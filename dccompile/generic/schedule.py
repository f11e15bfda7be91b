"""The schedule of every operator that has no hand-written kernel, on x86.

Each function is read as loop nests (stages.py), merged, and written again with explicit vectors
(emit.py): elementwise work in flat vector loops with peeled tails, reductions in register tiles,
chains such as softmax row by row so that intermediate rows stay in the cache. Sorting, scatters
and other functions of another form stay as TVM made them; the report names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax, s_tir, sym, tirx
from tvm.s_tir.dlight.base import ScheduleRule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..machine import Machine
from . import stages
from .emit import Writer
from .lanes import Memory, local, static
from .loops import LAUNCH_NS, cost, count

STACK = 8192  # bytes of a buffer that may live on the stack


@dataclass
class Report:
    """What happened to each function: scheduled, left as it was (why), or in part scalar."""

    scheduled: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)


def write(func: tirx.PrimFunc, machine: Machine, name: str) -> tuple[tirx.PrimFunc, list[str]]:
    """The scheduled form of a function and remarks on what stayed scalar.

    Raises stages.NotANest where the function has another form.
    """
    nests, inner = stages.read(func)
    nests = stages.merge(nests, inner)
    depth = stages.shared_prefix(nests, inner) if len(nests) > 1 else 0
    attrs = {k: v for k, v in dict(func.attrs or {}).items() if k != "global_symbol"}
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({**attrs, "tirx.noalias": True})
        memory = Memory(machine.bits)
        args = [_argument(p) for p in func.params]
        for p, buffer in zip(func.params, args, strict=True):
            if buffer is not None:
                shape = list(p.ty.shape)
                flat = T.decl_buffer(
                    (_product(shape),), str(p.ty.dtype), data=tirx.buffer_data(buffer)
                )
                memory.add(p, flat, shape)
        writer = Writer(machine, memory)
        with T.sblock("root"):
            _body(writer, memory, nests, inner, depth)
    return builder.get().without_attr("global_symbol"), writer.remarks


def _product(shape: list[Any]) -> Any:
    total: Any = tirx.const(1, "int64")
    for extent in shape:
        total = total * tirx.Cast("int64", extent)
    return sym.Analyzer().simplify(total)


def _argument(p: Any) -> Any:
    """A parameter of the new function: the same variable, or a buffer like it."""
    if not tirx.is_buffer_var(p):
        T.arg(p.name, p)
        return None
    return T.arg(p.name, T.buffer(list(p.ty.shape), str(p.ty.dtype)))


def _body(
    writer: Writer, memory: Memory, nests: list[stages.Nest], inner: dict[Any, Any], depth: int
) -> None:
    made = [o.buffer for n in nests for o in n.outs if o.buffer in inner]
    heavy = sum(cost(n) for n in nests) >= LAUNCH_NS
    common = nests[0].space[:depth]
    together = heavy and depth > 0 and count(common) >= 8

    def allocate(big: bool) -> None:
        for buffer in made:
            kept = list(inner[buffer])[depth:]
            size, dtype = _product(kept), str(buffer.ty.dtype)
            known = static(size)
            nbytes = None if known is None else known * buffer.ty.dtype.dtype.itemsize
            if big == (nbytes is None or nbytes > STACK):
                flat = T.alloc_buffer((size,), dtype) if big else local(max(1, known or 0), dtype)
                memory.add(buffer, flat, list(inner[buffer]), depth)

    if not together:
        allocate(big=True)
    with writer.grid(common, together) as loop:
        if together:
            allocate(big=True)
        allocate(big=False)
        for nest in nests:
            own = {it.var: loop[c.var] for it, c in zip(nest.space, common, strict=False) if common}
            alone = not together and cost(nest) >= LAUNCH_NS
            writer.nest(nest, nest.space[depth:], own, alone)


class GenericX86(ScheduleRule):
    """dlight's rule contract: apply() gives a schedule, or None where it has none."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.report = Report()

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        new = self.rewrite(func, str((func.attrs or {}).get("global_symbol", "main")))
        return None if new is None else s_tir.Schedule(new)

    def rewrite(self, func: Any, name: str) -> tirx.PrimFunc | None:
        """The scheduled function, or None with the reason in the report."""
        if not isinstance(func, tirx.PrimFunc) or "dcc.kernel" in (func.attrs or {}):
            return None
        if isinstance(func.body, s_tir.SBlockRealize) and relax.analysis.has_reshape_pattern(func):
            return None  # becomes a second name of its input
        try:
            new, remarks = write(func, self.machine, name)
        except stages.NotANest as why:
            self.report.left[name] = str(why)
            return None
        self.report.scheduled.append(name)
        if remarks:
            self.report.remarks[name] = remarks
        return new


def schedule_generic(mod: ir.IRModule, machine: Machine) -> tuple[ir.IRModule, Report]:
    """Schedules every PrimFunc that lacks the attribute ``dcc.kernel``."""
    rule = GenericX86(machine)
    result = ir.IRModule(
        dict(mod.functions_items()), attrs=mod.attrs, global_infos=mod.global_infos
    )
    for gv, func in mod.functions_items():
        new = rule.rewrite(func, gv.name_hint)
        if new is not None:
            result.update_func(gv, new)
    return result, rule.report
