"""From a recovered ONNX model to a Relax module: hand-written kernels where a site has one.

A recovered node becomes a call of the kernel that the registry chose. The weights of a DccGemm are
packed by numpy on the way, the tables of a DccEmbeddingBag only when the params file is written.
Every other node goes through TVM's importer with the corrections of `operators`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from .. import codegen, registry
from ..lookup import Tuning
from ..machine import Gpu, Machine
from ..runtime.params import Stream
from ..streams import Streams
from ..workload import Workload
from .bags import BagSite
from .convolutions import ConvSite
from .importer import Importer
from .integer import Requantize, Table
from .interaction import InteractionSite
from .pooling import Pool
from .recover import GemmSite, Recovered
from .shapes import Range
from .symbols import Computed, Requirement, Symbols
from .tables import stored

_Select = Callable[[Workload], registry.Choice]


@dataclass(frozen=True)
class Placed:
    """A site and the kernel it got; `symbol` is the function's name in the library."""

    site: GemmSite | BagSite | InteractionSite | ConvSite
    choice: registry.Choice
    symbol: str


@dataclass
class Imported:
    """A Relax module for one machine, what each site became, and the constants yet to be made."""

    mod: tvm.IRModule
    placed: list[Placed]
    streams: Streams
    requirements: list[Requirement]
    computed: list[Computed]


def to_relax(
    recovered: Recovered,
    machine: Machine,
    ranges: Mapping[str, Range] | None = None,
    tuning: Tuning | None = None,
) -> Imported:
    """Imports a recovered model for one machine; `ranges` of its symbols, at least 1 if absent.

    Kernels have the parameters of the `tuning` logs, where these speak of them.

    Raises UnsupportedError naming the node that the importer cannot convert.
    """
    model = recovered.model
    placed: list[Placed] = []
    streams = Streams()
    symbols = Symbols(ranges, isinstance(machine, Gpu))

    def select(work: Workload) -> registry.Choice:
        return registry.select(work, machine, tuning)

    importer = Importer(
        {
            "DccGemm": _gemm_converter(recovered.gemms, select, placed),
            "DccEmbeddingBag": _bag_converter(recovered.bags, select, placed, streams),
            "DccConv": _conv_converter(recovered.convs, select, placed),
            "DccPool": Pool,
            "DccRequantize": Requantize,
            "DccTable": Table,
            "DccInteraction": _interaction_converter(recovered.interactions, select, placed),
        },
        symbols,
    )
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    with contextlib.redirect_stdout(io.StringIO()):  # the importer prints what it then raises
        mod = importer.from_onnx(model.graph, opset)
    return Imported(mod, placed, streams, symbols.requirements, symbols.computed)


def _gemm_converter(sites: dict[str, GemmSite], select: _Select, placed: list[Placed]) -> type:
    class DccGemm(onnx_frontend.OnnxOpConverter):
        @classmethod
        def _impl_v1(cls, bb: Any, inputs: Any, attr: Any, params: Any) -> Any:
            site = sites[_text(attr["site"])]
            work = site.workload
            choice, gvar = _kernel(bb, work, select, f"{work.n}x{work.k}")
            packed = choice.kernel.pack(work, site.weights, choice.params)
            placed.append(Placed(site, choice, gvar.name_hint))
            a = inputs[0]
            symbols: Symbols = params.symbols
            shape = symbols.shape(a)
            symbols.require_equal(shape[-1], work.k, f"MatMul '{site.name}'")
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


def _bag_converter(
    sites: dict[str, BagSite], select: _Select, placed: list[Placed], streams: Streams
) -> type:
    class DccEmbeddingBag(onnx_frontend.OnnxOpConverter):
        @classmethod
        def _impl_v1(cls, bb: Any, inputs: Any, attr: Any, params: Any) -> Any:
            site = sites[_text(attr["site"])]
            work = site.workload
            given = [i for i in inputs if i is not None]
            index = given.pop(0)
            shape = list(index.ty.shape.values)
            kept = shape[: len(shape) - site.trailing]
            if work.layout == "fixed":
                bags = _rows(kept[: len(kept) - site.grouped])
                flat, result = [bags, work.tables, work.pooling], [*kept, work.dim]
            else:
                bags = given[0].ty.shape.values[0] - int(work.layout == "offsets+1")
                flat, result = [_rows(shape)], [bags, work.dim]
            args = [_reshaped(bb, index, flat)]
            if work.layout != "fixed":
                args.append(given.pop(0))
            args += [_reshaped(bb, weight, flat) for weight in given]
            choice, gvar = _kernel(bb, work, select, f"{work.tables}x{work.dim}")
            placed.append(Placed(site, choice, gvar.name_hint))
            args.append(streams.constant(_tables(site, choice)))
            out = relax.TensorType([bags, work.tables, work.dim], "float32")
            call = relax.call_tir(gvar, args, out_ty=out)
            return relax.op.reshape(bb.emit(call), relax.ShapeExpr(result))

    return DccEmbeddingBag


def _tables(site: BagSite, choice: registry.Choice) -> Stream:
    """The constants of an embedding kernel; equal for the kernels of all machines."""
    kernel: Any = choice.kernel
    work = site.workload
    key = f"{work.rows} {work.dim} {work.storage} {work.scale} {site.tables}".encode()

    def pieces() -> Any:
        return kernel.pieces(work, stored(site), site.tables)

    return Stream(kernel.nbytes(work), key, pieces)


def _conv_converter(sites: dict[str, ConvSite], select: _Select, placed: list[Placed]) -> type:
    class DccConv(onnx_frontend.OnnxOpConverter):
        @classmethod
        def _impl_v1(cls, bb: Any, inputs: Any, attr: Any, params: Any) -> Any:
            site = sites[_text(attr["site"])]
            work = site.workload
            given = [i for i in inputs if i is not None]
            batch = given[0].ty.shape.values[0]
            choice, gvar = _kernel(bb, work, select, f"{work.filters}x{work.channels}")
            packed = choice.kernel.pack(work, site.weights, choice.params)
            placed.append(Placed(site, choice, gvar.name_hint))
            outputs = work.outputs
            dims = [(*work.size, work.channels), (*outputs, work.filters)]
            a, *r = (_viewed(bb, x, [batch, *d]) for x, d in zip(given, dims, strict=False))
            out = relax.TensorType([batch, *outputs, work.filters], _DTYPES[work.out])
            value = bb.emit(relax.call_tir(gvar, [a, relax.const(packed), *r], out_ty=out))
            filters = work.filters
            if site.interleave is not None:
                value, outputs, filters = _interleaved(bb, value, site, batch)
            flat = [batch, *(site.dims or outputs[5 - site.rank :]), filters]
            return _viewed(bb, value, flat)

    return DccConv


def _interleaved(bb: Any, value: Any, site: ConvSite, batch: Any) -> tuple[Any, Any, int]:
    """The phases of a transposed convolution side by side; its spatial dims and filters."""
    inter, work = site.interleave, site.workload
    assert inter is not None
    filters = work.filters // math.prod(inter.strides)
    split, axes, merged = inter.steps(batch, work.outputs, filters)
    value = bb.emit(relax.op.reshape(value, relax.ShapeExpr(split)))
    value = bb.emit(relax.op.permute_dims(value, axes))
    value = bb.emit(relax.op.reshape(value, relax.ShapeExpr(merged)))
    ends = [f + s for f, s in zip(inter.first, inter.size, strict=True)]
    if list(merged[1:4]) != list(inter.size):
        value = bb.emit(relax.op.strided_slice(value, [1, 2, 3], list(inter.first), ends))
    return value, inter.size, filters


def _interaction_converter(
    sites: dict[str, InteractionSite], select: _Select, placed: list[Placed]
) -> type:
    class DccInteraction(onnx_frontend.OnnxOpConverter):
        @classmethod
        def _impl_v1(cls, bb: Any, inputs: Any, attr: Any, params: Any) -> Any:
            site = sites[_text(attr["site"])]
            work = site.workload
            dense, rows = inputs[0], inputs[1]
            choice, gvar = _kernel(bb, work, select, f"{work.vectors}x{work.dim}")
            placed.append(Placed(site, choice, gvar.name_hint))
            shape = [dense.ty.shape.values[0], work.dim + work.pairs]
            out = relax.TensorType(shape, "float32")
            return relax.call_tir(gvar, [dense, rows], out_ty=out)

    return DccInteraction


def _kernel(bb: Any, work: Any, select: _Select, hint: str) -> tuple[registry.Choice, Any]:
    """The kernel for a workload, and the function that stands for it in the module."""
    choice = select(work)
    symbol, stub = codegen.stub(choice, hint)
    return choice, bb.add_func(stub, symbol)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _viewed(bb: Any, value: Any, shape: list[Any]) -> Any:
    """Another shape of a kernel's operand. Unlike a reshape it is no work to fuse with others."""
    if len(value.ty.shape.values) == len(shape) == 5:
        return value
    return bb.emit(relax.op.memory.view(value, relax.ShapeExpr(shape)))


def _reshaped(bb: Any, value: Any, shape: list[Any]) -> Any:
    if len(value.ty.shape.values) == len(shape) == 1:
        return value
    return bb.emit(relax.op.reshape(value, relax.ShapeExpr(shape)))


_DTYPES = {"u8": "uint8", "s8": "int8", "s32": "int32", "f32": "float32"}


def _rows(dims: list[Any]) -> Any:
    rows: Any = 1
    for dim in dims:
        rows = rows * (int(dim) if isinstance(dim, tvm.tirx.IntImm) else dim)
    return rows if not isinstance(rows, (int, np.integer)) else int(rows)
