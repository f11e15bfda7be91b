"""8-bit weights with float activations: scales, recovery, compiled code, written models."""

from __future__ import annotations

import zipfile

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from recovery import F32, S8, U8, K, Maker, N, agree, compare, evaluate, only, ops, session

import dccompile as dc
from dccompile.columns import quantize_columns
from dccompile.errors import ModelError, UsageError
from dccompile.frontend.gate import read
from dccompile.frontend.recover import recover
from dccompile.quantization.weight_only import weight_only


def decibel(signal, noise):
    signal, noise = (np.square(x, dtype=np.float64).sum() for x in (signal, noise))
    return 10 * np.log10(signal / noise)


# ---- scales ----
def test_every_column_has_its_own_scale():
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(300, 70)) * 10.0 ** rng.integers(-6, 3, 70)).astype(np.float32)
    found = quantize_columns(w)
    ratio = [decibel(w[:, i], (found.values() - w)[:, i]) for i in range(70)]
    assert min(ratio) > 38  # a scale for all of them leaves most columns nothing
    assert decibel(w, found.values() - w) == pytest.approx(-20 * np.log10(found.relative), abs=1e-3)


@pytest.mark.parametrize(("bits", "gain"), [(8, 0.0), (4, 1.0)])
def test_scales_have_the_least_squared_error(bits, gain):
    """A finer search finds next to nothing; clipping pays the more, the fewer bits there are."""
    w = np.random.default_rng(1).standard_normal((2000, 5)).astype(np.float32)
    found = quantize_columns(w, bits)
    limit = 2 ** (bits - 1) - 1
    for i in range(5):
        scales = np.linspace(0.4, 1.02, 400) * np.abs(w[:, i]).max() / limit
        codes = np.clip(np.rint(w[:, i, None] / scales), -limit, limit)
        best = np.square(codes * scales - w[:, i, None]).sum(axis=0).min()
        mine = np.square(found.values()[:, i] - w[:, i], dtype=np.float64).sum()
        assert mine <= 1.08 * best  # 0.3 dB
    assert 20 * np.log10(found.plain / found.relative) >= gain


def test_columns_of_zeros_and_of_tiny_numbers():
    w = np.zeros((9, 3), np.float32)
    w[:, 1], w[4, 2] = 1e-44, -3e38
    found = quantize_columns(w)
    assert (found.scale >= np.finfo(np.float32).tiny).all() and found.scale[0] == 1
    assert not found.codes[:, :2].any() and found.codes[4, 2] == -127


# ---- recovery ----
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "zero"), [(S8, 0), (U8, 128), (S8, 3), (U8, 0)])
@pytest.mark.parametrize("per_column", [False, True])
def test_quantized_weights_stay_so(per_column, dtype, zero, transposed):
    """With a zero point at which some code does not fit s8, the weights are float as before."""
    make = Maker()
    w, _ = make.weights(K, N, dtype, per_column, zero, transposed)
    bias = make.const(make.rng.normal(size=N), np.float32)
    y = make.op("Gemm", make.input("B", K), w, bias, transB=int(transposed), alpha=0.3)
    model = make.model(make.op("Relu", y))
    recovered = agree(model, {"x": make.rng.normal(size=(5, K)).astype(np.float32)})
    work, symmetric = only(recovered), zero in (0, 128) and (dtype, zero) != (U8, 0)
    assert (work.a, work.out, work.bias) == ("f32", "f32", "f32" if symmetric else "none")
    assert (work.b, work.b_bits) == ("s8" if symmetric else "f32", 8)
    (node,) = (n for n in recovered.nodes if n["op"] == "Gemm")
    assert node["precision"] == ("int8-weights" if symmetric else "float32")
    assert node["reason"].startswith("activations are not quantized")
    assert ops(recovered)[0] == "DccGemm" and "DequantizeLinear" not in ops(recovered)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_other_scales_are_left_as_they_are(kind):
    make = Maker(opset=21)
    b = make.const(make.rng.integers(-99, 99, (K, N)), np.int8)
    shape = (3, N) if kind == "blocks" else (K,)
    block = {"block_size": 16} if kind == "blocks" else {}
    w = make.dequant(
        b, make.rng.uniform(0.01, 0.02, shape), np.zeros(shape), np.int8, axis=0, **block
    )
    recovered = recover(make.model(make.op("MatMul", make.input(4, K), w)))
    assert only(recovered).b == "f32"
    assert recovered.nodes[-1]["reason"].startswith("weights are scaled")


@pytest.mark.parametrize("op", ["QuantizeLinear", "Tanh"])
def test_the_tail_of_float_activations_is_float(op):
    """A QuantizeLinear behind float activations is no part of a kernel with a float output."""
    make = Maker()
    y = make.op("MatMul", make.input(6, K), make.weights(K, N, per_column=True)[0])
    y = make.op("Add", y, make.const(make.rng.normal(size=N), np.float32))
    y = make.quant(y, 0.05, 100, U8) if op == "QuantizeLinear" else make.op(op, y)
    recovered = agree(make.model(y), {"x": make.rng.normal(size=(6, K)).astype(np.float32)})
    assert (only(recovered).out, only(recovered).b) == ("f32", "s8")
    assert ops(recovered) == (["DccGemm", op] if op == "QuantizeLinear" else ["DccGemm"])


@pytest.mark.parametrize("largest", [1.0, np.inf])
def test_int8_weights_on_request(largest):
    make = Maker()
    w = make.rng.normal(size=(N, K)).astype(np.float32)
    w[3, 5] = largest
    half = make.const(make.rng.normal(size=(N, N)), np.float16)
    y = make.op("Gemm", make.input(4, K), make.const(w), transB=1)
    y = make.op("MatMul", y, make.op("Cast", half, to=F32))
    model = make.model(y)
    x = {"x": make.rng.normal(size=(4, K)).astype(np.float32)}
    recovered = recover(model, precision="int8-weights")
    first, second = recovered.gemms.values()
    assert second.workload.b == "f16"  # the model says so
    if largest == 1:
        assert (first.workload.b, first.precision) == ("s8", "int8-weights")
        assert first.error == quantize_columns(w.T).relative < 0.01
        got, want = evaluate(recovered, x)[0], session(model).run(None, x)[0]
        assert 38 < decibel(want, got - want) < 60
    else:
        assert (first.workload.b, first.precision) == ("f32", "float32")
        assert "a weight is not finite" in {n["reason"] for n in recovered.nodes}
    assert {s.workload.b for s in recover(model).gemms.values()} == {"f32", "f16"}


# ---- models that are written ----
def cell(steps=4, size=96):
    """A recurrent cell unrolled: every step has the same weights; its output through another."""
    make = Maker()
    x = make.input(3, steps * size)
    w, u = (make.const(make.rng.normal(size=(size, size)) / 10, np.float32) for _ in "wu")
    b = make.const(make.rng.normal(size=size), np.float32)
    h = make.op("Slice", x, *(make.const([v], np.int64) for v in (0, size, 1)))
    for step in range(1, steps):
        bounds = [make.const([v], np.int64) for v in (step * size, step * size + size, 1)]
        here = make.op("Gemm", make.op("Slice", x, *bounds), w, b, transB=1, alpha=0.5, beta=2.0)
        h = make.op("Tanh", make.op("Add", here, make.op("MatMul", h, u)))
    out = make.op("MatMul", h, make.const(make.rng.normal(size=(size, 7)), np.float32))
    model = make.model(out)
    feeds = {"x": make.rng.normal(size=(3, steps * size)).astype(np.float32)}
    layers = [n.name for n in model.graph.node if n.op_type in ("Gemm", "MatMul")]
    return model, layers, feeds


def plain(model):
    """ONNX Runtime as `session` has it, less an option under which it takes no shared weights."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def recovered_alike(model, feeds):
    """What is recovered of a model, once it agrees with ONNX Runtime."""
    recovered = recover(read(model).model)
    compare(evaluate(recovered, feeds)[0], plain(model).run(None, feeds)[0])
    return recovered


def sizes(model):
    return sorted(numpy_helper.to_array(t).size for t in model.graph.initializer)[::-1]


def test_written_models_agree_with_onnxruntime():
    model, layers, feeds = cell()
    written = weight_only(model, layers)
    onnx.checker.check_model(written, full_check=True)
    recovered = recovered_alike(written, feeds)
    assert {s.precision for s in recovered.gemms.values()} == {"int8-weights"}
    exact, got = (plain(m).run(None, feeds)[0] for m in (model, written))
    assert 25 < decibel(exact, got - exact) < 60
    assert {n.name for n in model.graph.node} < {n.name for n in written.graph.node}


def test_weights_stay_shared(tmp_path):
    model, layers, feeds = cell()
    written = weight_only(model, layers)
    assert sizes(written)[:4] == [96 * 96, 96 * 96, 96 * 7, 96]
    weights = [t for t in written.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in weights} == {S8}
    artifact = dc.compile(written, targets=["host"])
    path = artifact.save(tmp_path / "cell.dcm")
    with zipfile.ZipFile(path) as file:
        assert file.getinfo("params.safetensors").file_size < 1.5 * (2 * 96 * 96 + 96 * 7)
    compare(artifact.load()(feeds["x"])[0], plain(written).run(None, feeds)[0])


def test_compiling_with_int8_weights_is_the_written_model():
    model, layers, feeds = cell()
    artifact = dc.compile(model, targets=["host"], precision="int8-weights")
    compare(artifact.load()(feeds["x"])[0], plain(weight_only(model, layers)).run(None, feeds)[0])
    nodes = {n["name"]: n for n in artifact.manifest["nodes"]}
    assert {nodes[name]["precision"] for name in layers} == {"int8-weights"}
    assert all(0.003 < nodes[name]["weight_error"] < 0.01 for name in layers)


def test_layers_in_float_keep_their_weights():
    model, layers, feeds = cell()
    written = weight_only(model, layers[2:3])
    recovered = recovered_alike(written, feeds)
    assert [s.precision for s in recovered.gemms.values()].count("int8-weights") == 1
    assert sizes(written)[:3] == [96 * 96] * 3  # one of them in both forms


def test_bits():
    model, layers, feeds = cell()
    exact = plain(model).run(None, feeds)[0]
    ratio = {}
    for bits in (8, 6, 4):
        written = weight_only(model, layers, bits)
        ratio[bits] = decibel(exact, plain(written).run(None, feeds)[0] - exact)
    assert ratio[8] - 8 > ratio[6] > ratio[4] + 8  # 6 dB a bit
    with pytest.raises(UsageError, match="bits 9: allowed are 2 to 8") as caught:
        weight_only(model, layers, 9)
    assert caught.value.code == "DC2058"


def test_refused_layers_are_all_named():
    make = Maker()
    x = make.input(K, K)
    y = make.op("MatMul", x, x)
    z = make.op("MatMul", x, make.const(np.full((K, N), np.nan), np.float32))
    half = make.op("Add", z, make.op("MatMul", y, make.const(np.ones((1, K, N)), np.float32)))
    model = make.model(half)
    names = [n.name for n in model.graph.node]
    with pytest.raises(ModelError) as caught:
        weight_only(model, [*names, "nobody"])
    text = " ".join(str(p) for p in caught.value.problems)
    for said in ("not constant", "not finite", "rank 3", "only Gemm and MatMul", "no such node"):
        assert said in text
    assert len(caught.value.problems) == 5
