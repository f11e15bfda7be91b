"""Small ONNX models for the tests of the front end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


def value(name: str, dims: Sequence[int | str | None] | None, dtype: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, dims)


def tensor(name: str, array) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def node(op: str, inputs: str, outputs: str, name: str = "n", **attributes) -> onnx.NodeProto:
    """A node whose inputs and outputs are words; ``_`` stands for an absent input."""
    names = ["" if word == "_" else word for word in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=name, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str | onnx.ValueInfoProto],
    tensors: dict | Sequence[TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = OPSET,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model; outputs given by name have no declared type."""
    if isinstance(tensors, dict):
        tensors = [tensor(name, array) for name, array in tensors.items()]
    outs = [onnx.ValueInfoProto(name=o) if isinstance(o, str) else o for o in outputs]
    graph = helper.make_graph(nodes, "g", inputs, outs, list(tensors))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions))


def mlp() -> onnx.ModelProto:
    """x[N, 8] -> Gemm, Relu, MatMul, Add -> y[N, 4], float."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w0 b0", "h", "fc0", transB=1),
        node("Relu", "h", "r", "act"),
        node("MatMul", "r w1", "m", "fc1"),
        node("Add", "m b1", "y", "bias"),
    ]
    tensors = {
        "w0": rng.standard_normal((6, 8), np.float32),
        "b0": np.zeros(6, np.float32),
        "w1": rng.standard_normal((6, 4), np.float32),
        "b1": np.ones(4, np.float32),
    }
    return model(nodes, [value("x", ["N", 8])], [value("y", ["N", 4])], tensors)


def qdq(**replaced) -> onnx.ModelProto:
    """x[N, 8] -> Q, DQ, MatMul with an int8 weight, Relu, Q, DQ -> y[N, 5].

    `replaced` overrides initializers: s, z (activation), wq, ws, wz (weight, per column), s2.
    """
    rng = np.random.default_rng(0)
    nodes = [
        node("QuantizeLinear", "x s z", "xq", "quantize"),
        node("DequantizeLinear", "xq s z", "xd", "dequantize"),
        node("DequantizeLinear", "wq ws wz", "wd", "weight", axis=1),
        node("MatMul", "xd wd", "m", "fc"),
        node("Relu", "m", "r", "act"),
        node("QuantizeLinear", "r s2 z", "rq", "requantize"),
        node("DequantizeLinear", "rq s2 z", "y", "out"),
    ]
    tensors = {
        "s": np.float32(0.1),
        "z": np.uint8(3),
        "wq": rng.integers(-128, 127, (8, 5)).astype(np.int8),
        "ws": np.full(5, 0.02, np.float32),
        "wz": np.zeros(5, np.int8),
        "s2": np.float32(0.05),
        **replaced,
    }
    return model(nodes, [value("x", ["N", 8])], [value("y", ["N", 5])], tensors)
