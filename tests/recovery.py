"""Small models for the recovery tests, and their comparison with ONNX Runtime."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dccompile import reference
from dccompile.frontend.gate import read
from dccompile.frontend.recover import Recovered, recover

ort = pytest.importorskip("onnxruntime")
MS = "com.microsoft"
F32, U8, S8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8
NUMPY = {U8: np.uint8, S8: np.int8}
K, N = 48, 40  # of the products in most tests


class Maker:
    """Writes a small model node by node; every method gives the name of a value."""

    def __init__(self, opset: int = 19, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.opset = opset

    def input(self, *shape, dtype=F32, name="x"):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def const(self, value, dtype=None):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind, *inputs, domain="", outputs=1, **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        name = f"{kind}{len(self.nodes)}"
        node = helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def quant(self, value, scale, zero, dtype):
        names = self.const(scale, np.float32), self.const(zero, NUMPY[dtype])
        return self.op("QuantizeLinear", value, *names)

    def dequant(self, value, scale, zero, dtype, **attributes):
        names = self.const(scale, np.float32), self.const(zero, dtype)
        return self.op("DequantizeLinear", value, *names, **attributes)

    def weights(self, k, n, dtype=S8, per_column=False, zero=0, transposed=False, bits=8):
        """DequantizeLinear of a constant (k, n), or (n, k) with `transposed`."""
        info = np.iinfo(NUMPY[dtype])
        low, high = info.min >> (8 - bits), info.max >> (8 - bits)
        value = self.rng.integers(low, high + 1, (n, k) if transposed else (k, n))
        scale = self.rng.uniform(0.5, 1.5, n if per_column else ()) * 0.004
        zeros = np.full(np.shape(scale), zero)
        axis = {"axis": 0 if transposed else 1} if per_column else {}
        name = self.const(value, NUMPY[dtype])
        return self.dequant(name, scale, zeros, NUMPY[dtype], **axis), scale

    def model(self, *outputs):
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", self.inputs, values, self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return read(model).model


def session(model, optimize=True):
    # Without VNNI, ONNX Runtime's u8*s8 kernels saturate pairs of products unless told not to;
    # the option makes weights u8, which its kernels for s8 activations do not take.
    for precise in ("1", "0"):
        options = ort.SessionOptions()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.x64quantprecision", precise)
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.log_severity_level = 4
        with contextlib.suppress(ort.capi.onnxruntime_pybind11_state.NotImplemented):
            data = model.SerializeToString()
            return ort.InferenceSession(data, options, ["CPUExecutionProvider"])
    return ReferenceEvaluator(model)  # s8*u8 MatMulInteger


def evaluate(recovered: Recovered, feeds):
    """Outputs of a recovered model, its multiplications computed by the reference."""

    class DccGemm(OpRun):
        op_domain = "dccompile"

        def _run(self, a, a_zero=None, a_scale=None, site=None):
            found = recovered.gemms[site]
            work = found.workload
            assert a.ndim == found.a_rank
            assert work.m is None or work.m == a.size // work.k
            runtime = [None if x is None else x.reshape(1) for x in (a_zero, a_scale)]
            assert (a_zero is not None) == work.runtime
            c = reference.gemm(work, found.weights, a.reshape(-1, work.k), *runtime)
            return (c.reshape(*a.shape[:-1], work.n),)

    class DccConv(OpRun):
        op_domain = "dccompile"

        def _run(self, a, r=None, site=None):
            found = recovered.convs[site]
            work = found.workload
            assert a.ndim == found.rank
            assert work.batch is None or work.batch == len(a)
            outputs = (len(a), *work.outputs, work.filters)
            deep = [
                None if x is None else x.reshape(len(a), *dims)
                for x, dims in ((a, (*work.size, work.channels)), (r, outputs[1:]))
            ]
            c = reference.conv(work, found.weights, *deep)
            assert c.shape == outputs
            inter = found.interleave
            if inter is not None:
                per = work.filters // int(np.prod(inter.strides))
                split, axes, merged = inter.steps(len(a), work.outputs, per)
                c = c.reshape(split).transpose(axes).reshape(merged)
                here = [slice(f, f + s) for f, s in zip(inter.first, inter.size, strict=True)]
                c = c[(slice(None), *here)]
                outputs = c.shape
            if found.dims:
                return (c.reshape(len(a), *found.dims, work.filters),)
            return (np.ascontiguousarray(c).reshape(len(a), *outputs[6 - a.ndim :]),)

    class DccPool(OpRun):
        op_domain = "dccompile"

        def _run(self, x, kind=None, kernel=None, strides=None, dilations=None, pads=None,
                 sizes=None, count_include_pad=0, fill=0.0):  # fmt: skip
            rank = x.ndim - 2
            fill = np.finfo(np.float64).min if kind in ("MaxPool", "GlobalMax") else float(fill)
            dims = list(zip(kernel, strides, dilations, sizes, strict=True))[3 - rank :]
            before, after = pads[6 - 2 * rank :: 2], pads[7 - 2 * rank :: 2]
            beyond = [
                max(q, (out - 1) * s + (k - 1) * d + 1 - n - p)
                for n, p, q, (k, s, d, out) in zip(x.shape[1:], before, after, dims, strict=False)
            ]
            around = [(0, 0), *zip(before, beyond, strict=True), (0, 0)]
            wide = np.pad(x.astype(np.float64), around, constant_values=fill)
            ones = np.pad(np.ones(x.shape), around, constant_values=count_include_pad)
            taps = []
            for tap in np.ndindex(*(k for k, _, _, _ in dims)):
                here = tuple(
                    slice(t * d, t * d + (out - 1) * s + 1, s)
                    for t, (_, s, d, out) in zip(tap, dims, strict=True)
                )
                taps.append((wide[(slice(None), *here)], ones[(slice(None), *here)]))
            if kind in ("MaxPool", "GlobalMax"):
                return (np.max([t for t, _ in taps], axis=0).astype(x.dtype),)
            if kind == "Sum":
                return (sum(t for t, _ in taps).astype(np.int32),)
            return ((sum(t for t, _ in taps) / sum(o for _, o in taps)).astype(x.dtype),)

    class DccRequantize(OpRun):
        op_domain = "dccompile"

        def _run(self, q, factor=None, zero=None, output_zero=None, to=None):
            codes = np.rint((q.astype(np.int32) - zero).astype(np.float32) * np.float32(factor))
            info = np.iinfo(NUMPY[to])
            return (np.clip(codes + output_zero, info.min, info.max).astype(NUMPY[to]),)

    class DccTable(OpRun):
        op_domain = "dccompile"

        def _run(self, q, table):
            return (table[q.view(np.uint8)],)

    onnx.checker.check_model(recovered.model)
    own = [DccGemm, DccConv, DccPool, DccRequantize, DccTable]
    return ReferenceEvaluator(recovered.model, new_ops=own).run(None, feeds)


def compare(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.dtype.kind == "f":
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        return
    if want.dtype.itemsize > 1:
        np.testing.assert_array_equal(got, want)
        return
    assert len(np.unique(want)) > min(5, want.size // 4), "the test says nothing"
    apart = np.abs(got.astype(np.int32) - want.astype(np.int32))
    assert apart.max() <= 1
    assert (apart != 0).sum() <= 1e-3 * apart.size


def agree(model, feeds, optimize=True) -> Recovered:
    """Recovers, compares with ONNX Runtime (its optimizer on), returns what was recovered."""
    before = model.SerializeToString()
    recovered = recover(model)
    assert model.SerializeToString() == before
    assert [n["name"] for n in recovered.nodes] == [n.name for n in model.graph.node]
    for got, want in zip(
        evaluate(recovered, feeds), session(model, optimize).run(None, feeds), strict=True
    ):
        compare(got, want)
    return recovered


def only(recovered):
    (site,) = recovered.gemms.values()
    return site.workload


def ops(recovered):
    return [node.op_type for node in recovered.model.graph.node]


def integers(rng, shape, dtype):
    info = np.iinfo(NUMPY[dtype])
    return rng.integers(info.min, info.max + 1, shape).astype(NUMPY[dtype])
