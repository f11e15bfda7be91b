"""Recovery of float multiplications, and what is left in float, with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from recovery import (
    F32,
    MS,
    U8,
    K,
    Maker,
    N,
    agree,
    compare,
    evaluate,
    integers,
    only,
    ops,
    session,
)

from dccompile.frontend.recover import recover


@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("c", ["none", "scalar", "row", "rows", "input"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, 1.7), (0.3, 0.6)])
def test_float_gemm(alpha, beta, c, trans):
    make = Maker()
    a = make.input(*((K, "M") if trans[0] else ("M", K)))
    w = make.const(make.rng.normal(size=(N, K) if trans[1] else (K, N)), np.float32)
    feeds = {"x": make.rng.normal(size=(K, 6) if trans[0] else (6, K)).astype(np.float32)}
    inputs = [a, w]
    shapes = {"scalar": (1,), "row": (1, N), "rows": (6, 1)}
    if c in shapes:
        inputs.append(make.const(make.rng.normal(size=shapes[c]), np.float32))
    elif c == "input":
        inputs.append(make.input(6, N, name="c"))
        feeds["c"] = make.rng.normal(size=(6, N)).astype(np.float32)
    y = make.op("Gemm", *inputs, alpha=alpha, beta=beta, transA=trans[0], transB=trans[1])
    work = only(agree(make.model(make.op("Tanh", y)), feeds))
    apart = c in ("rows", "input") or alpha == 0.3
    assert work.bias == ("f32" if c in ("scalar", "row") and not apart else "none")
    assert work.activation == ("none" if apart else "tanh")


def test_float_matmuls_in_a_row_with_epilogues():
    make = Maker()
    y = make.input("N", 512)
    for k, n, activation in ((512, 256, "Relu"), (256, 64, "Sigmoid"), (64, 1, "Tanh")):
        w = make.const(make.rng.normal(size=(1, n, k)) / np.sqrt(k), np.float32)
        w = make.op("Squeeze", w, make.const([0], np.int64))
        y = make.op("MatMul", y, make.op("Transpose", w))
        y = make.op(activation, make.op("Add", y, make.const(make.rng.normal(size=n), np.float32)))
    x = make.rng.normal(size=(3, 512)).astype(np.float32)
    recovered = agree(make.model(y), {"x": x})
    assert ops(recovered) == ["DccGemm"] * 3
    assert [s.workload.bias for s in recovered.gemms.values()] == ["f32"] * 3
    assert [s.workload.activation for s in recovered.gemms.values()] == ["relu", "sigmoid", "tanh"]
    assert not recovered.model.graph.initializer


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (2, 1, 3, K)])
def test_activations_of_any_rank(shape):
    make = Maker()
    w = make.const(make.rng.normal(size=(K, N)), np.float32)
    y = make.op("MatMul", make.input(*shape), w)
    y = make.op("Add", make.const(make.rng.normal(size=N), np.float32), y)
    work = only(agree(make.model(y), {"x": make.rng.normal(size=shape).astype(np.float32)}))
    assert (work.m, work.bias) == (int(np.prod(shape[:-1])), "f32")


def test_bias_that_widens_the_output_is_not_fused():
    make = Maker()
    y = make.op("MatMul", make.input(4, K), make.const(make.rng.normal(size=(K, N)), np.float32))
    y = make.op("Add", y, make.const(make.rng.normal(size=(1, 1, N)), np.float32))
    recovered = agree(make.model(y), {"x": make.rng.normal(size=(4, K)).astype(np.float32)})
    assert ops(recovered) == ["DccGemm", "Add"]


def test_float16_weights():
    make = Maker()
    half = make.const(make.rng.normal(size=(N, K)), np.float16)
    y = make.op("MatMul", make.input(4, K), make.op("Transpose", make.op("Cast", half, to=F32)))
    recovered = agree(make.model(y), {"x": make.rng.normal(size=(4, K)).astype(np.float32)})
    assert only(recovered).b == "f16" and ops(recovered) == ["DccGemm"]
    assert recovered.nodes[-1]["precision"] == "fp16-weights"


@pytest.mark.parametrize("largest", [1.0, 65504.0, 65520.0])
def test_fp16_weights_on_request(largest):
    make = Maker()
    w = np.linspace(0, largest, K * N, dtype=np.float32).reshape(K, N)
    y = make.op("MatMul", make.input(4, K), make.const(w))
    model = make.model(y)
    recovered = recover(model, precision="fp16-weights")
    assert only(recovered).b == ("f32" if largest > 65504 else "f16")
    assert bool(recovered.nodes[-1]["reason"]) == (largest > 65504)
    assert only(recover(model)).b == "f32"


def test_microsoft_fusions():
    make = Maker()
    w = make.const(make.rng.normal(size=(N, K)), np.float32)
    x = make.input(4, K)
    y = make.op("FusedMatMul", x, w, domain=MS, transB=1, alpha=0.25)
    c = make.const(make.rng.normal(size=N), np.float32)
    z = make.op("FusedGemm", x, w, c, domain=MS, transB=1, activation="Sigmoid")
    recovered = agree(make.model(y, z), {"x": make.rng.normal(size=(4, K)).astype(np.float32)})
    assert ops(recovered) == ["DccGemm", "Mul", "DccGemm"]
    assert [s.workload.activation for s in recovered.gemms.values()] == ["none", "sigmoid"]


def test_constants_given_apart_from_the_model():
    make = Maker()
    w = make.rng.normal(size=(K, N)).astype(np.float32)
    model = make.model(make.op("MatMul", make.input(4, K), make.const(w)))
    x = make.rng.normal(size=(4, K)).astype(np.float32)
    want = session(model).run(None, {"x": x})[0]
    name = model.graph.initializer[0].name
    model.graph.initializer[0].ClearField("raw_data")
    compare(evaluate(recover(model, {name: w}), {"x": x})[0], want)


def reason_of(recovered, op):
    (node,) = (n for n in recovered.nodes if n["op"] == op)
    return node["precision"], node["reason"]


def test_weights_that_are_not_constant_are_left_alone():
    make = Maker()
    a = make.dequant(make.input(5, K, dtype=U8), 0.02, 3, np.uint8)
    w = make.dequant(make.input(K, N, dtype=U8, name="w"), 0.02, 3, np.uint8)
    model = make.model(make.quant(make.op("MatMul", a, w), 0.1, 3, U8))
    recovered = recover(model)
    assert not recovered.gemms
    assert ops(recovered) == ["DequantizeLinear"] * 2 + ["MatMul", "QuantizeLinear"]
    assert reason_of(recovered, "MatMul") == ("float32", "weights are not constant")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("per row", "activations have more than one scale"),
        ("blocked activations", "activations have scales in blocks"),
        ("int16", "activations are int16"),
        ("blocked weights", "weights are scaled in blocks"),
        ("row scales", "weights are scaled per row"),
        ("int16 weights", "weights are int16"),
        ("float weights", "weights are not quantized"),
        ("large sums", "sums over k="),
    ],
)
def test_other_quantization_runs_in_float_with_a_reason(kind, reason):
    make = Maker(opset=21)
    k = 70000 if kind == "large sums" else K
    n = 4 if kind == "large sums" else N
    a_dtype = TensorProto.INT16 if kind == "int16" else U8
    x = make.input(6, k, dtype=a_dtype)
    rng, a, w = make.rng, x, ""
    if kind == "per row":
        a = make.dequant(x, rng.uniform(0.01, 0.02, 6), np.full(6, 3), np.uint8, axis=0)
    elif kind == "blocked activations":
        scale = rng.uniform(0.01, 0.02, (6, 3))
        a = make.dequant(x, scale, np.full((6, 3), 4), np.uint8, axis=1, block_size=16)
    else:
        a = make.dequant(x, 0.02, 3, np.int16 if kind == "int16" else np.uint8)
    b = make.const(
        np.full((k, n), 127) if kind == "large sums" else rng.integers(-99, 99, (k, n)),
        np.int16 if kind == "int16 weights" else np.int8,
    )
    if kind == "blocked weights":
        scale = rng.uniform(0.01, 0.02, (3, N))
        w = make.dequant(b, scale, np.full((3, N), 4), np.int8, axis=0, block_size=16)
    elif kind == "row scales":
        w = make.dequant(b, rng.uniform(0.01, 0.02, K), np.full(K, 4), np.int8, axis=0)
    elif kind == "float weights":
        w = make.op("Cast", b, to=F32)
    else:
        w = make.dequant(b, 0.01, 0, np.int16 if kind == "int16 weights" else np.int8)
    model = make.model(make.op("MatMul", a, w))
    x = {
        "int16": rng.integers(-999, 999, (6, k)).astype(np.int16),
    }.get(kind, integers(rng, (6, k), U8))
    recovered = recover(model)
    # ONNX Runtime's optimizer fails on some of these or quantizes what is float.
    (got,), (want,) = (
        evaluate(recovered, {"x": x}),
        session(model, optimize=False).run(None, {"x": x}),
    )
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert only(recovered).a == "f32"
    precision, found = reason_of(recovered, "MatMul")
    assert precision == "float32" and found.startswith(reason)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("double", "activations are double"),
        ("left", "the constant operand is on the left"),
        ("vector", "weights are a vector"),
        ("batch", "weights differ along the batch"),
    ],
)
def test_float_products_that_stay_generic(kind, reason):
    make = Maker()
    dtype = np.float64 if kind == "double" else np.float32
    shape = {"vector": (K,), "batch": (2, K, N), "left": (5, 5)}.get(kind, (K, N))
    x = make.input(2, 5, K, dtype=TensorProto.DOUBLE) if kind == "double" else make.input(5, K)
    w = make.const(make.rng.normal(size=shape), dtype)
    y = make.op("MatMul", *((w, x) if kind == "left" else (x, w)))
    recovered = recover(make.model(y))
    assert not recovered.gemms and len(ops(recovered)) == 1
    assert recovered.nodes[0]["reason"].startswith(reason)


def test_products_inside_branches_keep_what_they_read():
    make = Maker()
    x = make.input(5, K)
    y = make.op("MatMul", x, make.const(make.rng.normal(size=(K, N)), np.float32))
    flag = make.input(dtype=TensorProto.BOOL, name="flag")
    relu = helper.make_node("Relu", [y], ["a"])
    same = helper.make_node("Identity", [y], ["b"])
    branches = [
        helper.make_graph([node], "g", [], [helper.make_empty_tensor_value_info(node.output[0])])
        for node in (relu, same)
    ]
    out = make.op("If", flag, then_branch=branches[0], else_branch=branches[1])
    model = make.model(out, make.op("Relu", y))
    x = make.rng.normal(size=(5, K)).astype(np.float32)
    recovered = agree(model, {"x": x, "flag": np.array(False)})
    assert only(recovered).activation == "none"
