"""The schedule of every operator that has no hand-written kernel, on NVIDIA GPUs.

Each function is read as loop nests (stages.py) and merged as on x86. Chains that fit run in one
kernel, row by row (gpu_rows.py), otherwise every nest is a kernel of its own (gpu_loops.py). Code
on a GPU cannot allocate: tensors between kernels become further outputs of the call, which the
arena then places. Functions of another form keep their loops, with a thread for every iteration of
those that are parallel (gpu_plain.py); the report names them.

The reasons for the forms are expected, not measured on a GPU: elementwise work is bound by memory,
so accesses of 16 bytes and enough of them under way are all there is to gain.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..machine import Gpu
from . import gpu_plain, stages
from .gpu_halves import halves
from .gpu_ir import attributes, flat, product
from .gpu_rows import Rows
from .gpu_values import guarded
from .lanes import Memory, substitute
from .schedule import Report, _argument


def write(func: tirx.PrimFunc, machine: Gpu, name: str) -> tuple[tirx.PrimFunc, list[Any]]:
    """The function as kernels, and the tensors that are its last parameters, for its own use.

    Raises stages.NotANest where the function has another form.
    """
    nests, inner = stages.read(func)
    nests = stages.merge(nests, inner, _lazy)
    made = {o.buffer for n in nests for o in n.outs}
    inner = {b: shape for b, shape in inner.items() if b in made}
    depth = stages.shared_prefix(nests, inner) if len(nests) > 1 else 0
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("generic")
        memory = Memory(machine.bits)
        writer = Rows(machine, memory)
        most = writer.fits(nests, inner, depth) if len(nests) > 1 else 0
        extra = [] if most else list(inner)
        if not most:
            pairs = [halves(nest) for nest in nests]
            nests = [part for parts, _ in pairs for part in parts]
            extra += [buffer for _, buffer in pairs if buffer is not None]
        params = [*func.params, *extra]
        args = [_argument(p) for p in params]
        for p, buffer in zip(params, args, strict=True):
            if buffer is not None:
                shape = list(p.ty.shape)
                memory.add(p, flat(buffer, product(shape)), shape)
        if most:
            writer.rows(nests, inner, depth, most)
        else:
            for nest in nests:
                writer.nest(nest)
    return builder.get().without_attr("global_symbol"), extra


def _lazy(nest: stages.Nest, buffer: Any) -> bool:
    """Whether a nest reads a buffer in one place, under a condition, as a concatenation does."""
    if nest.over:
        return False
    reads = [tests for load, tests in guarded(nest.values()) if load.source.same_as(buffer)]
    return len(reads) == 1 and bool(reads[0])


def schedule_gpu(mod: ir.IRModule, machine: Gpu) -> tuple[ir.IRModule, Report]:
    """Makes kernels of every PrimFunc that lacks the attribute ``dcc.kernel``."""
    report = Report()
    result = ir.IRModule(
        dict(mod.functions_items()), attrs=mod.attrs, global_infos=mod.global_infos
    )
    extra: dict[Any, tuple[tirx.PrimFunc, list[Any]]] = {}
    for gv, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc) or "dcc.kernel" in (func.attrs or {}):
            continue
        if isinstance(func.body, s_tir.SBlockRealize) and relax.analysis.has_reshape_pattern(func):
            continue  # becomes a second name of its input
        name = gv.name_hint
        try:
            new, temporary = write(func, machine, name)
            report.scheduled.append(name)
        except stages.NotANest as why:
            report.left[name] = str(why)
            new, temporary = gpu_plain.write(func)
        result.update_func(gv, new)
        if temporary:
            extra[gv] = (func, temporary)
    return (_Caller(result, extra).run() if extra else result), report


@mutator
class _Caller(PyExprMutator):
    """Gives calls the tensors that their functions need for themselves as further outputs."""

    def __init__(self, mod: ir.IRModule, extra: dict[Any, tuple[tirx.PrimFunc, list[Any]]]) -> None:
        super().__init__(mod)
        self.mod, self.extra = mod, extra

    def run(self) -> ir.IRModule:
        for gv, func in self.mod.functions_items():
            if isinstance(func, relax.Function):
                self.builder_.update_func(gv, self.visit_expr(func))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") != "relax.call_tir" or call.args[0] not in self.extra:
            return call
        func, temporary = self.extra[call.args[0]]
        args = list(call.args[1].fields)
        given = call.ty_args[0]
        fields = list(given.fields) if isinstance(given, relax.TupleType) else [given]
        dims: dict[Any, Any] = {}
        types = [a.ty for a in args] + fields
        for p, ty in zip((p for p in func.params if tirx.is_buffer_var(p)), types, strict=True):
            for dim, value in zip(p.ty.shape, ty.shape.values, strict=True):
                if isinstance(dim, tirx.Var):
                    dims.setdefault(dim, value)
        more = [
            relax.TensorType([substitute(d, dims) for d in b.ty.shape], str(b.ty.dtype))
            for b in temporary
        ]
        rest = {"tir_vars": call.args[2]} if len(call.args) > 2 else {}
        wide = relax.call_tir(call.args[0], args, out_ty=[*fields, *more], **rest)
        result = self.builder_.emit(wide)
        parts = [relax.TupleGetItem(result, i) for i in range(len(fields))]
        return relax.Tuple(parts) if isinstance(given, relax.TupleType) else parts[0]
