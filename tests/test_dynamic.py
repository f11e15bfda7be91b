"""Activations quantized when the model runs, per tensor and per row, in standard ONNX."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from recovery import S8, K, Maker, N, agree, compare, only, ops, session

import dccompile as dc
from dccompile.errors import ModelError
from dccompile.quantization.dynamic import dynamic

ROWS = pytest.mark.parametrize("rows", [False, True])


def layers_of(model):
    return [n.name for n in model.graph.node if n.op_type in ("Gemm", "MatMul")]


def product(opset=19, m=16):
    """A float layer with a bias; its name."""
    make = Maker(opset=opset)
    y = make.op("MatMul", make.input(m, K), make.const(make.rng.normal(size=(K, N)), np.float32))
    y = make.op("Relu", make.op("Add", y, make.const(make.rng.normal(size=N), np.float32)))
    return make.model(y)


def output(model, x):
    return session(model).run(None, {"x": x})[0].astype(np.float64)


def decibel(signal, noise, axis=None):
    signal, noise = (np.square(v).sum(axis=axis) for v in (signal, noise))
    return 10 * np.log10(signal / noise)


# ---- form ----
@ROWS
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_any_runtime_loads_it_and_the_kernels_run_it(opset, rows):
    model = product(opset)
    written = dynamic(model, layers_of(model), rows)
    onnx.checker.check_model(written, full_check=True)
    assert {o.domain for o in written.opset_import} <= {"", "com.microsoft"}
    assert {n.domain for n in written.graph.node} == {""}
    x = np.random.default_rng(1).normal(size=(16, K)).astype(np.float32)
    recovered = agree(written, {"x": x})
    work = only(recovered)
    if rows:  # the row's scale and zero point follow the kernel
        assert (work.a, work.b, work.out, work.runtime) == ("u8", "s8", "f32", False)
        assert ops(recovered)[-6:] == ["DccGemm", "Mul", "Sub", "Mul", "Add", "Relu"]
    else:
        assert (work.a, work.out, work.runtime) == ("u8", "f32", True)
        assert (work.bias, work.activation) == ("f32", "relu")
        assert ops(recovered) == ["DynamicQuantizeLinear", "DccGemm"]
    assert {n.name for n in model.graph.node} <= {n.name for n in written.graph.node} | set(
        layers_of(model)
    )


@ROWS
@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("c", ["none", "row", "rows", "input"])
def test_gemm(c, trans, rows):
    make = Maker()
    a = make.input(*((K, 6) if trans[0] else (6, K)))
    w = make.const(make.rng.normal(size=(N, K) if trans[1] else (K, N)), np.float32)
    feeds = {"x": make.rng.normal(size=(K, 6) if trans[0] else (6, K)).astype(np.float32)}
    inputs = [a, w]
    if c == "input":
        inputs.append(make.input(6, N, name="c"))
        feeds["c"] = make.rng.normal(size=(6, N)).astype(np.float32)
    elif c != "none":
        inputs.append(make.const(make.rng.normal(size=(N,) if c == "row" else (6, 1)), np.float32))
    y = make.op("Gemm", *inputs, alpha=0.7, beta=1.3, transA=trans[0], transB=trans[1])
    model = make.model(y)
    written = dynamic(model, layers_of(model), rows)
    agree(written, feeds)
    exact = session(model).run(None, feeds)[0]
    assert decibel(exact, session(written).run(None, feeds)[0] - exact) > 33


@ROWS
@pytest.mark.parametrize("shape", [(K,), (2, 3, K), ("B", 3, K)])
def test_activations_of_any_rank(shape, rows):
    make = Maker()
    w = make.const(make.rng.normal(size=(K, N)), np.float32)
    model = make.model(make.op("MatMul", make.input(*shape), w))
    x = make.rng.normal(size=[2 if d == "B" else d for d in shape]).astype(np.float32)
    assert only(agree(dynamic(model, layers_of(model), rows), {"x": x})).b == "s8"


@ROWS
def test_weights_and_codes_are_shared(rows):
    """A recurrent cell unrolled: one set of codes for all steps, one quantization of an input."""
    make = Maker()
    x = make.input(2, K)
    w, u, v = (make.const(make.rng.normal(size=(K, K)) / 9, np.float32) for _ in range(3))
    h = x
    for _ in range(3):
        gate = make.op("Sigmoid", make.op("MatMul", h, u))
        new = make.op("Tanh", make.op("Gemm", h, w, transB=1))
        h = make.op("Mul", gate, new)
    model = make.model(make.op("MatMul", h, v))
    written = dynamic(model, layers_of(model), rows)
    matrices = [t for t in written.graph.initializer if len(t.dims) == 2]
    assert [(t.data_type, *t.dims) for t in matrices] == [(S8, K, K)] * 3
    kind = "ReduceMax" if rows else "DynamicQuantizeLinear"
    assert [n.op_type for n in written.graph.node].count(kind) == 4  # of 7 layers
    feeds = {"x": make.rng.normal(size=(2, K)).astype(np.float32)}
    agree(written, feeds, optimize=False)  # the optimizer fails on shared weights


def test_layers_in_float_stay_so():
    make = Maker()
    w = make.const(make.rng.normal(size=(K, K)), np.float32)
    y = make.op("MatMul", make.op("MatMul", make.input(2, K), w), w)
    model = make.model(y)
    written = dynamic(model, layers_of(model)[:1], True)
    names = {n.op_type: n.name for n in written.graph.node}
    assert names["MatMul"] == "MatMul1" and names["MatMulInteger"] == "MatMul0"
    shared = {t.name: numpy_helper.to_array(t).shape for t in written.graph.initializer}
    assert list(shared.values()).count((K, K)) == 2
    with pytest.raises(ModelError, match="no such node"):
        dynamic(model, ["MatMul7"], True)


# ---- accuracy ----
def test_rows_of_different_sizes_need_ranges_of_their_own():
    """Rows over four decades: with one range for all, the small ones are rounded away."""
    model = product()
    rng = np.random.default_rng(2)
    size = 10.0 ** np.linspace(-3, 1, 16)[:, None]
    x = (rng.normal(size=(16, K)) * size).astype(np.float32)
    model.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.zeros(N, np.float32), model.graph.initializer[1].name)
    )
    exact = output(model, x)
    ratio = {}
    for rows in (False, True):
        got = output(dynamic(model, layers_of(model), rows), x)
        ratio[rows] = decibel(exact, got - exact, axis=1)
    assert ratio[True].min() > 35
    assert ratio[False].min() < 3  # nothing is left of the smallest
    assert (ratio[True] - ratio[False]).mean() > 20


def test_equal_rows_cost_nothing():
    """Rows of one size, behind a Relu: their own ranges are no worse than that of all."""
    model = product(m=64)
    x = np.abs(np.random.default_rng(3).normal(size=(64, K))).astype(np.float32)
    exact = output(model, x)
    tensor, row = (
        decibel(exact, output(dynamic(model, layers_of(model), rows), x) - exact)
        for rows in (False, True)
    )
    assert row > tensor > 40


def test_a_row_does_not_depend_on_the_others():
    model = product()
    written = dynamic(model, layers_of(model), True)
    run = dc.compile(written, targets=["host"]).load()
    x = np.random.default_rng(4).normal(size=(16, K)).astype(np.float32)
    other = x.copy()
    other[1:] *= 1000
    np.testing.assert_array_equal(run(x)[0][0], run(other)[0][0])


@pytest.mark.parametrize("kind", ["zeros", "constant", "negative", "tiny", "huge"])
def test_rows_at_the_ends(kind):
    make = Maker()
    w = make.const(make.rng.normal(size=(K, N)), np.float32)
    model = make.model(make.op("MatMul", make.input(3, K), w))
    x = make.rng.normal(size=(3, K)).astype(np.float32)
    x[1] = {
        "zeros": np.zeros(K),
        "constant": np.full(K, 3.7),
        "negative": -1 - np.abs(x[1]),
        "tiny": x[1] * 1e-42,
        "huge": x[1] * 1e36,
    }[kind]
    written = dynamic(model, layers_of(model), True)
    agree(written, {"x": x})
    exact, got = output(model, x), output(written, x)
    assert np.isfinite(got).all()
    assert decibel(exact[[0, 2]], (got - exact)[[0, 2]]) > 33
    if kind in ("zeros", "tiny"):
        assert np.abs(got[1]).max() < 1e-36
    else:
        assert decibel(exact[1], got[1] - exact[1]) > 33


# ---- compiled ----
@ROWS
def test_compiled_like_onnxruntime(rows):
    make = Maker()
    y = make.input("N", 64)
    for k, n in ((64, 48), (48, 24)):
        w = make.const(make.rng.normal(size=(n, k)) / 8, np.float32)
        y = make.op("Gemm", y, w, make.const(make.rng.normal(size=n), np.float32), transB=1)
        y = make.op("Relu", y)
    model = make.model(y)
    written = dynamic(model, layers_of(model), rows)
    artifact = dc.compile(written, targets=["host"])
    run = artifact.load()
    for m in (1, 5, 32):
        x = make.rng.normal(size=(m, 64)).astype(np.float32)
        compare(run(x)[0], session(written).run(None, {"x": x})[0])
    nodes = {n["name"]: n["precision"] for n in artifact.manifest["nodes"]}
    assert {nodes[name] for name in layers_of(model)} == {"int8" if rows else "int8-dynamic"}
