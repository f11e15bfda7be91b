"""Recovery of quantized multiplications: what is made of them equals ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from recovery import (
    F32,
    MS,
    NUMPY,
    S8,
    U8,
    K,
    Maker,
    N,
    agree,
    evaluate,
    integers,
    only,
    ops,
    session,
)

from dccompile.frontend.recover import recover


@pytest.mark.parametrize("rows", [7, "N"])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(
    ("a_dtype", "a_zero", "b_dtype", "b_zero"),
    [
        (U8, 0, S8, 0),
        (U8, 113, S8, 0),
        (S8, 0, S8, 0),
        (S8, -9, S8, 0),
        (U8, 120, U8, 128),
        (U8, 120, U8, 101),
        (S8, 5, S8, 3),
    ],
)
@pytest.mark.parametrize("op", ["MatMul", "MatMul+Relu", "Gemm", "Gemm+Clip"])
def test_qdq_with_8_bit_output(op, a_dtype, a_zero, b_dtype, b_zero, per_column, rows):
    make = Maker()
    x = make.input(rows, K, dtype=a_dtype)
    a = make.dequant(x, 0.02, a_zero, NUMPY[a_dtype])
    gemm = op.startswith("Gemm")
    w, scale = make.weights(K, N, b_dtype, per_column, b_zero, transposed=gemm)
    if gemm:
        bias = make.const(make.rng.integers(-9000, 9000, N), np.int32)
        at = {"axis": 0} if per_column else {}
        zero = np.zeros(np.shape(scale))
        b = make.dequant(bias, np.float32(0.02) * np.float32(scale), zero, np.int32, **at)
        y = make.op("Gemm", a, w, b, transB=1)
    else:
        y = make.op("MatMul", a, w)
    clamp = {"u8": (100, 255), "s8": (-20, 127)}
    if "Relu" in op:
        y = make.op("Relu", y)
    if "Clip" in op:
        y = make.op("Clip", y, make.const(0.0, np.float32), make.const(1.0, np.float32))
        clamp = {"u8": (100, 120), "s8": (-20, 0)}
    y = make.quant(y, 0.05, {U8: 100, S8: -20}[a_dtype], a_dtype)
    feeds = {"x": integers(make.rng, (7, K), a_dtype)}
    work = only(agree(make.model(y), feeds))
    assert work.a == work.out == {U8: "u8", S8: "s8"}[a_dtype]
    assert work.m == (7 if rows == 7 else None)
    assert work.clamp == (clamp[work.out] if "+" in op else None)
    assert work.bias == ("s32" if gemm else "none")
    assert work.b_zero == (b_zero in (101, 3)) and work.bounded


@pytest.mark.parametrize("activation", ["none", "Relu", "Sigmoid", "Tanh", "Clip", "Max"])
@pytest.mark.parametrize("bias", ["none", "left", "right", "quantized"])
def test_qdq_with_float_output(activation, bias):
    make = Maker()
    x = make.input("B", 3, K, dtype=U8)
    w, _ = make.weights(K, N, U8, True, 77, transposed=True)
    a = make.dequant(x, 0.02, 130, np.uint8)
    y = make.op("MatMul", a, make.op("Transpose", w, perm=[1, 0]))
    row = make.const(make.rng.normal(size=(1, N)), np.float32)
    if bias == "quantized":
        row = make.const(make.rng.integers(0, 255, N), np.uint8)
        row = make.dequant(row, 0.01, 128, np.uint8)
    if bias != "none":
        y = make.op("Add", *((row, y) if bias == "left" else (y, row)))
    if activation == "Clip":
        y = make.op("Clip", y, make.const(-0.5, np.float32), make.const(0.5, np.float32))
    elif activation == "Max":
        y = make.op("Max", make.const(0.0, np.float32), y)
    elif activation != "none":
        y = make.op(activation, y)
    recovered = agree(make.model(y), {"x": integers(make.rng, (2, 3, K), U8)})
    work = only(recovered)
    assert (work.out, work.b_zero) == ("f32", True)
    assert work.bias == ("none" if bias == "none" else "f32")
    assert work.activation == {"Max": "relu"}.get(activation, activation.lower())
    assert ops(recovered) == ["DccGemm"]


def test_weights_quantized_in_the_graph_are_folded_first():
    make = Maker()
    a = make.dequant(make.input(5, K, dtype=U8), 0.02, 3, np.uint8)
    w = make.const(make.rng.normal(size=(N, K)), np.float32)
    w = make.op("Identity", make.op("Transpose", make.op("Identity", w)))
    scale = make.rng.uniform(0.01, 0.02, N)
    names = make.const(scale, np.float32), make.const(np.zeros(N), np.int8)
    q = make.op("QuantizeLinear", w, *names, axis=1)
    y = make.op("MatMul", a, make.op("DequantizeLinear", q, *names, axis=-1))
    recovered = agree(make.model(make.quant(y, 0.05, 4, S8)), {"x": integers(make.rng, (5, K), U8)})
    assert (only(recovered).out, ops(recovered)) == ("s8", ["DccGemm"])
    assert {n["precision"] for n in recovered.nodes} == {"int8", "folded"}


def test_every_rounding_between_8_bit_tensors_stays():
    make = Maker()
    a = make.dequant(make.input(64, K, dtype=U8), 0.02, 3, np.uint8)
    y = make.op("MatMul", a, make.weights(K, N)[0])
    y = make.dequant(make.quant(y, 0.0487, 120, U8), 0.0487, 120, np.uint8)
    bias = make.dequant(make.const(make.rng.integers(0, 255, N), np.uint8), 0.0123, 100, np.uint8)
    y = make.quant(make.op("Relu", make.op("Add", y, bias)), 0.0231, 0, U8)
    recovered = agree(make.model(y), {"x": integers(make.rng, (64, K), U8)})
    assert only(recovered).bias == "none"
    assert ops(recovered) == ["DccGemm", "DequantizeLinear", "Add", "Relu", "QuantizeLinear"]
    (add,) = (n for n in recovered.nodes if n["op"] == "Add")
    assert add["precision"] == "float32" and "8-bit" in add["reason"]


def test_a_value_that_others_read_ends_the_fusion():
    make = Maker()
    x = make.input(5, K, dtype=U8)
    a = make.dequant(x, 0.02, 3, np.uint8)
    first = make.op("MatMul", a, make.weights(K, N)[0])
    second = make.op("MatMul", a, make.weights(K, N)[0])
    both = make.op("Mul", make.op("Relu", first), make.op("Sigmoid", first))
    model = make.model(both, make.op("Tanh", second), second)
    recovered = agree(model, {"x": integers(make.rng, (5, K), U8)})
    assert [s.workload.activation for s in recovered.gemms.values()] == ["none", "none"]
    assert "DequantizeLinear" not in ops(recovered)


@pytest.mark.parametrize(
    ("scale", "alpha", "beta"), [(1e-6, 0.3, 1.7), (0.3, 0.3, 1.7), (0.1, 1.0, 1.0)]
)
def test_bias_of_another_scale_is_a_float_bias(scale, alpha, beta):
    make = Maker()
    a = make.dequant(make.input(64, K, dtype=U8), 0.02, 3, np.uint8)
    bias = make.dequant(make.const(make.rng.integers(-9, 9, N), np.int32), scale, 0, np.int32)
    y = make.op("Gemm", a, make.weights(K, N)[0], bias, alpha=alpha, beta=beta)
    model = make.model(make.quant(y, 0.02, 100, U8))
    # ONNX Runtime's optimizer takes every s32 bias for one in the accumulator's scale.
    recovered = agree(model, {"x": integers(make.rng, (64, K), U8)}, optimize=False)
    assert (only(recovered).bias, only(recovered).out) == ("f32", "u8")


def test_7_bit_weights_are_noted():
    make = Maker()
    a = make.dequant(make.input(5, K, dtype=U8), 0.02, 3, np.uint8)
    y = make.quant(make.op("MatMul", a, make.weights(K, N, bits=7)[0]), 0.2, 90, U8)
    assert only(agree(make.model(y), {"x": integers(make.rng, (5, K), U8)})).b_bits == 7


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("op", ["QLinearMatMul", "QGemm", "QGemm to float"])
def test_qlinear_operators(op, dtype, per_column):
    make = Maker()
    x = make.input("N", K, dtype=dtype)
    b_dtype, b_zero = (U8, 133) if dtype == U8 and not per_column else (S8, 0)
    shape = (N,) if per_column else ()
    b = make.const(integers(make.rng, (K, N), b_dtype))
    b_scale = make.rng.uniform(0.001, 0.004, shape).astype(np.float32)
    a_zero, y_zero = (12, 99) if dtype == U8 else (-12, 7)
    inputs = [x, make.const(0.02, np.float32), make.const(a_zero, NUMPY[dtype])]
    inputs += [b, make.const(b_scale), make.const(np.full(shape, b_zero), NUMPY[b_dtype])]
    y_quant = [make.const(0.1, np.float32), make.const(y_zero, NUMPY[dtype])]
    if op == "QLinearMatMul":
        y = make.op("QLinearMatMul", *inputs, *y_quant)
    else:
        bias = make.const(make.rng.integers(-9999, 9999, N), np.int32)
        inputs += [bias] if "float" in op else [bias, *y_quant]
        y = make.op("QGemm", *inputs, domain=MS, alpha=0.5 if "float" in op else 1.0)
    work = only(agree(make.model(y), {"x": integers(make.rng, (9, K), dtype)}))
    assert work.out == ("f32" if "float" in op else {U8: "u8", S8: "s8"}[dtype])
    assert work.bias == ("none" if op == "QLinearMatMul" else "s32")


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("b_zero", [None, 0, 140, "columns"])
@pytest.mark.parametrize("a_zero", ["none", "constant", "runtime"])
def test_matmul_integer(a_zero, b_zero, dtype):
    make = Maker()
    x = make.input("N", K, dtype=dtype)
    b = make.const(integers(make.rng, (K, N), U8 if b_zero in (140, "columns") else S8))
    feeds = {"x": integers(make.rng, (6, K), dtype)}
    zeros = [{"none": "", "constant": make.const(44, NUMPY[dtype]), "runtime": "z"}[a_zero]]
    if a_zero == "runtime":
        make.input(dtype=dtype, name="z")
        feeds["z"] = np.array(44, NUMPY[dtype])
    if b_zero is not None:
        value = make.rng.integers(90, 170, N) if b_zero == "columns" else b_zero
        zeros.append(make.const(value, np.uint8 if b_zero else np.int8))
    y = make.op("MatMulInteger", x, b, *zeros)
    work = only(agree(make.model(y), feeds))
    assert (work.out, work.runtime) == ("s32", a_zero == "runtime")
    assert work.b_zero == (b_zero in (140, "columns"))


@pytest.mark.parametrize("ending", ["sums", "Cast", "DequantizeLinear", "per column"])
def test_matmul_integer_with_an_integer_bias(ending):
    make = Maker()
    x = make.input("N", K, dtype=U8)
    y = make.op("MatMulInteger", x, make.const(integers(make.rng, (K, N), S8)))
    y = make.op("Add", make.const(make.rng.integers(-999, 999, N), np.int32), y)
    if ending == "Cast":
        y = make.op("Mul", make.op("Cast", y, to=F32), make.const(0.01, np.float32))
    elif ending == "DequantizeLinear":
        y = make.op("DequantizeLinear", y, make.const(0.01, np.float32))
    elif ending == "per column":
        scale = make.const(make.rng.uniform(0.01, 0.02, N), np.float32)
        y = make.op("DequantizeLinear", y, scale, axis=-1)
    recovered = agree(make.model(y), {"x": integers(make.rng, (6, K), U8)})
    assert (only(recovered).bias, ops(recovered)) == ("s32", ["DccGemm"])
    assert only(recovered).out == ("s32" if ending == "sums" else "f32")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(
    "form", ["chain", "two Muls", "static scale", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"]
)
def test_dynamic_quantization(form, per_column, bias):
    make = Maker()
    x = make.input("N", 3, K)
    b_dtype = S8 if per_column else U8
    b = make.const(integers(make.rng, (K, N), b_dtype))
    shape = (N,) if per_column else ()
    scale = make.const(make.rng.uniform(0.001, 0.01, shape), np.float32)
    zero = make.const(np.full(shape, 0 if per_column else 131), NUMPY[b_dtype])
    row = make.const(make.rng.normal(size=N), np.float32)
    if form == "DynamicQuantizeMatMul":
        y = make.op(form, x, b, scale, zero, *([row] if bias else []), domain=MS)
    else:
        q, a_scale, a_zero = make.op("DynamicQuantizeLinear", x, outputs=3)
        if form == "MatMulIntegerToFloat":
            more = [row] if bias else []
            y = make.op(form, q, b, a_scale, scale, a_zero, zero, *more, domain=MS)
        else:
            y = make.op("MatMulInteger", q, b, a_zero, zero)
            y = make.op("Cast", y, to=F32)
            if form == "two Muls":
                y = make.op("Mul", a_scale, make.op("Mul", y, scale))
            elif form == "static scale":
                y = make.op("Mul", y, scale)
            else:
                y = make.op("Mul", y, make.op("Mul", a_scale, scale))
            y = make.op("Add", row, y) if bias else y
    y = make.op("Relu", y)
    x = make.rng.normal(size=(2, 3, K)).astype(np.float32)
    recovered = agree(make.model(y), {"x": x})
    work = only(recovered)
    assert (work.out, work.runtime, work.activation) == ("f32", True, "relu")
    assert work.bias == ("f32" if bias else "none")
    assert ops(recovered) == ["DynamicQuantizeLinear", "DccGemm"]
    assert "int8-dynamic" in {n["precision"] for n in recovered.nodes}


def test_dynamic_scales_between_dequantize_and_matmul():
    make = Maker()
    q, scale, zero = make.op("DynamicQuantizeLinear", make.input(4, K), outputs=3)
    a = make.op("DequantizeLinear", q, scale, zero)
    y = make.op("Gemm", a, make.weights(K, N)[0], make.const(make.rng.normal(size=N), np.float32))
    x = make.rng.normal(size=(4, K)).astype(np.float32)
    work = only(agree(make.model(make.quant(y, 0.05, 9, U8)), {"x": x}))
    assert (work.out, work.runtime, work.bias) == ("f32", True, "f32")


@pytest.mark.parametrize(("y_scale", "bounded"), [(1e-3, True), (1e-9, False)])
def test_outputs_that_can_leave_the_32_bit_range_are_noted(y_scale, bounded):
    make = Maker()
    a = make.dequant(make.input(4, K, dtype=U8), 0.02, 3, np.uint8)
    y = make.quant(make.op("MatMul", a, make.weights(K, N)[0]), y_scale, 3, U8)
    assert only(recover(make.model(y))).bounded is bounded


CLAMPS = {
    "inner": ((-0.5, 0.5), (0.0, None)),
    "outer": ((0.0, None), (-0.3, 0.7)),
    "apart": ((-0.5, -0.25), (0.1, 0.2)),
    "upper": ((None, 0.3),),
    "relu, lower": ((0.0, None), (0.3, None)),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", CLAMPS)
def test_clamps_in_a_row(name, quantized):
    make = Maker()
    a = make.dequant(make.input(32, K, dtype=U8), 0.02, 128, np.uint8)
    y = make.op("MatMul", a, make.weights(K, N)[0])
    for bounds in CLAMPS[name]:
        names = ("" if bound is None else make.const(bound, np.float32) for bound in bounds)
        y = make.op("Clip", y, *names)
    if quantized:
        y = make.quant(y, 0.004, 100, U8)
    x = integers(make.rng, (32, K), U8)
    recovered = recover(make.model(y))
    (got,), (want,) = evaluate(recovered, {"x": x}), session(make.model(y)).run(None, {"x": x})
    np.testing.assert_allclose(got.astype(float), want.astype(float), atol=quantized or 1e-5)
    work = only(recovered)
    if quantized:
        assert (ops(recovered), work.activation) == (["DccGemm"], "none")
    else:
        # A bound on one side, other than 0, is no activation of the kernels.
        activation = {"upper": "none", "relu, lower": "relu"}.get(name, "clip")
        assert work.activation == activation
        assert len(ops(recovered)) == (1 if activation == "clip" else 2)


def test_runtime_factors_beyond_the_first_stay():
    make = Maker()
    y = make.op(
        "MatMulInteger", make.input(4, K, dtype=U8), make.const(integers(make.rng, (K, N), S8))
    )
    y = make.op("Mul", make.op("Cast", y, to=F32), make.input(name="s"))
    y = make.op("Mul", y, make.input(1, name="t"))
    feeds = {
        "x": integers(make.rng, (4, K), U8),
        "s": np.array(0.01, np.float32),
        "t": np.array([0.3], np.float32),
    }
    recovered = agree(make.model(y), feeds)
    assert (ops(recovered), only(recovered).runtime) == (["DccGemm", "Mul"], True)


def test_sums_dequantized_per_row_stay_sums():
    make = Maker()
    x = make.input(N, K, dtype=U8)
    y = make.op("MatMulInteger", x, make.const(integers(make.rng, (K, N), S8)))
    scale = make.const(make.rng.uniform(0.01, 0.02, N), np.float32)
    model = make.model(make.op("DequantizeLinear", y, scale, axis=0))
    recovered = agree(model, {"x": integers(make.rng, (N, K), U8)})
    assert (ops(recovered), only(recovered).out) == (["DccGemm", "DequantizeLinear"], "s32")


@pytest.mark.parametrize(("k", "out"), [(60000, "f32"), (70000, "s32")])
def test_runtime_zero_points_count_in_the_32_bit_range(k, out):
    make = Maker()
    zero = make.input(dtype=S8, name="z")
    weights = make.const(np.full((k, 2), 127), np.int8)
    y = make.op("MatMulInteger", make.input(1, k, dtype=S8), weights, zero)
    y = make.op("Mul", make.op("Cast", y, to=F32), make.const(0.01, np.float32))
    assert only(recover(make.model(y))).out == out
