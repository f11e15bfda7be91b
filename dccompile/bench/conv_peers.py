"""The peers' fastest single-operator routes for one Conv workload, from the same weights.

Quantized: QLinearConv in ONNX Runtime, in the layout of ONNX (channels first) and in its own
channels-last form; a quantize-dequantize model in OpenVINO; torch's quantized convolution on its
fbgemm and onednn engines, channels last. Float: Conv, and torch's, channels last. All of them
fuse bias, zero points and requantization.

ONNX Runtime and OpenVINO change the layout of what enters and leaves a model. Where the output
can be the input of the same layer again, `layers` asks for a chain of layers as well as one: the
difference is the kernel alone, without those changes and the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..workload import Conv, ConvWeights
from .operators import guarded, onnx_model, quantized_engine, torch_run
from .peers import PEERS, PeerError, Prepared, aligned

LAYERS = 5
# Scale of A and of C, a power of two: every way to associate a_scale * b_scale / y_scale gives
# the same float, which is b_scale.
_SCALE = 2.0**-4

Maker = Callable[[Conv, ConvWeights, np.ndarray, int, int], Prepared]


def names(workload: Conv) -> list[str]:
    """Routes of peers for the workload, whether installed or not."""
    if workload.a == "f32":
        return ["onnxruntime", "openvino", "torch"]
    return ["onnxruntime", "onnxruntime-nhwc", "openvino", "torch-fbgemm", "torch-onednn"]


def layers(workload: Conv, name: str) -> int:
    """Length of a chain of the layer, 1 where its output cannot be its input, and for torch.

    A chain of torch calls would save nothing: it is called for every operator.
    """
    same = workload.channels == workload.filters and workload.outputs == workload.size
    return LAYERS if same and workload.a == workload.out and not name.startswith("torch") else 1


def prepare(
    name: str, workload: Conv, weights: ConvWeights, a: np.ndarray, threads: int, count: int = 1
) -> Prepared:
    """A peer ready to compute the workload on `a` (batch, d, h, w, channels), `count` times over.

    Raises PeerError with the peer's reason where it cannot.
    """
    makers: dict[str, Maker] = {
        "onnxruntime": _onnxruntime,
        "onnxruntime-nhwc": _onnxruntime_nhwc,
        "openvino": _openvino,
        "torch": _torch_float,
        "torch-fbgemm": _torch_quantized("fbgemm"),
        "torch-onednn": _torch_quantized("onednn"),
    }
    if workload.residual or workload.activation != "none" or workload.clamped:
        raise PeerError("benches compare convolutions with a bias and no more")
    if (workload.a, workload.out) not in (("u8", "u8"), ("f32", "f32")):
        raise PeerError("benches compare convolutions with the input's type of output only")
    return guarded(name, lambda: makers[name](workload, weights, a, threads, count))


def rank_of(workload: Conv) -> int:
    """Spatial dims that the peers see."""
    return 2 if workload.size[0] == workload.kernel[0] == 1 else 3


def _first(workload: Conv, a: np.ndarray) -> np.ndarray:
    """(batch, d, h, w, channels) with channels first, as ONNX has it."""
    moved = np.moveaxis(a, 4, 1)
    return np.ascontiguousarray(moved[:, :, 0] if rank_of(workload) == 2 else moved)


def _last(workload: Conv, c: np.ndarray) -> np.ndarray:
    """The opposite of `_first`."""
    full = c[:, :, None] if rank_of(workload) == 2 else c
    return np.ascontiguousarray(np.moveaxis(full, 1, 4))


def filters_of(workload: Conv, weights: ConvWeights) -> np.ndarray:
    """B as (filters, channels / groups, [kd,] kh, kw)."""
    b = np.moveaxis(weights.b, (4, 3), (0, 1))
    return np.ascontiguousarray(b[:, :, 0] if rank_of(workload) == 2 else b)


def attributes_of(workload: Conv) -> dict[str, Any]:
    rank = rank_of(workload)
    pads = workload.pads[3 - rank :]
    return {
        "kernel_shape": workload.kernel[3 - rank :],
        "strides": workload.strides[3 - rank :],
        "dilations": workload.dilations[3 - rank :],
        "pads": [p for p, _ in pads] + [p for _, p in pads],
        "group": workload.groups,
    }


def _constants(workload: Conv, weights: ConvWeights) -> dict[str, np.ndarray]:
    """Every layer has these; ONNX Runtime takes the bias as it is, OpenVINO's is dequantized."""
    assert weights.scale is not None and weights.bias is not None
    return {
        "scale": np.array(_SCALE, np.float32),
        "a_zero": np.array(weights.a_zero, np.uint8),
        "y_zero": np.array(weights.zero_point, np.uint8),
        "b": filters_of(workload, weights),
        "b_scale": weights.scale,
        "b_zero": np.zeros(workload.filters, np.int8),
        "bias": weights.bias,
    }


def _floats(workload: Conv, weights: ConvWeights) -> dict[str, np.ndarray]:
    assert weights.bias is not None
    return {"b": filters_of(workload, weights), "bias": weights.bias}


def _model(
    workload: Conv, constants: dict[str, np.ndarray], nodes: list[Any], x: np.ndarray, last: bool
) -> bytes:
    """A model from x to y_<n>, the output of the last of the nodes."""
    dims = workload.outputs[3 - rank_of(workload) :]
    y = [len(x), *dims, workload.filters] if last else [len(x), workload.filters, *dims]
    ends = ("x", workload.a, x.shape), (nodes[-1].output[0], workload.out, y)
    return onnx_model(nodes, constants, *ends)


def _chain(count: int) -> list[tuple[str, str]]:
    """Names of input and output of every layer."""
    tensors = ["x", *(f"y_{i}" for i in range(count))]
    return list(itertools.pairwise(tensors))


def _float_nodes(workload: Conv, count: int) -> list[Any]:
    from onnx import helper

    attributes = attributes_of(workload)
    return [helper.make_node("Conv", [x, "b", "bias"], [y], **attributes) for x, y in _chain(count)]


def _qlinear_nodes(workload: Conv, count: int, **more: Any) -> list[Any]:
    from onnx import helper

    constants = ["b", "b_scale", "b_zero", "scale", "y_zero", "bias"]
    attributes = attributes_of(workload) | more
    return [
        helper.make_node("QLinearConv", [x, "scale", "a_zero", *constants], [y], **attributes)
        for x, y in _chain(count)
    ]


def _onnxruntime(
    workload: Conv, weights: ConvWeights, a: np.ndarray, threads: int, count: int
) -> Prepared:
    x = _first(workload, a)
    if workload.a == "f32":
        model = _model(
            workload, _floats(workload, weights), _float_nodes(workload, count), x, False
        )
    else:
        nodes = _qlinear_nodes(workload, count)
        model = _model(workload, _constants(workload, weights), nodes, x, False)
    return _run("onnxruntime", workload, model, x, threads)


def _onnxruntime_nhwc(
    workload: Conv, weights: ConvWeights, a: np.ndarray, threads: int, count: int
) -> Prepared:
    x = np.ascontiguousarray(a[:, 0] if rank_of(workload) == 2 else a)
    nodes = _qlinear_nodes(workload, count, domain="com.microsoft", channels_last=1)
    model = _model(workload, _constants(workload, weights), nodes, x, True)
    peer = PEERS["onnxruntime"].prepare(model, {"x": x}, threads)

    def outputs() -> list[np.ndarray]:
        return [y.reshape(len(y), *workload.outputs, workload.filters) for y in peer.outputs()]

    return Prepared(peer.call, outputs, peer.keep)


def _openvino(
    workload: Conv, weights: ConvWeights, a: np.ndarray, threads: int, count: int
) -> Prepared:
    from onnx import helper

    x = _first(workload, a)
    if workload.a == "f32":
        constants, nodes = _floats(workload, weights), _float_nodes(workload, count)
        model = _model(workload, constants, nodes, x, False)
        return _run("openvino", workload, model, x, threads)
    assert weights.scale is not None
    constants = _constants(workload, weights) | {
        "bias_scale": weights.scale * np.float32(_SCALE),
        "bias_zero": np.zeros(workload.filters, np.int32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["fb"], axis=0),
        helper.make_node("DequantizeLinear", ["bias", "bias_scale", "bias_zero"], ["fs"], axis=0),
    ]
    for x_name, y_name in _chain(count):
        fx, fy = f"f_{x_name}", f"f_{y_name}_sum"
        nodes += [
            helper.make_node("DequantizeLinear", [x_name, "scale", "a_zero"], [fx]),
            helper.make_node("Conv", [fx, "fb", "fs"], [fy], **attributes_of(workload)),
            helper.make_node("QuantizeLinear", [fy, "scale", "y_zero"], [y_name]),
        ]
    model = _model(workload, constants, nodes, x, False)
    return _run("openvino", workload, model, x, threads)


def _run(peer: str, workload: Conv, model: bytes, x: np.ndarray, threads: int) -> Prepared:
    """A model whose input and output have channels first."""
    ready = PEERS[peer].prepare(model, {"x": x}, threads)
    return Prepared(ready.call, lambda: [_last(workload, y) for y in ready.outputs()], ready.keep)


def _torch_input(workload: Conv, a: np.ndarray) -> Any:
    """A tensor with channels first in shape, last in memory."""
    import torch

    x = torch.from_numpy(aligned(a[:, 0] if rank_of(workload) == 2 else a))
    return x.movedim(-1, 1)


def _torch_quantized(engine: str) -> Maker:
    def make(
        workload: Conv, weights: ConvWeights, a: np.ndarray, threads: int, count: int
    ) -> Prepared:
        import torch

        quantized_engine(engine)
        assert weights.scale is not None and weights.bias is not None
        rank, found = rank_of(workload), attributes_of(workload)
        if found["pads"][:rank] != found["pads"][rank:]:
            raise PeerError("pads the same before and after only")
        ops = torch.ops.quantized
        prepack, conv = {
            2: (ops.conv2d_prepack, ops.conv2d),
            3: (ops.conv3d_prepack, ops.conv3d),
        }[rank]
        scales = torch.from_numpy(weights.scale.astype(np.float64))
        zeros = torch.zeros(workload.filters, dtype=torch.int64)
        filters = torch.from_numpy(filters_of(workload, weights))
        quantized = torch._make_per_channel_quantized_tensor(filters, scales, zeros, 0)
        bias = torch.from_numpy((weights.bias * (weights.scale * _SCALE)).astype(np.float32))
        geometry = [list(found[key]) for key in ("strides", "pads", "dilations")]
        geometry[1] = geometry[1][:rank]
        packed = prepack(quantized, bias, *geometry, workload.groups)
        x = _torch_input(workload, a)
        x = torch._make_per_tensor_quantized_tensor(x, _SCALE, weights.a_zero)
        zero = weights.zero_point
        return torch_run(
            lambda: conv(x, packed, _SCALE, zero),
            lambda y: torch.from_numpy(_last(workload, y.int_repr().numpy())),
            threads,
        )

    return make


def _torch_float(
    workload: Conv, weights: ConvWeights, a: np.ndarray, threads: int, count: int
) -> Prepared:
    import torch

    rank, found = rank_of(workload), attributes_of(workload)
    memory = torch.channels_last if rank == 2 else torch.channels_last_3d
    b = torch.from_numpy(filters_of(workload, weights)).contiguous(memory_format=memory)
    assert weights.bias is not None
    bias, x = torch.from_numpy(weights.bias), _torch_input(workload, a)
    conv = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[rank]
    geometry = [list(found[key]) for key in ("strides", "pads", "dilations")]
    geometry[1] = geometry[1][:rank]
    return torch_run(
        lambda: conv(x, b, bias, *geometry, workload.groups),
        lambda y: torch.from_numpy(_last(workload, y.numpy())),
        threads,
    )
