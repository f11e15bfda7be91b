"""Constant folding, and dequantization that moves out of the way."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from recovery import U8, K, Maker, N, agree, compare, evaluate, integers, only, ops, session

from dccompile.frontend.fold import fold_constants
from dccompile.frontend.gate import read
from dccompile.frontend.recover import recover


def test_shape_chains_and_dead_nodes_vanish():
    make = Maker()
    x = make.input("N", 3, 16)
    shape = make.op("Shape", x)
    last = make.op("Gather", shape, make.const(-1, np.int64))
    middle = make.op("Slice", shape, *(make.const([i], np.int64) for i in (1, 2, 0)))
    last = make.op("Unsqueeze", last, make.const([0], np.int64))
    size = make.op("Mul", last, middle)
    shape = make.op("Concat", make.const([-1], np.int64), size, axis=0)
    y = make.op("Reshape", make.op("Identity", x), shape)
    make.op("Relu", y)
    folded = fold_constants(make.model(y))
    assert [node.op_type for node in folded.graph.node] == ["Reshape"]
    (target,) = folded.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(target), [-1, 48])


def test_folding_stops_at_values_that_would_blow_up_the_model():
    make = Maker()
    zeros = make.op("ConstantOfShape", make.const([1 << 10, 1 << 10, 1 << 8], np.int64))
    small = make.op("ConstantOfShape", make.const([256], np.int64))
    part = make.op("Slice", zeros, *(make.const([i], np.int64) for i in (0, 1)))
    y = make.op("Add", small, make.op("Add", part, make.input(256)))
    folded = fold_constants(make.model(y))
    kinds = [node.op_type for node in folded.graph.node]
    assert kinds == ["ConstantOfShape", "Slice", "Add", "Add"]


def test_operators_that_move_values_do_not_hide_the_quantization():
    make = Maker()
    x = make.input("N", 4, K // 4, dtype=U8)
    a = make.dequant(x, 0.02, 9, np.uint8)
    a = make.op("Reshape", make.op("Transpose", a, perm=[0, 2, 1]), make.const([-1, K], np.int64))
    y = make.quant(make.op("MatMul", a, make.weights(K, N)[0]), 0.05, 90, U8)
    y = make.op("Unsqueeze", make.dequant(y, 0.05, 90, np.uint8), make.const([0], np.int64))
    y = make.op("Relu", make.dequant(make.quant(y, 0.05, 90, U8), 0.05, 90, np.uint8))
    recovered = agree(make.model(y), {"x": integers(make.rng, (8, 4, K // 4), U8)})
    assert only(recovered).a == "u8"
    moved = ["Transpose", "Reshape", "DccGemm", "Unsqueeze", "DequantizeLinear", "Relu"]
    assert ops(recovered) == moved


def test_requantization_to_another_scale_stays():
    make = Maker()
    a = make.dequant(make.input(9, 40, dtype=U8), 0.02, 9, np.uint8)
    y = make.quant(make.op("Transpose", a, perm=[1, 0]), 0.023, 9, U8)
    recovered = agree(make.model(y), {"x": integers(make.rng, (9, 40), U8)})
    assert ops(recovered) == ["DccTable", "Transpose"]


def test_quantized_table_is_read_before_it_is_dequantized():
    make = Maker()
    table = make.dequant(make.const(integers(make.rng, (100, 16), U8)), 0.1, 7, np.uint8)
    rows = make.op("Gather", table, make.input("N", 5, dtype=TensorProto.INT64))
    y = make.op("ReduceSum", rows, make.const([1], np.int64), keepdims=0)
    recovered = agree(make.model(y), {"x": make.rng.integers(0, 100, (3, 5))})
    assert ops(recovered) == ["Gather", "DequantizeLinear", "ReduceSum"]
    (large,) = (t for t in recovered.model.graph.initializer if t.dims == [100, 16])
    assert large.data_type == U8


def test_data_outside_of_the_model_file(tmp_path):
    make = Maker()
    make.input("N", 256)
    y = make.op("MatMul", "x", make.const(make.rng.normal(size=(256, 128)), np.float32))
    y = make.op("Mul", y, make.const(make.rng.normal(size=(400, 128)), np.float32))
    x = make.rng.normal(size=(400, 256)).astype(np.float32)
    model = make.model(y)
    (want,) = session(model).run(None, {"x": x})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    graph = read(tmp_path / "m.onnx")
    recovered = recover(graph.model, graph.constants)
    compare(evaluate(recovered, {"x": x})[0], want)
    assert ops(recovered) == ["DccGemm", "Mul"]
