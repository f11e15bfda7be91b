"""Other runtimes, each at its best, to compare with: same model, same inputs, same threads.

A peer is prepared once and then called through its fastest documented route with inputs and
outputs bound in advance. What a peer cannot run is reported with its reason, never left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import UsageError
from ..runtime import tensors
from .measure import Loop

Feeds = Mapping[str, np.ndarray]


class PeerError(Exception):
    """The peer cannot run this; the message is its reason, on one line."""


@dataclass(frozen=True)
class Prepared:
    """A peer ready to run: `call` runs once, `outputs` returns copies of what the last run gave.

    `keep` holds the memory that the peer only borrows; `timed` is a loop that times calls, where
    the clock is not the host's. `tolerance` is what floats may differ by, relative, where the peer
    computes in fewer bits; not `same`: it runs another form of the model.
    """

    call: Callable[[], Any]
    outputs: Callable[[], list[np.ndarray]]
    keep: Any = None
    timed: Loop | None = None
    tolerance: float | None = None
    same: bool = True


class Peer(ABC):
    """One runtime. `package` is what pip calls it, `module` what Python imports."""

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]

    def available(self) -> str | None:
        """Why this peer cannot be used here, or None if it can; imports nothing heavy."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.package})"
        return None

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def prepare(self, model: bytes | Path, feeds: Feeds, threads: int) -> Prepared:
        """Loads an ONNX model for inputs of exactly these shapes.

        Raises PeerError where the peer is missing or refuses the model.
        """
        reason = self.available()
        if reason:
            raise PeerError(reason)
        try:
            return self._prepare(model, feeds, threads)
        except PeerError:
            raise
        except Exception as error:  # whatever the peer throws is its answer
            raise PeerError(one_line(error)) from error

    @abstractmethod
    def _prepare(self, model: bytes | Path, feeds: Feeds, threads: int) -> Prepared: ...


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first telling line of an exception, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def aligned(array: np.ndarray) -> np.ndarray:
    """A row-major copy on a 64-byte boundary."""
    out = tensors.aligned(array.shape, array.dtype)
    out[...] = array
    return out


class OnnxRuntime(Peer):
    """IO binding, all graph optimizations, one intra-op pool of the asked size."""

    name, package, module = "onnxruntime", "onnxruntime", "onnxruntime"

    def _prepare(self, model: bytes | Path, feeds: Feeds, threads: int) -> Prepared:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        keep = {n: ort.OrtValue.ortvalue_from_numpy(aligned(a)) for n, a in feeds.items()}
        for spec in session.get_inputs():
            binding.bind_ortvalue_input(spec.name, keep[spec.name])
        names = [o.name for o in session.get_outputs()]
        first = session.run(None, dict(feeds))
        for name, value in zip(names, first, strict=True):
            keep[f"output {name}"] = ort.OrtValue.ortvalue_from_numpy(aligned(np.asarray(value)))
            binding.bind_ortvalue_output(name, keep[f"output {name}"])

        def call() -> None:
            session.run_with_iobinding(binding)

        return Prepared(call, lambda: [keep[f"output {n}"].numpy().copy() for n in names], keep)


class OpenVino(Peer):
    """Latency hint, f32 kept f32, shapes fixed, one request with shared tensors reused."""

    name, package, module = "openvino", "openvino", "openvino"

    def _prepare(self, model: bytes | Path, feeds: Feeds, threads: int) -> Prepared:
        import openvino as ov

        core = ov.Core()
        read = (
            core.read_model(model=model, weights=b"")
            if isinstance(model, bytes)
            else core.read_model(str(model))
        )
        read.reshape({name: list(array.shape) for name, array in feeds.items()})
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else it quantizes activations too
        }
        compiled = core.compile_model(read, "CPU", config)
        request = compiled.create_infer_request()
        keep = {name: aligned(array) for name, array in feeds.items()}
        for name, array in keep.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        # The binding under the public method takes 6 us where the method takes 9 (Zen 4).
        binding: Any = super(ov.InferRequest, request)

        def direct() -> None:
            binding.infer({}, share_outputs=True, decode_strings=False)

        def public() -> None:
            request.infer(share_outputs=True)

        call = direct
        try:
            direct()
        except (AttributeError, TypeError):
            call = public
            public()

        def outputs() -> list[np.ndarray]:
            return [np.array(request.get_tensor(port).data) for port in compiled.outputs]

        return Prepared(call, outputs, keep)


class Torch(Peer):
    """PyTorch eager. It does not read ONNX: only models that carry a torch definition."""

    name, package, module = "torch", "torch", "torch"

    def _prepare(self, model: bytes | Path, feeds: Feeds, threads: int) -> Prepared:
        raise PeerError("does not read ONNX, and this model has no float torch definition")

    def prepare_module(self, module: Any, feeds: Feeds, threads: int) -> Prepared:
        """Runs a torch.nn.Module on positional inputs in the order of the feeds."""
        reason = self.available()
        if reason:
            raise PeerError(reason)
        import torch

        torch.set_num_threads(threads)
        module = module.eval()
        inputs = [torch.from_numpy(aligned(a)) for a in feeds.values()]
        last: list[Any] = []

        def call() -> None:
            with torch.inference_mode():
                last[:] = [module(*inputs)]

        try:
            call()
        except Exception as error:
            raise PeerError(one_line(error)) from error

        def outputs() -> list[np.ndarray]:
            values = last[0] if isinstance(last[0], (tuple, list)) else [last[0]]
            return [v.numpy().copy() for v in values]

        return Prepared(call, outputs)


class Tvm(Peer):
    """TVM as it comes: its importer, its default pipeline, its virtual machine, no tuning."""

    name, package, module = "tvm", "apache-tvm", "tvm"

    def _prepare(self, model: bytes | Path, feeds: Feeds, threads: int) -> Prepared:
        import onnx
        import tvm
        from tvm import relax
        from tvm.relax.frontend.onnx import from_onnx

        from ..machine import host

        proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        dtypes = {name: str(array.dtype) for name, array in feeds.items()}
        module = from_onnx(proto, shape_dict=shapes, dtype_dict=dtypes)
        machine = host()
        target = tvm.target.Target(
            {"kind": "llvm", "mcpu": machine.mcpu, "mattr": list(machine.mattr)}
        )
        vm = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
        configure: Any = tvm.get_global_func("runtime.config_threadpool")
        configure(-3, threads, [str(c) for c in sorted(os.sched_getaffinity(0))])  # not pinned
        main = vm["main"]
        names = [p.name for p in module["main"].params]
        inputs = [tvm.runtime.tensor(np.ascontiguousarray(feeds[n])) for n in names if n in feeds]
        last: list[Any] = []

        def call() -> None:
            last[:] = [main(*inputs)]

        call()

        def outputs() -> list[np.ndarray]:
            value = last[0]
            return [v.numpy() for v in ([value] if hasattr(value, "numpy") else value)]

        return Prepared(call, outputs)


PEERS: dict[str, Peer] = {p.name: p for p in (OnnxRuntime(), OpenVino(), Torch(), Tvm())}


def parse(text: str) -> list[Peer]:
    """Peers of a comma-separated list."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    unknown = [n for n in names if n not in PEERS]
    if unknown or not names:
        raise UsageError(
            f"--against {text!r}: unknown peer {', '.join(unknown) or '(none)'}. "
            f"Fix: name some of {', '.join(PEERS)}"
        )
    return [PEERS[n] for n in dict.fromkeys(names)]


def compare(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, Any]:
    """How far two lists of outputs are apart.

    Integers: `steps`, the largest difference. Floats: `relative`, the largest difference over the
    largest magnitude of the other side, and `rms`, the same of root mean squares. `shape` names the
    first pair of different shapes.
    """
    if len(ours) != len(theirs):
        return {"shape": f"{len(ours)} outputs against {len(theirs)}"}
    found: dict[str, Any] = {}
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return {"shape": f"{list(a.shape)} against {list(b.shape)}"}
        if a.size == 0:
            continue
        if a.dtype.kind in "iub" and b.dtype.kind in "iub":
            steps = int(np.max(np.abs(a.astype(np.int64) - b.astype(np.int64))))
            found["steps"] = max(steps, found.get("steps", 0))
        else:
            x, y = a.astype(np.float64), b.astype(np.float64)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            gaps = np.where(same, 0.0, np.abs(x - y))
            finite = y[np.isfinite(y)]
            sizes = {
                "relative": (np.max(gaps), np.max(np.abs(finite), initial=0.0)),
                "rms": (np.linalg.norm(gaps), np.linalg.norm(finite)),
            }
            for key, (gap, scale) in sizes.items():
                value = float(gap / scale if scale else gap)
                value = float("inf") if np.isnan(value) else value
                found[key] = max(value, found.get(key, 0.0))
    return found
