"""Other runtimes on the same GPU, for ``bench MODEL --device cuda``, each at its best.

- torch: the model's float definition, eager, in f32 without TF32
- torch-fp16: the same compiled, in fp16 and channels last; of a model in 8 bits too, whose outputs
  are then another model's: they are compared, but need not agree
- onnxruntime-cuda, onnxruntime-tensorrt: with inputs and outputs bound on the device

torch's calls are captured in a CUDA graph where that is possible, as ours are. Everybody's time is
the device's own, on the stream that the runtime uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..cuda.loose import Watch
from ..cuda.replay import replay
from ..runtime.device import Device
from ..sources import Source
from . import gpu_torch, measure
from .peers import PEERS, Feeds, Peer, PeerError, Prepared, one_line

FP16_TOLERANCE = 2e-2  # of floats, relative
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

Make = Callable[[], Prepared]


def routes(peers: Sequence[Peer], source: Source, feeds: Feeds, gpu: Device) -> dict[str, Make]:
    """How to prepare each way of the peers; a `Make` raises PeerError where that cannot be."""
    found: dict[str, Make] = {}
    for peer in peers:
        if peer.name == "torch":
            found["torch"] = partial(_guarded, _torch, source, feeds, gpu, False)
            found["torch-fp16"] = partial(_guarded, _torch, source, feeds, gpu, True)
        elif peer.name == "onnxruntime":
            for kind in _PROVIDERS:
                make = partial(_guarded, _onnxruntime, source, feeds, gpu, kind)
                found[f"onnxruntime-{kind}"] = make
        else:
            found[peer.name] = partial(_none, peer)
    return found


def _none(peer: Peer) -> Prepared:
    raise PeerError(f"{peer.name} is not benched on GPUs")


def _guarded(make: Callable[..., Prepared], *args: Any) -> Prepared:
    try:
        return make(*args)
    except PeerError:
        raise
    except Exception as error:  # whatever the peer throws is its answer
        raise PeerError(one_line(error)) from error


# ---- torch ----


def _torch(source: Source, feeds: Feeds, gpu: Device, half: bool) -> Prepared:
    from .. import models

    if reason := gpu_torch.missing():
        raise PeerError(reason)
    import torch

    name = source.name.removesuffix("-int8")
    module = models.definition(name, source.seed) if source.kind == "reference" else None
    if module is None:
        raise PeerError("does not read ONNX, and this model has no float torch definition")
    if name != source.name and not half:
        raise PeerError("a model in 8 bits, torch has it in float: see torch-fp16")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    module = module.eval().to(str(gpu))
    inputs = [torch.from_numpy(np.ascontiguousarray(a)).to(str(gpu)) for a in feeds.values()]
    if half:
        module = torch.compile(_channels_last(module.half()))
        inputs = [_channels_last(x.half() if x.is_floating_point() else x) for x in inputs]
    last: list[Any] = []

    def call(stream: int = 0) -> None:
        with torch.inference_mode():
            last[:] = [module(*inputs)]

    for _ in range(3):  # compiles, tries algorithms
        call()
    torch.cuda.synchronize()
    timed = replay(gpu, [call], gpu_torch.capture)

    def outputs() -> list[np.ndarray]:
        call()
        values = last[0] if isinstance(last[0], (tuple, list)) else [last[0]]
        return [(v.float() if v.is_floating_point() else v).cpu().numpy() for v in values]

    return Prepared(
        call,
        outputs,
        timed=measure.Loop(timed.run),
        tolerance=FP16_TOLERANCE if half else None,
        same=name == source.name,
    )


def _channels_last(value: Any) -> Any:
    """A module's weights or a tensor with channels last in memory, where it has channels."""
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if isinstance(value, torch.Tensor):
        found = formats.get(value.dim())
        return value if found is None else value.contiguous(memory_format=found)
    for parameter in value.parameters():
        parameter.data = _channels_last(parameter.data)
    return value


# ---- ONNX Runtime ----


def _onnxruntime(source: Source, feeds: Feeds, gpu: Device, kind: str) -> Prepared:
    """On a stream of ours, without waiting for it after every call; TensorRT may use fp16, int8."""
    peer, provider = PEERS["onnxruntime"], _PROVIDERS[kind]
    if reason := peer.available():
        raise PeerError(reason)
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise PeerError(f"onnxruntime {peer.version} has no {provider}")
    with gpu:
        stream = gpu.stream()
        watch = Watch(gpu)
    settings = {"device_id": str(gpu.index), "user_compute_stream": str(stream.handle)}
    if kind == "tensorrt":
        settings |= {"trt_fp16_enable": "1", "trt_int8_enable": "1"}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model = source.onnx()
    session = ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=[(provider, settings), "CPUExecutionProvider"],
    )
    if session.get_providers()[0] != provider:
        raise PeerError(f"{provider} does not start: see what onnxruntime logs")
    binding = session.io_binding()
    placed = {
        name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a), "cuda", gpu.index)
        for name, a in feeds.items()
    }
    for name, value in placed.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", gpu.index)
    run = ort.RunOptions()
    run.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call() -> None:
        session.run_with_iobinding(binding, run)

    def outputs() -> list[np.ndarray]:
        call()
        gpu.synchronize()
        return [np.array(value) for value in binding.copy_outputs_to_cpu()]

    def timed(calls: int) -> float:
        with gpu:
            call()
            watch.start(stream.handle)
            for _ in range(calls):
                call()
            return watch.stop(stream.handle)

    tolerance = FP16_TOLERANCE if kind == "tensorrt" else None
    return Prepared(call, outputs, (placed, stream), measure.Loop(timed), tolerance)
