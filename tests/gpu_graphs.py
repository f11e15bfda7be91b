"""Runs ONNX models on the emulated GPU, step by step as `main` of an artifact does."""

from __future__ import annotations

from typing import Any

import emulate
import numpy as np
import onnx
import onnxruntime
import tvm
from onnx_cases import Case
from tvm import relax, tirx

from dccompile import aot, pipeline
from dccompile.frontend import convert
from dccompile.generic import legalize
from dccompile.generic.lanes import substitute, walk
from dccompile.machine import GPUS

A100 = GPUS["cuda:sm_80"]


class Graph:
    """A model lowered for a GPU; `left` names what is no loop nest."""

    def __init__(self, model: onnx.ModelProto) -> None:
        front = pipeline.front(model.SerializeToString(), None, "high")
        imported = convert.to_relax(front.recovered, A100, front.graph.symbols)
        self.outputs = len(model.graph.output)
        self.bounds = {c.symbol.name: c.bound for c in imported.computed}
        self.mod, self.left = legalize.fuse(imported.mod, A100)

    def run(self, *inputs: np.ndarray, order: str = "forward") -> list[np.ndarray]:
        """Raises ValueError with the text of the first finding."""
        return _Call(self, order).run(inputs)

    def names(self) -> list[str]:
        """The functions' names, but for those that are only another shape."""
        found = [gv.name_hint for gv, f in self.mod.functions_items() if _is_kernel(f)]
        return sorted(found)


def _is_kernel(func: Any) -> bool:
    return isinstance(func, tirx.PrimFunc) and "dcc.kernel" in (func.attrs or {})


class _Call:
    def __init__(self, graph: Graph, order: str) -> None:
        self.graph, self.order = graph, order
        self.env: dict[Any, Any] = {}
        self.sizes: dict[str, int] = {}

    def run(self, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        main = self.graph.mod["main"]
        for param, array in zip(main.params, inputs, strict=True):
            self.env[param] = array
            for dim, n in zip(param.ty.shape, array.shape, strict=True):
                if isinstance(dim, tirx.Var):
                    self.sizes[dim.name] = n
        for block in main.body.blocks:
            for binding in block.bindings:
                self.env[binding.var] = self.value(binding.value)
        result = self.value(main.body.body)
        return list(result if isinstance(result, tuple) else [result])[: self.graph.outputs]

    def dims(self, shape: Any) -> list[int]:
        """Computed sizes not known yet are the largest that they can be."""
        return [self.dim(d) for d in shape]

    def dim(self, dim: Any) -> int:
        if isinstance(dim, (int, tirx.IntImm)):
            return int(dim)
        known = {
            v: tirx.const(self.size(v.name), "int64") for v in walk(dim) if isinstance(v, tirx.Var)
        }
        return int(tvm.sym.Analyzer().simplify(substitute(dim, known)))

    def size(self, name: str) -> int:
        return self.sizes[name] if name in self.sizes else self.dim(self.graph.bounds[name])

    def value(self, expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return self.env[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(f) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr) or tvm.ir.is_prim_expr(expr):
            return expr
        if expr.op.name in ("relax.reshape", "relax.memory.view"):
            return self.value(expr.args[0]).reshape(self.dims(expr.ty.shape.values))
        assert expr.op.name in ("relax.call_tir", "relax.null_value")
        return self.call(expr) if expr.op.name == "relax.call_tir" else None

    def call(self, expr: Any) -> Any:
        func = self.graph.mod[expr.args[0]]
        args = [self.value(a) for a in expr.args[1].fields]
        given = expr.ty_args[0]
        several = isinstance(given, relax.TupleType)
        types = list(given.fields) if several else [given]
        if not several and aot._is_reshape(func):
            return args[0].reshape(self.dims(given.shape.values))
        buffers = [np.require(a, requirements="C") for a in args if isinstance(a, np.ndarray)]
        numbers = {
            p.name: self.dim(a)
            for p, a in zip(func.params, args, strict=False)
            if not isinstance(a, np.ndarray)
        }
        outs = [np.zeros(self.dims(t.shape.values), str(t.dtype)) for t in types]
        if any(o.size for o in outs):
            # of the functions that TVM writes some have parameters with an offset, which is 0
            offsets = {v.name: 0 for p in func.params for v in _offsets(p)}
            found = emulate.run(
                func, [*buffers, *outs], symbols={**numbers, **offsets}, order=self.order
            )
            if found:
                raise ValueError(str(found))
        self.learn(types, outs)
        outs = [
            o.reshape(-1)[: int(np.prod(d))].reshape(d)
            for o, d in zip(outs, (self.dims(t.shape.values) for t in types), strict=True)
        ]
        return tuple(outs) if several else outs[0]

    def learn(self, types: list[Any], outs: list[np.ndarray]) -> None:
        """A computed size, which the last output tells."""
        for name in self.graph.bounds:
            uses = any(
                isinstance(v, tirx.Var) and v.name == name
                for t in types
                for d in t.shape.values
                for v in walk(d)
            )
            if uses and name not in self.sizes:
                self.sizes[name] = int(outs[-1][0])


def _offsets(param: Any) -> list[Any]:
    offset = getattr(param.ty, "elem_offset", None)
    return [offset] if isinstance(offset, tirx.Var) else []


def compare(
    case: Case,
    *,
    symbolic: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    others: list[dict[str, np.ndarray]] | None = None,
    order: str = "forward",
) -> Graph:
    """Integers as ONNX Runtime has them, floats close, NaN where it is; `others` are more feeds."""
    model = case.model(symbolic)
    graph = Graph(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    for feeds in [case.feeds, *(others or [])]:
        got = graph.run(*(feeds[n] for n in case.feeds), order=order)
        want = session.run(None, feeds)
        for name, a, b in zip(case.outputs, got, want, strict=True):
            node = next(n for n in case.nodes if name in n.output)
            label = f"{node.op_type} {name} of {[v.shape for v in feeds.values()]}"
            assert a.dtype == b.dtype and a.shape == b.shape, label
            if a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, rtol, atol, err_msg=label)
            else:
                np.testing.assert_array_equal(a, b, err_msg=label)
    return graph
