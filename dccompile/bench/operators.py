"""What the peers' single-operator routes share: one ONNX node or a few, one torch call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .peers import PEERS, PeerError, Prepared, one_line

Tensor = tuple[str, str, Sequence[int]]  # name, dtype, shape
Make = Callable[[], Prepared]


def guarded(route: str, make: Make) -> Prepared:
    """What `make` prepares; raises PeerError where the route's peer is missing or cannot."""
    reason = PEERS[route.partition("-")[0]].available()
    if reason:
        raise PeerError(reason)
    try:
        with warnings.catch_warnings():  # torch announces the end of its quantized tensors
            warnings.simplefilter("ignore", UserWarning)
            return make()
    except PeerError:
        raise
    except Exception as error:  # whatever the peer throws is its answer
        raise PeerError(one_line(error)) from error


def onnx_model(
    nodes: list[Any], constants: Mapping[str, np.ndarray], x: Tensor, y: Tensor
) -> bytes:
    """An ONNX model of one input and one output, in the standard and ONNX Runtime's operators."""
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"u8": TensorProto.UINT8, "s8": TensorProto.INT8, "f32": TensorProto.FLOAT}
    ends = [helper.make_tensor_value_info(n, kinds[kind], list(dims)) for n, kind, dims in (x, y)]
    graph = helper.make_graph(
        nodes,
        "operator",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


def quantized_engine(engine: str) -> None:
    """Makes torch's quantized operators use an engine."""
    import torch

    if engine not in torch.backends.quantized.supported_engines:
        raise PeerError(f"this torch has no {engine} engine")
    torch.backends.quantized.engine = engine


def torch_run(call: Callable[[], Any], read: Callable[[Any], Any], threads: int) -> Prepared:
    """One torch call, prepared; `read` makes a plain tensor of what it returns."""
    import torch

    torch.set_num_threads(threads)
    last: list[Any] = []

    def run() -> None:
        last[:] = [call()]

    with torch.inference_mode():
        run()
    return Prepared(run, lambda: [np.array(read(last[0]).numpy())])
