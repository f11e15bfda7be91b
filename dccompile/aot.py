"""Ahead-of-time lowering: a Relax dataflow of kernel calls becomes one function, `main`.

`main(inputs..., outputs..., params, workspace)` calls the packed kernels of the same library one
after the other: no virtual machine, no allocation, no state, so any number of threads may call it
with workspaces of their own. Intermediates live at offsets of the workspace that `arena` plans,
constants at offsets of `params`, which the loader maps from the artifact. Six kernels called this
way cost 0.7 us, in TVM's virtual machine 4 to 5 us (one Zen 4 core).

`plan(symbols, result)` tells what a call needs: result[0] the bytes of workspace, then the dims of
every output in order, all int64.

A symbol may be computed: a step makes tensors of as many rows as it finds and the number of them,
which `main` reads before the next step. Where outputs depend on such symbols, `plan` tells the
largest sizes, and `main` has one more output, `sizes`: the dims of every output as they are. What
it has written lies at the start of the buffer, as if that had the dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import codegen
from .arena import Program, Step, Storage, Tensor, highest, nbytes, plan, simple
from .errors import Problem, UnsupportedError
from .generic.lanes import local, substitute, walk
from .runtime.params import Stream
from .streams import Streams


@dataclass(frozen=True)
class Memory:
    """How `main` reaches the memory that tensors are in; both emit code.

    ``copy(target, source, bytes)`` is from tensor to tensor, ``read(target, source, bytes)`` from a
    tensor, as soon as it is computed, into a variable of `main`.
    """

    copy: Callable[[Any, Any, Any], None]
    read: Callable[[Any, Any, Any], None]


def _memcpy(target: Any, source: Any, nbytes: Any) -> None:
    T.evaluate(tirx.call_extern("handle", "memcpy", target, source, nbytes))


HOST = Memory(_memcpy, _memcpy)


def lower(
    mod: tvm.IRModule,
    bounds: dict[str, int | None],
    place: Callable[[np.ndarray | Stream], int],
    streams: Streams | None = None,
    requirements: Sequence[tuple[Any, str]] = (),
    computed: Sequence[tuple[Any, Any]] = (),
    memory: Memory = HOST,
) -> tuple[dict[str, tirx.PrimFunc], Program]:
    """Returns the PrimFuncs to build by symbol, `main` and `plan` first, and the program.

    `mod` holds `main`, a Relax function of call_tir bindings, and the PrimFuncs it calls.
    `bounds` gives the upper bound of each symbolic dim, None where there is none. `place` puts a
    constant into params and returns its byte offset; `streams` knows those yet to be made.
    `requirements` are conditions on the symbols, by name, with the message of the error that `plan`
    and `main` raise where one does not hold. `computed` gives symbols whose values the last results
    of `main` are, and the most that they can be. `memory` is where the tensors are.

    Raises UnsupportedError naming every binding that has no static plan.
    """
    linear = _Linearizer(mod, streams or Streams(), dict(computed))
    program = linear.run()
    limits = {v: bounds.get(v.name) for v in program.symbols}
    plan(program, limits)
    for storage in program.constants:
        assert storage.data is not None
        storage.offset = place(storage.data)
    known = [*program.symbols, *program.computed]
    program.requirements = [(_renamed(c, known), text) for c, text in requirements]
    entries = {"main": _main(program, memory), "plan": _plan_function(program)}
    return {**entries, **linear.functions}, program


class _Linearizer:
    def __init__(
        self, mod: tvm.IRModule, streams: Streams, computed: dict[Any, Any] | None = None
    ) -> None:
        self.mod = mod
        self.streams = streams
        self.computed = computed or {}
        self.env: dict[Any, Any] = {}  # relax.Var -> Tensor | tuple of values | shape
        self.steps: list[Step] = []
        self.functions: dict[str, tirx.PrimFunc] = {}  # those of the steps, by symbol
        self.symbols: dict[str, str] = {}  # of functions by their names in `mod`
        self.constants: dict[int, Storage] = {}
        self.keep: list[Any] = []  # constants whose id is a key above
        self.problems: list[Problem] = []

    def constant(self, const: Any) -> Tensor:
        value = const.value
        key = value.__chandle__() if hasattr(value, "__chandle__") else id(value)
        if key not in self.constants:
            data = self.streams.find(value) or value.numpy()
            self.constants[key] = Storage("const", data=data, size=data.nbytes)
            self.keep.append(value)
        storage = self.constants[key]
        assert storage.data is not None
        return Tensor(storage, tuple(int(d) for d in value.shape), str(value.dtype))

    def value(self, expr: Any) -> Any:
        if isinstance(expr, relax.Var) and expr in self.env:
            return self.env[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return self.constant(expr)
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(e) for e in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr) or tvm.ir.is_prim_expr(expr):
            return expr
        raise KeyError(type(expr).__name__)

    def new(self, ty: Any, name: str) -> Tensor:
        if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
            raise ValueError(f"the shape of '{name}' is known only after it is computed")
        shape = tuple(simple(d) for d in ty.shape.values)
        dtype = str(ty.dtype)
        return Tensor(Storage("work", size=nbytes(shape, dtype)), shape, dtype)

    def binding(self, var: relax.Var, expr: Any) -> None:
        name = var.name
        if not isinstance(expr, relax.Call):
            self.env[var] = self.value(expr)
            return
        op = getattr(expr.op, "name", str(expr.op))
        if op in ("relax.call_tir", "relax.call_tir_inplace"):
            self.call_tir(var, expr)
        elif op == "relax.null_value":
            self.env[var] = None  # an argument that a view does not use
        elif op in ("relax.reshape", "relax.memory.view"):
            source = self.value(expr.args[0])
            self.env[var] = Tensor(source.storage, self.new(var.ty, name).shape, source.dtype)
        else:
            raise ValueError(f"{op} has no ahead-of-time form")

    def call_tir(self, var: relax.Var, expr: Any) -> None:
        gvar = expr.args[0]
        func = self.mod[gvar]
        args = [self.value(a) for a in expr.args[1].fields]
        if len(expr.args) > 2:
            args += list(expr.args[2].values)
        types = expr.ty_args[0]
        fields = list(types.fields) if isinstance(types, relax.TupleType) else [types]
        if len(fields) == 1 and _is_reshape(func):
            self.env[var] = Tensor(
                args[0].storage, self.new(fields[0], var.name).shape, args[0].dtype
            )
            return
        outputs = [self.new(t, var.name) for t in fields]
        symbol = self.symbols.get(gvar.name_hint)
        if symbol is None:
            symbol = self.symbols[gvar.name_hint] = codegen.symbol(gvar.name_hint, func)
            self.functions[symbol] = func
        self.steps.append(Step(symbol, args, outputs))
        single = not isinstance(types, relax.TupleType)
        self.env[var] = outputs[0] if single else tuple(outputs)

    def run(self) -> Program:
        main = self.mod["main"]
        inputs = []
        symbols: list[Any] = []
        for index, param in enumerate(main.params):
            shape = tuple(simple(d) for d in param.ty.shape.values)
            for dim in shape:
                if isinstance(dim, tirx.Var) and not any(dim.same_as(s) for s in symbols):
                    symbols.append(dim)
                    self.env[dim] = dim
            tensor = Tensor(Storage("input", index), shape, str(param.ty.dtype))
            self.env[param] = tensor
            inputs.append(tensor)
        body = main.body
        for block in body.blocks:
            for binding in block.bindings:
                try:
                    if isinstance(binding, relax.MatchCast):
                        source = self.value(binding.value)
                        self.env[binding.var] = source
                    else:
                        self.binding(binding.var, binding.value)
                except (KeyError, ValueError) as error:
                    self.problems.append(_no_plan(binding.var.name, str(error)))
        if self.problems:
            raise UnsupportedError(self.problems)
        result = self.value(body.body)
        results = list(result) if isinstance(result, tuple) else [result]
        count = len(results) - len(self.computed)
        for symbol, tensor in zip(self.computed, results[count:], strict=True):
            maker = next(
                s for s in self.steps if any(o.storage is tensor.storage for o in s.outputs)
            )
            maker.binds.append((symbol, tensor))
        return self.finish(inputs, results[:count], symbols)

    def finish(self, inputs: list[Tensor], results: list[Tensor], symbols: list[Any]) -> Program:
        outputs, copies = [], []
        for index, value in enumerate(results):
            if value.storage.kind == "work":
                value.storage.kind, value.storage.index = "output", index
                outputs.append(value)
            else:  # an input, a constant, or a second name of another output
                target = Tensor(Storage("output", index), value.shape, value.dtype)
                outputs.append(target)
                copies.append((value, target))
        program = Program(inputs, outputs, self.steps, symbols, copies, computed=self.computed)
        program.constants = list(self.constants.values())
        return program


def _no_plan(name: str, reason: str) -> Problem:
    return Problem(
        "DC3150",
        f"value '{name}'",
        f"{reason}, every shape must follow from the input shapes",
        "give the inputs fixed shapes with --shape, or compute this part outside the model",
    )


def _is_reshape(func: tirx.PrimFunc) -> bool:
    if func.attrs and "dcc.kernel" in func.attrs:
        return False
    if not isinstance(func.body, tvm.s_tir.SBlockRealize):
        return False
    return bool(relax.analysis.has_reshape_pattern(func))


def _extent(dims: tuple[Any, ...]) -> list[Any]:
    return [tirx.const(d, "int64") if isinstance(d, int) else d for d in dims]


def _renamed(condition: Any, symbols: list[Any]) -> Any:
    """The condition over the program's own variables of the same names."""
    names = {s.name: s for s in symbols}
    return substitute(condition, {v: names[v.name] for v in walk(condition) if _is_var(v)})


def _is_var(node: Any) -> bool:
    return isinstance(node, tirx.Var)


class _Requirements:
    """Checks, in the function being built, each condition as soon as its symbols have values."""

    def __init__(self, program: Program) -> None:
        self.left = list(program.requirements)
        self.unbound = set(program.computed)

    def check(self) -> None:
        later = []
        for condition, message in self.left:
            if any(node in self.unbound for node in walk(condition)):
                later.append((condition, message))
                continue
            # AssertStmt's constructor hands its first two arguments on in the order condition,
            # kind.
            text = [StringImm(message)]
            T.add_to_parent(tirx.AssertStmt(condition, StringImm("ValueError"), text))
        self.left = later

    def bind(self, symbol: Any) -> None:
        self.unbound.remove(symbol)


def _main(program: Program, memory: Memory) -> tirx.PrimFunc:
    computed = program.computed

    def largest(tensor: Tensor, which: dict[Any, Any] = computed) -> list[Any]:
        return [highest(d, which) for d in tensor.shape]

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": False})
        inputs = [T.arg(f"in{i}", T.buffer(t.shape, t.dtype)) for i, t in enumerate(program.inputs)]
        outputs = [
            T.arg(f"out{i}", T.buffer(largest(t), t.dtype)) for i, t in enumerate(program.outputs)
        ]
        dims = [d for t in program.outputs for d in t.shape]
        sizes = T.arg("sizes", T.buffer((len(dims),), "int64")) if program.told() else None
        n_params, n_work = tirx.Var("n_params", "int64"), tirx.Var("n_work", "int64")
        params = T.arg("params", T.buffer((n_params,), "uint8"))
        work = T.arg("workspace", T.buffer((n_work,), "uint8"))

        def pointer(tensor: Tensor) -> Any:
            storage = tensor.storage
            if storage.kind == "input":
                return inputs[storage.index].data
            if storage.kind == "output":
                return outputs[storage.index].data
            base = params if storage.kind == "const" else work
            offset = storage.offset
            index = tirx.const(offset, "int64") if isinstance(offset, int) else offset
            return T.address_of(base[index])

        def array(tensor: Tensor, shape: Sequence[Any]) -> Any:
            return tirx.call_intrin(
                "handle",
                "tirx.tvm_stack_make_array",
                pointer(tensor),
                tirx.call_intrin("handle", "tirx.tvm_stack_make_shape", *_extent(tuple(shape))),
                tirx.const(0),  # row-major
                tirx.const(len(tensor.shape)),
                tirx.const(0, tensor.dtype),
                tirx.const(0, "int64"),
            )

        requirements = _Requirements(program)
        requirements.check()
        for step in program.steps:
            args = [array(a, a.shape) if isinstance(a, Tensor) else a for a in step.args]
            open_ = {symbol: computed[symbol] for symbol, _ in step.binds}
            args += [array(t, largest(t, open_)) for t in step.outputs]
            call = tirx.call_cpacked(step.name, *args)
            some = _some(step, computed)
            if some is None:
                T.evaluate(call)
            else:
                with T.If(some), T.Then():
                    T.evaluate(call)
            for symbol, tensor in step.binds:
                count = local(1, "int64")
                memory.read(T.address_of(count[0]), pointer(tensor), tirx.const(8, "int64"))
                T.Bind(count[0], var=symbol)
                requirements.bind(symbol)
            requirements.check()
        for source, target in program.copies:
            itemsize = 1 if source.dtype == "bool" else np.dtype(source.dtype).itemsize
            count = math.prod(_extent(source.shape), start=tirx.const(itemsize, "int64"))
            memory.copy(pointer(target), pointer(source), count)
        for i, dim in enumerate(_extent(tuple(dims)) if sizes is not None else []):
            T.buffer_store(sizes, dim, [i])
    return builder.get()


def _some(step: Step, computed: dict[Any, Any]) -> Any:
    """Whether a step has an element to write; None where it always does.

    Kernels are made for at least one row, so a step without any is left out.
    """
    tests = []
    for tensor in step.outputs:
        dims = [d for d in tensor.shape if not isinstance(d, int)]
        open_ = [d for d in dims if any(node in computed for node in walk(d))]
        if not open_:
            return None
        tests.append(tirx.all(*(d > 0 for d in open_)))
    return tirx.any(*tests)


def _plan_function(program: Program) -> tirx.PrimFunc:
    results = [program.workspace]
    for tensor in program.outputs:
        results += [highest(d, program.computed) for d in tensor.shape]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("plan")
        symbols = T.arg("symbols", T.buffer((max(1, len(program.symbols)),), "int64"))
        result = T.arg("result", T.buffer((len(results),), "int64"))
        for i, symbol in enumerate(program.symbols):
            T.Bind(symbols[i], var=symbol)
        _Requirements(program).check()
        for i, expr in enumerate(results):
            T.buffer_store(
                result, tirx.const(expr, "int64") if isinstance(expr, int) else expr, [i]
            )
    return builder.get()
