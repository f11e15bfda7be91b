"""Recovery on models as quantizers and exporters write them, and the summary of the nodes."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from recovery import (
    F32,
    MS,
    S8,
    U8,
    K,
    Maker,
    N,
    agree,
    evaluate,
    integers,
    ops,
    session,
)

from dccompile.frontend.gate import read
from dccompile.frontend.recover import Recovered, recover


def mlp(op, seed=1, widths=(64, 48, 32, 8)):
    """A float MLP with ReLU between its layers, batch open."""
    make = Maker(seed=seed)
    y = make.input("N", widths[0])
    for k, n in itertools.pairwise(widths):
        w = make.const(make.rng.normal(size=(k, n)) / np.sqrt(k), np.float32)
        b = make.const(make.rng.normal(size=n), np.float32)
        y = make.op("Gemm", y, w, b) if op == "Gemm" else make.op("Add", make.op("MatMul", y, w), b)
        y = make.op("Relu", y) if n != widths[-1] else y
    return make.model(y)


def quantizable(op, tmp_path):
    pytest.importorskip("onnxruntime.quantization")
    onnx.save(mlp(op), tmp_path / "m.onnx")
    return str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx")


@pytest.mark.parametrize("kinds", ["u8s8", "s8s8", "u8u8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_models_of_the_static_quantizer(form, op, per_channel, kinds, tmp_path):
    quant: Any = pytest.importorskip("onnxruntime.quantization")
    rng = np.random.default_rng(3)
    batches = [{"x": rng.normal(size=(16, 64)).astype(np.float32)} for _ in range(4)]

    class Reader(quant.CalibrationDataReader):
        def __init__(self):
            self.left = iter(batches)

        def get_next(self):
            return next(self.left, None)

    types = {"u": quant.QuantType.QUInt8, "s": quant.QuantType.QInt8}
    source, target = quantizable(op, tmp_path)
    quant.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quant.QuantFormat[form],
        per_channel=per_channel,
        activation_type=types[kinds[0]],
        weight_type=types[kinds[2]],
    )
    model = read(target).model
    recovered = agree_to_a_step(model, batches[0])
    outs = [s.workload.out for s in recovered.gemms.values()]
    assert outs == [kinds[:2]] * 3
    assert [s.workload.bias for s in recovered.gemms.values()] == [
        "s32" if op == "Gemm" else "none"
    ] * 3
    assert "QLinearAdd" not in ops(recovered) and "QGemm" not in ops(recovered)


def agree_to_a_step(model, feeds) -> Recovered:
    """Like `agree` for a float output behind several requantizations: apart by a last step."""
    recovered = recover(model)
    (got,), (want,) = evaluate(recovered, feeds), session(model).run(None, feeds)
    step = np.diff(np.unique(want)).min()
    assert np.abs(got - want).max() <= 1.01 * step
    assert (np.abs(got - want) > 0.01 * step).mean() <= 0.03
    return recovered


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_models_of_the_dynamic_quantizer(op, per_channel, tmp_path):
    quant = pytest.importorskip("onnxruntime.quantization")
    source, target = quantizable(op, tmp_path)
    quant.quantize_dynamic(source, target, per_channel=per_channel)
    model = read(target).model
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    recovered = recover(model)
    (got,), (want,) = evaluate(recovered, {"x": x}), session(model).run(None, {"x": x})
    # Later layers quantize values that differ in their last bit: a code can flip.
    np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())
    works = [s.workload for s in recovered.gemms.values()]
    assert [(w.out, w.runtime, w.bias) for w in works] == [("f32", True, "f32")] * 3
    assert [w.activation for w in works] == ["relu", "relu", "none"]


def test_model_of_the_torch_exporter(tmp_path):
    torch = pytest.importorskip("torch")
    layers = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4), torch.nn.Sigmoid()
    )
    path = tmp_path / "m.onnx"
    x = torch.zeros(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            layers, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}}
        )
    model = read(path).model
    feeds = {"x": np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)}
    recovered = agree(model, feeds)
    assert [s.workload.activation for s in recovered.gemms.values()] == ["relu", "sigmoid"]


@pytest.mark.parametrize(
    "op",
    [
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearConcat",
        "QuantizeLinear",
    ],
)
def test_quantized_neighbours_are_spelled_out(op):
    """What the QOperator form has around its multiplications becomes standard operators."""
    make = Maker()
    quant = [make.const(0.0213, np.float32), make.const(7, np.uint8)]
    out = [make.const(0.0471, np.float32), make.const(99, np.uint8)]
    x = make.input(4, K, dtype=F32 if op == "QuantizeLinear" else U8)
    feeds = {"x": integers(make.rng, (4, K), U8)}
    c = make.const(integers(make.rng, (4, K), U8))
    if op == "QuantizeLinear":
        feeds = {"x": make.rng.normal(size=(4, K)).astype(np.float32)}
        y = make.op("DequantizeLinear", make.op(op, x, *quant, domain=MS), *quant, domain=MS)
        w = make.op(
            "DequantizeLinear", make.const(integers(make.rng, (K, N), U8)), *quant, domain=MS
        )
        y = make.op("QuantizeLinear", make.op("MatMul", y, w), *out, domain=MS)
        inner = ["QuantizeLinear", "DccGemm"]
    elif op == "QLinearConcat":
        y = make.op(op, *out, x, *quant, c, *quant, domain=MS, axis=1)
        inner = ["DccTable", "Concat"]
    else:
        more = [c, *quant] if op in ("QLinearAdd", "QLinearMul") else []
        y = make.op(op, x, *quant, *more, *out, domain=MS)
        inner = (
            ["DequantizeLinear", op[len("QLinear") :], "QuantizeLinear"] if more else ["DccTable"]
        )
    recovered = recover(make.model(y))
    assert ops(recovered) == inner
    (got,), (want,) = evaluate(recovered, feeds), session(make.model(y)).run(None, feeds)
    apart = np.abs(got.astype(int) - want.astype(int))
    # ONNX Runtime tabulates or rounds these its own way
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02


def test_qlinear_conv_is_spelled_out():
    make = Maker()
    x = make.input(1, 3, 8, 8, dtype=U8)
    scales = make.rng.uniform(0.01, 0.02, 5)
    w = make.const(integers(make.rng, (5, 3, 3, 3), S8))
    bias = make.const(make.rng.integers(-99, 99, 5), np.int32)
    inputs = [x, make.const(0.02, np.float32), make.const(7, np.uint8), w]
    inputs += [make.const(scales, np.float32), make.const(np.zeros(5), np.int8)]
    inputs += [make.const(0.2, np.float32), make.const(99, np.uint8), bias]
    y = make.op("QLinearConv", *inputs, pads=[1, 1, 1, 1], strides=[2, 2])
    recovered = agree(make.model(y), {"x": integers(make.rng, (1, 3, 8, 8), U8)})
    assert ops(recovered) == ["Transpose", "DccConv", "Transpose"]


@pytest.mark.parametrize("opset", [11, 13, 21, 23])
def test_opsets(opset):
    make = Maker(opset=opset)
    a = make.op(
        "QuantizeLinear",
        make.input("N", K),
        *(names := (make.const(0.02, np.float32), make.const(100, np.uint8))),
    )
    a = make.op("DequantizeLinear", a, *names)
    y = make.op("Relu", make.op("Gemm", a, make.weights(K, N)[0]))
    recovered = recover(make.model(make.op("MatMul", y, make.const(np.eye(N), np.float32))))
    assert ops(recovered) == ["QuantizeLinear", "DccGemm", "DccGemm"]
    works = [site.workload for site in recovered.gemms.values()]
    assert [(w.a, w.activation) for w in works] == [("u8", "relu"), ("f32", "none")]


def test_summary_names_every_node():
    make = Maker()
    a = make.dequant(make.input(5, K, dtype=U8), 0.02, 3, np.uint8)
    w, _ = make.weights(K, N)
    y = make.op("Softmax", make.op("MatMul", a, w))
    nodes = recover(
        make.model(make.op("Add", y, make.op("Neg", make.const([1.0], np.float32))))
    ).nodes
    assert [(n["op"], n["precision"], bool(n["site"])) for n in nodes] == [
        ("DequantizeLinear", "int8", True),
        ("DequantizeLinear", "int8", True),
        ("MatMul", "int8", True),
        ("Softmax", "float32", False),
        ("Neg", "folded", False),
        ("Add", "float32", False),
    ]
