"""The peers' fastest single-operator routes for one Gemm workload, from the same weights.

Quantized: QLinearMatMul in ONNX Runtime, a quantize-dequantize model in OpenVINO, torch's
quantized linear on its fbgemm and onednn engines. Float: MatMul, with fp16 weights torch's FBGEMM
linear, with 8-bit weights OpenVINO's behind a DequantizeLinear and torch's product with packed
ones; ONNX Runtime gets these in float, of codes it makes a product 5 to 600 times as slow, or one
of quantized activations. None of them fuses fewer operations than the workload asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..workload import Gemm, GemmWeights
from .operators import guarded, onnx_model, quantized_engine, torch_run
from .peers import PEERS, PeerError, Prepared, aligned

# Scales of A and of the output. Powers of two, so that b_scale = scale * Y / A and every way to
# associate a_scale * b_scale / y_scale give the same float.
_A_SCALE = 2.0**-6
_Y_SCALE = 2.0**-3

Maker = Callable[[Gemm, GemmWeights, np.ndarray, int], Prepared]


def names(workload: Gemm) -> list[str]:
    """Peers that have a route for the workload, whether installed or not."""
    if workload.a == "f32":
        extra = {"f16": ["torch-fp16"], "s8": ["torch-int8"]}.get(workload.b, [])
        return ["onnxruntime", "openvino", "torch", *extra]
    return ["onnxruntime", "openvino", "torch-fbgemm", "torch-onednn"]


def prepare(
    name: str, workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int
) -> Prepared:
    """A peer ready to compute the workload on `a` (m, k).

    Raises PeerError with the peer's reason where it cannot.
    """
    makers: dict[str, Maker] = {
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "torch": _torch_float,
        "torch-fp16": _torch_fp16,
        "torch-int8": _torch_int8,
        "torch-fbgemm": _torch_quantized("fbgemm"),
        "torch-onednn": _torch_quantized("onednn"),
    }
    if workload.bias != "none" or workload.activation != "none" or workload.runtime:
        raise PeerError("benches compare plain and requantized products only")
    if workload.a != "f32" and workload.out not in ("u8", "s8"):
        raise PeerError("benches compare integer products with an integer output only")
    return guarded(name, lambda: makers[name](workload, weights, a, threads))


def _b_scale(weights: GemmWeights) -> np.ndarray:
    assert weights.scale is not None
    return (weights.scale * np.float32(_Y_SCALE / _A_SCALE)).astype(np.float32)


def _model(nodes: list[Any], tensors: dict[str, np.ndarray], workload: Gemm, m: int) -> bytes:
    ends = ("a", workload.a, [m, workload.k]), ("y", workload.out, [m, workload.n])
    return onnx_model(nodes, tensors, *ends)


def _constants(workload: Gemm, weights: GemmWeights) -> dict[str, np.ndarray]:
    code = {"u8": np.uint8, "s8": np.int8}
    b_zero = np.zeros(workload.n) if weights.b_zero is None else weights.b_zero
    return {
        "a_scale": np.array(_A_SCALE, np.float32),
        "a_zero": np.array(weights.a_zero, code[workload.a]),
        "b": weights.b,
        "b_scale": _b_scale(weights),
        "b_zero": b_zero.astype(np.int8),
        "y_scale": np.array(_Y_SCALE, np.float32),
        "y_zero": np.array(workload.zero_point, code[workload.out]),
    }


def _wide(weights: GemmWeights) -> np.ndarray:
    """The weights as float32."""
    wide = weights.b.astype(np.float32)
    return wide if weights.scale is None else wide * weights.scale


def _float_model(workload: Gemm, weights: GemmWeights, m: int, codes: bool = False) -> bytes:
    """`codes`: with 8-bit weights as they are."""
    from onnx import TensorProto, helper

    tensors = {"b": weights.b}
    if workload.b == "s8" and codes:
        assert weights.scale is not None
        tensors["b_scale"] = weights.scale
        nodes = [
            helper.make_node("DequantizeLinear", ["b", "b_scale"], ["wide"], axis=1),
            helper.make_node("MatMul", ["a", "wide"], ["y"]),
        ]
    elif workload.b in ("f32", "s8"):
        tensors = {"b": _wide(weights)}
        nodes = [helper.make_node("MatMul", ["a", "b"], ["y"])]
    else:
        nodes = [
            helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["a", "wide"], ["y"]),
        ]
    return _model(nodes, tensors, workload, m)


def _onnxruntime(workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int) -> Prepared:
    from onnx import helper

    if workload.a == "f32":
        model = _float_model(workload, weights, len(a))
    else:
        inputs = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "y_scale", "y_zero"]
        node = helper.make_node("QLinearMatMul", inputs, ["y"])
        model = _model([node], _constants(workload, weights), workload, len(a))
    return PEERS["onnxruntime"].prepare(model, {"a": a}, threads)


def _openvino(workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int) -> Prepared:
    from onnx import helper

    if workload.a == "f32":
        model = _float_model(workload, weights, len(a), codes=True)
    else:
        nodes = [
            helper.make_node("DequantizeLinear", ["a", "a_scale", "a_zero"], ["fa"]),
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["fb"], axis=1),
            helper.make_node("MatMul", ["fa", "fb"], ["fy"]),
            helper.make_node("QuantizeLinear", ["fy", "y_scale", "y_zero"], ["y"]),
        ]
        model = _model(nodes, _constants(workload, weights), workload, len(a))
    return PEERS["openvino"].prepare(model, {"a": a}, threads)


def _torch_quantized(engine: str) -> Maker:
    def make(workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int) -> Prepared:
        import torch

        if (workload.a, workload.out) != ("u8", "u8"):
            raise PeerError("quantized linear takes and gives unsigned 8-bit activations only")
        quantized_engine(engine)
        b = torch.from_numpy(np.ascontiguousarray(weights.b.T))
        scales = torch.from_numpy(_b_scale(weights).astype(np.float64))
        zeros = torch.zeros(workload.n, dtype=torch.int64)
        if weights.b_zero is not None:
            zeros = torch.from_numpy(weights.b_zero.astype(np.int64))
        quantized = torch._make_per_channel_quantized_tensor(b, scales, zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        x = torch.from_numpy(aligned(a))
        x = torch._make_per_tensor_quantized_tensor(x, _A_SCALE, weights.a_zero)
        linear, zero = torch.ops.quantized.linear, workload.zero_point
        return torch_run(lambda: linear(x, packed, _Y_SCALE, zero), lambda y: y.int_repr(), threads)

    return make


def _torch_float(workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int) -> Prepared:
    import torch

    b = torch.from_numpy(np.ascontiguousarray(_wide(weights).T))
    x, linear = torch.from_numpy(aligned(a)), torch.nn.functional.linear
    return torch_run(lambda: linear(x, b), lambda y: y, threads)


def _torch_fp16(workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int) -> Prepared:
    import torch

    quantized_engine("fbgemm")
    b = torch.from_numpy(np.ascontiguousarray(weights.b.T.astype(np.float32)))
    packed = torch.ops.quantized.linear_prepack_fp16(b, None)
    x, linear = torch.from_numpy(aligned(a)), torch.ops.quantized.linear_dynamic_fp16
    return torch_run(lambda: linear(x, packed), lambda y: y, threads)


def _torch_int8(workload: Gemm, weights: GemmWeights, a: np.ndarray, threads: int) -> Prepared:
    import torch

    assert weights.scale is not None
    b = torch.from_numpy(np.ascontiguousarray(weights.b.T))
    x, scale = torch.from_numpy(aligned(a)), torch.from_numpy(weights.scale)
    return torch_run(lambda: torch._weight_int8pack_mm(x, b, scale), lambda y: y, threads)
