"""From an imported Relax module to fused and scheduled functions.

The order is LegalizeOps, AnnotateTIROpPattern, FoldConstant where anything is left to fold,
FuseOps, FuseTIR, DeadCodeElimination, then the generic schedule. Operators whose TVM lowering
swallows NaN or returns garbage for an empty axis are legalized here, with ONNX Runtime's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, relax, te, tirx, topi
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..machine import Gpu, Machine
from .elementwise import clamped, each, greater, highest, is_float, lowest, number, relu, smaller
from .gpu import schedule_gpu
from .schedule import schedule_generic


def target_of(machine: Machine) -> tvm.target.Target:
    """The code generator's target."""
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": machine.mcpu, "mattr": list(machine.mattr), "num-cores": 1}
    )


def fuse(mod: ir.IRModule, machine: Machine) -> tuple[ir.IRModule, dict[str, str]]:
    """A module of fused, scheduled call_tir functions; ``dcc.kernel`` functions pass untouched.

    With it, the functions that the generic schedule left as they were, and why.
    """
    t = relax.transform
    with target_of(machine):
        mod = t.DeadCodeElimination()(fold_layout(mod))
        mod = t.LegalizeOps(dict(LEGALIZE))(mod)
        mod = t.AnnotateTIROpPattern()(mod)
        mod = relabel(mod)
        if folds(mod):
            mod = t.FoldConstant()(mod)
        mod = t.FuseOps()(mod)
        mod = t.FuseTIR()(mod)
        mod = t.DeadCodeElimination()(mod)
        if isinstance(machine, Gpu):
            mod, report = schedule_gpu(mod, machine)
        else:
            mod, report = schedule_generic(mod, machine)
    return mod, report.left


def relabel(mod: ir.IRModule) -> ir.IRModule:
    """Functions that come with their own schedule stay opaque to fusion."""
    for gv, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and "dcc.kernel" in (func.attrs or {}):
            if int((func.attrs or {}).get("op_pattern", -1)) != 8:
                mod.update_func(gv, func.with_attr("op_pattern", 8))
    return mod


def folds(mod: ir.IRModule) -> bool:
    """Whether some call has only constants as inputs; FoldConstant runs a compiler for each."""
    found = False

    def look(expr: Any) -> None:
        nonlocal found
        if isinstance(expr, ir.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            args = list(expr.args[1])
            found = found or (bool(args) and all(isinstance(a, ir.GenericConst) for a in args))

    for func in mod.functions.values():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, look)
    return found


@mutator
class _LayoutFolder(PyExprMutator):
    """Evaluates changes of layout and type of constants with numpy; joins chains of reshapes."""

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        name = getattr(call.op, "name", "")
        if name in _SHAPES:
            call = self.builder_.normalize(_shortened(call, self.lookup_binding))
        moves = isinstance(call, ir.Call) and name in _FOLD
        if not moves or not isinstance(call.args[0], ir.GenericConst):
            return call
        value = call.args[0].value.numpy()
        if value.dtype.kind not in "fiub":
            return call
        shape = call.ty.shape
        if not isinstance(shape, relax.ShapeExpr) or not all(
            isinstance(s, tirx.IntImm) for s in shape.values
        ):
            return call
        folded = _FOLD[name](value, call, [int(s) for s in shape.values])
        return relax.const(folded, str(folded.dtype))


_SHAPES = ("relax.reshape", "relax.memory.view")


def _shortened(call: Any, binding_of: Callable[[Any], Any]) -> Any:
    """A reshape of a reshape as one, and none where it gives back the shape that was."""
    source = call.args[0]
    while isinstance(source, relax.Var):
        binding = binding_of(source)
        if getattr(getattr(binding, "op", None), "name", "") not in _SHAPES:
            break
        source = binding.args[0]
    wanted, have = call.args[1], getattr(getattr(source, "ty", None), "shape", None)
    if isinstance(wanted, relax.ShapeExpr) and isinstance(have, relax.ShapeExpr):
        if tvm_ffi.structural_equal(wanted.values, have.values, map_free_vars=False):
            return source
    if source is call.args[0]:
        return call
    plain = call.op.name == "relax.reshape"
    return relax.op.reshape(source, wanted) if plain else relax.op.memory.view(source, wanted)


def _permuted(value: np.ndarray, call: Any, shape: list[int]) -> np.ndarray:
    axes = None if call.attrs.axes is None else [int(a) for a in call.attrs.axes]
    return np.ascontiguousarray(np.transpose(value, axes))


_FOLD: dict[str, Callable[[np.ndarray, Any, list[int]], np.ndarray]] = {
    "relax.permute_dims": _permuted,
    "relax.reshape": lambda v, call, shape: v.reshape(shape),
    "relax.expand_dims": lambda v, call, shape: v.reshape(shape),
    "relax.squeeze": lambda v, call, shape: v.reshape(shape),
    "relax.broadcast_to": lambda v, call, shape: np.ascontiguousarray(np.broadcast_to(v, shape)),
}


def fold_layout(mod: ir.IRModule) -> ir.IRModule:
    """numpy instead of compiled code for what only moves a constant's elements."""
    folder = _LayoutFolder(mod)
    for gv, func in mod.functions_items():
        if isinstance(func, relax.Function):
            folder.builder_.update_func(gv, folder.visit_expr(func))
    return folder.builder_.get()


# Legalization with ONNX Runtime's NaN


def _emit(bb: Any, name: str, rule: Callable[..., Any], *args: Any) -> Any:
    return bb.call_te(lambda *t: each(name, *t, value=rule), *args, primfunc_name_hint=name)


def _relu(bb: Any, call: Any) -> Any:
    return _emit(bb, "relu", relu, call.args[0])


def _clip(bb: Any, call: Any) -> Any:
    low, high = (_plain(a) for a in call.args[1:3])

    def rule(x: Any) -> Any:
        kind = str(x.ty)
        if not is_float(x):
            lo, hi = int(tirx.min_value(kind).value), int(tirx.max_value(kind).value)
            return clamped(x, number(int(max(low, lo)), x), number(int(min(high, hi)), x))
        return clamped(x, number(low, x), number(high, x))

    return _emit(bb, "clip", rule, call.args[0])


def _plain(value: Any) -> float:
    """The number in a Relax scalar."""
    value = getattr(value, "value", value)
    return float(getattr(value, "value", value))


def _pairwise(name: str, rule: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def legalize(bb: Any, call: Any) -> Any:
        return _emit(bb, name, rule, *call.args)

    return legalize


def _leaky(bb: Any, call: Any) -> Any:
    alpha = float(call.attrs.alpha)

    def rule(x: Any) -> Any:
        return tirx.Select(x < number(0, x), x * number(alpha, x), x)

    return _emit(bb, "leaky_relu", rule, call.args[0])


def _extreme(
    name: str, rule: Callable[[Any, Any], Any], start: Callable[[str], Any]
) -> Callable[[Any, Any], Any]:
    """A reduction whose result over nothing is the identity."""

    def legalize(bb: Any, call: Any) -> Any:
        reducer = te.comm_reducer(rule, lambda t: start(str(t)), name=name)

        def build(x: te.Tensor) -> te.Tensor:
            rank = len(x.shape)
            given = call.attrs.axis
            axes = sorted(range(rank) if given is None else {(int(a) + rank) % rank for a in given})
            over = [te.reduce_axis((0, x.shape[a]), f"k{a}") for a in axes]
            shape = [
                1 if a in axes else e
                for a, e in enumerate(x.shape)
                if call.attrs.keepdims or a not in axes
            ]

            def body(*index: Any) -> Any:
                left = list(index)
                place = []
                for a in range(rank):
                    if a in axes:
                        place.append(over[axes.index(a)])
                        if call.attrs.keepdims:
                            left.pop(0)
                    else:
                        place.append(left.pop(0))
                return reducer(x(*place), axis=over)

            return te.compute(shape, body, name=name)

        return bb.call_te(build, call.args[0], primfunc_name_hint=name)

    return legalize


def _inverse(x: Any) -> Any:
    return number(1, x) / x


def _softmax(bb: Any, call: Any) -> Any:
    """exp(x - max) times the reciprocal of its sum: one division per row."""

    def build(x: te.Tensor) -> te.Tensor:
        axis = int(call.attrs.axis) % len(x.shape)
        outer = [*x.shape[:axis], *x.shape[axis + 1 :]]

        def at(index: tuple[Any, ...], k: Any) -> tuple[Any, ...]:
            return (*index[:axis], k, *index[axis:])

        def row(index: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*index[:axis], *index[axis + 1 :])

        k = te.reduce_axis((0, x.shape[axis]), "k")
        top = te.compute(outer, lambda *i: te.max(x(*at(i, k)), axis=k), name="top")
        power = te.compute(x.shape, lambda *i: tirx.exp(x(*i) - top(*row(i))), name="power")
        k = te.reduce_axis((0, x.shape[axis]), "k")
        total = te.compute(outer, lambda *i: te.sum(power(*at(i, k)), axis=k), name="total")
        scale = te.compute(outer, lambda *i: _inverse(total(*i)), name="scale")
        return te.compute(x.shape, lambda *i: power(*i) * scale(*row(i)), name="softmax")

    return bb.call_te(build, call.args[0], primfunc_name_hint="softmax")


def _reshape(bb: Any, call: Any) -> Any:
    """With symbols it stays: a second name of its input, and no index arithmetic over symbols."""
    if all(isinstance(d, tirx.IntImm) for d in [*call.args[0].ty.shape.values, *call.args[1]]):
        return bb.call_te(topi.reshape, call.args[0], list(call.args[1].values))
    return call


LEGALIZE: dict[str, Callable[[Any, Any], Any]] = {
    "relax.reshape": _reshape,
    "relax.memory.view": lambda bb, call: call,
    "relax.nn.relu": _relu,
    "relax.nn.softmax": _softmax,
    "relax.clip": _clip,
    "relax.maximum": _pairwise("maximum", greater),
    "relax.minimum": _pairwise("minimum", smaller),
    "relax.nn.leakyrelu": _leaky,
    "relax.max": _extreme("max", greater, lowest),
    "relax.min": _extreme("min", smaller, highest),
}
