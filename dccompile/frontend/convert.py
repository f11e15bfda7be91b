"""From a recovered ONNX model to a Relax module: hand-written kernels where a site has one.

A DccGemm node becomes a call of the kernel that the registry chose, its weights packed by numpy
on the way; every other node goes through TVM's importer with the corrections of `operators`.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from .. import registry
from ..errors import Error, Problem, UnsupportedError
from ..machine import Machine
from . import operators
from .recover import GemmSite


@dataclass(frozen=True)
class Placed:
    """A site and the kernel it got; `symbol` is the function's name in the library."""

    site: GemmSite
    choice: registry.Choice
    symbol: str


def to_relax(
    model: onnx.ModelProto, sites: dict[str, GemmSite], machine: Machine
) -> tuple[tvm.IRModule, list[Placed]]:
    """Imports the model for one machine; returns the module and what each site became.

    Raises UnsupportedError naming the node that the importer cannot convert.
    """
    placed: list[Placed] = []
    importer = _Importer({"DccGemm": _gemm_converter(sites, machine, placed)})
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    with contextlib.redirect_stdout(io.StringIO()):  # the importer prints what it then raises
        mod = importer.from_onnx(model.graph, opset)
    return mod, placed


class _Importer(onnx_frontend.ONNXGraphImporter):
    """TVM's importer with a converter table of its own, and errors that name the node."""

    def __init__(self, converters: dict[str, type]) -> None:
        super().__init__({}, "float32")
        self.table = {**onnx_frontend._get_convert_map(), **operators.table(), **converters}

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """The gate has listed them already, every one with its name."""

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        try:
            convert = self.table[op_name].get_converter(opset)
            value = convert(self.bb, inputs, attrs, [self._nodes, self._params])
            return self.bb.normalize(value) if isinstance(value, relax.Expr) else value
        except Error:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            problem = Problem(
                "DC3140",
                f"{op_name} '{attrs['tvm_custom']['name']}'",
                f"this use of the operator cannot be lowered: {reason}",
                "make its secondary inputs constants and its shapes static, or rewrite the node",
            )
            raise UnsupportedError([problem]) from error


def _gemm_converter(sites: dict[str, GemmSite], machine: Machine, placed: list[Placed]) -> type:
    class DccGemm(onnx_frontend.OnnxOpConverter):
        @classmethod
        def _impl_v1(cls, bb: Any, inputs: Any, attr: Any, params: Any) -> Any:
            name = attr["site"]
            site = sites[name.decode() if isinstance(name, bytes) else name]
            work = site.workload
            choice = registry.select(work, machine)
            kernel = choice.kernel
            func = kernel.build(work, choice.params, machine)
            func = func.without_attr("global_symbol")
            func = func.with_attr("op_pattern", 8).with_attr("dcc.kernel", kernel.name)
            gvar = bb.add_func(func, f"{kernel.name}_{work.n}x{work.k}")
            packed = kernel.pack(work, site.weights, choice.params)
            placed.append(Placed(site, choice, gvar.name_hint))
            a = inputs[0]
            shape = list(a.ty.shape.values)
            rows, flat = _rows(shape[:-1]), len(shape) == 2
            if not flat:
                a = bb.emit(relax.op.reshape(a, relax.ShapeExpr([rows, work.k])))
            runtime = [
                bb.emit(relax.op.reshape(i, relax.ShapeExpr([1])))
                for i in list(inputs)[1:]
                if i is not None
            ]
            out = relax.TensorType([rows, work.n], _DTYPES[work.out])
            call = relax.call_tir(gvar, [a, relax.const(packed), *runtime], out_ty=out)
            if flat:
                return call
            return relax.op.reshape(bb.emit(call), relax.ShapeExpr([*shape[:-1], work.n]))

    return DccGemm


_DTYPES = {"u8": "uint8", "s8": "int8", "s32": "int32", "f32": "float32"}


def _rows(dims: list[Any]) -> Any:
    rows: Any = 1
    for dim in dims:
        rows = rows * (int(dim) if isinstance(dim, tvm.tirx.IntImm) else dim)
    return rows if not isinstance(rows, (int, np.integer)) else int(rows)
