"""Small ONNX models for tests, made with onnx.helper; weights seeded."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}


class Graph:
    """Collects nodes and initializers, then becomes a checked model."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: list[Any], dtype: str = "float32") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, _DTYPES[dtype], shape))
        return name

    def constant(self, value: Any, dtype: str = "float32") -> str:
        name = f"const{len(self.constants)}"
        array = np.asarray(value, dtype=dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"v{len(self.nodes)}"
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=name, **attributes))
        return out

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        values = [onnx.ValueInfoProto(name=o) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, values, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 10
        model = onnx.shape_inference.infer_shapes(model)
        types = {v.name: v for v in [*model.graph.value_info, *model.graph.input]}
        for i, name in enumerate(outputs):
            if not model.graph.output[i].type.ByteSize():
                model.graph.output[i].CopyFrom(types[name])
        return model


def mlp(dims: tuple[int, ...], seed: int = 0) -> onnx.ModelProto:
    """Float layers with bias and ReLU, a sigmoid at the end; input x (N, dims[0]), output y."""
    g = Graph(seed)
    value = g.input("x", ["N", dims[0]])
    for k, n in itertools.pairwise(dims):
        weights = g.random.normal(size=(k, n)) / np.sqrt(k)
        value = g.op("MatMul", value, g.constant(weights))
        value = g.op("Add", value, g.constant(g.random.normal(size=n) * 0.1))
        value = g.op("Relu", value) if n != dims[-1] else g.op("Sigmoid", value, out="y")
    return g.model("y")


def quantized_mlp(dims: tuple[int, ...], seed: int = 0) -> onnx.ModelProto:
    """The same shape of model in QDQ form: u8 activations, s8 weights per column, s32 bias."""
    g = Graph(seed)
    x = g.input("x", ["N", dims[0]])
    scale = np.float32(0.02)
    at, zero = g.constant(scale), g.constant(120, "uint8")
    value = g.op("QuantizeLinear", x, at, zero)
    for k, n in itertools.pairwise(dims):
        weights = g.random.normal(size=(k, n)) / np.sqrt(k)
        steps = (np.abs(weights).max(axis=0) / 127).astype(np.float32)
        codes = np.clip(np.rint(weights / steps), -127, 127)
        bias = g.random.integers(-2000, 2000, n)
        a = g.op("DequantizeLinear", value, at, zero)
        zeros = g.constant(np.zeros(n), "int8")
        b = g.op("DequantizeLinear", g.constant(codes, "int8"), g.constant(steps), zeros, axis=1)
        c = g.op("DequantizeLinear", g.constant(bias, "int32"), g.constant(scale * steps), axis=0)
        value = g.op("Gemm", a, b, c)
        last = n == dims[-1]
        if not last:
            value = g.op("Relu", value)
        at, zero = g.constant(scale), g.constant(100 if last else 0, "uint8")
        value = g.op("QuantizeLinear", value, at, zero)
    g.op("DequantizeLinear", value, at, zero, out="y")
    return g.model("y")


def mixed() -> onnx.ModelProto:
    """Many kinds of operators, open batch; outputs scores (N, 7), table rows, and the input."""
    g = Graph(3)
    x = g.input("x", ["N", 12])
    index = g.input("index", ["N", 3], "int64")
    table = g.constant(g.random.normal(size=(50, 5)))
    rows = g.op("Gather", table, index, axis=0)
    pooled = g.op("ReduceSum", rows, g.constant([1], "int64"), keepdims=0)
    hidden = g.op("MatMul", x, g.constant(g.random.normal(size=(12, 9))))
    hidden = g.op("Tanh", hidden)
    both = g.op("Concat", hidden, pooled, axis=1)
    shaped = g.op("Reshape", both, g.constant([-1, 2, 7], "int64"))
    turned = g.op("Transpose", shaped, perm=[0, 2, 1])
    product = g.op("MatMul", shaped, turned)
    flat = g.op("Reshape", product, g.constant([-1, 4], "int64"))
    score = g.op("MatMul", flat, g.constant(g.random.normal(size=(4, 7))))
    g.op("Softmax", score, axis=-1, out="scores")
    g.op("Identity", rows, out="rows")
    g.op("Identity", x, out="same")
    return g.model("scores", "rows", "same")
