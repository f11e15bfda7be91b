"""Accuracy after quantization: ours against ONNX Runtime's ``quantize_static``, the same samples.

Signal to noise at the outputs against the float model, on inputs that neither was calibrated on.
ONNX Runtime quantizes with u8 activations and s8 weights per channel and each of its calibration
methods; the best counts. Its QDQ models run in ONNX Runtime, ours as compiled code, and in ONNX
Runtime too, for their agreement.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from .. import models
from ..compiler import compile
from ..console import Progress
from ..quantization import placement, prepare
from ..quantization.noise import decibels
from ..quantization.observe import largest_batch
from ..quantization.quantize import quantize

METHODS = ("MinMax", "Percentile", "Entropy")
_BYTES = 6 << 30  # of all tensors of all samples, which ONNX Runtime's calibrators keep
_FIRST = 1000  # seed of the first sample to calibrate on

Outputs = list[np.ndarray]


@dataclass
class Row:
    """One model. `peer`: dB by method, or why there is none · steps: largest difference of our
    model in ONNX Runtime and compiled, in steps of the output's range / 255."""

    model: str
    samples: int
    ours: float | None
    seconds: float
    steps: float | None
    peer: dict[str, float | str] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """The best method of the peer, in dB."""
        return max((v for v in self.peer.values() if isinstance(v, float)), default=None)

    @property
    def gain(self) -> float | None:
        """What ours is better by, in dB."""
        return None if self.ours is None or self.best is None else self.ours - self.best


def run(name: str, samples: int, tests: int, progress: Progress) -> Row:
    """Quantizes a float reference model with both, runs both on `tests` inputs."""
    model = models.export(name)
    prepared = prepare.float_model(model)
    groups = placement.place(prepared.model).groups
    tensors = [tensor for group in groups for tensor in group.tensors]
    samples = largest_batch(prepared.model, tensors, prepared.inputs, limit=samples, budget=_BYTES)
    calib = [models.sample_inputs(name, 1, _FIRST + i) for i in range(samples)]
    feeds = [models.sample_inputs(name, 1, i) for i in range(tests)]
    want = _peer_outputs(model, feeds)
    shapes = models.default_shapes(name)
    progress.step(f"{name}: quantize")
    start = time.monotonic()
    made = quantize(model, calib, shapes=shapes)
    seconds = time.monotonic() - start
    module = compile(made, targets=["host"], shapes=shapes).load()
    got = [list(module(feed)) for feed in feeds]
    theirs = _peer_outputs(made, feeds)
    row = Row(name, samples, _sqnr(name, want, got), seconds, _steps(name, theirs, got))
    for method in METHODS:
        progress.step(f"{name}: ONNX Runtime, {method}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                theirs = _peer_outputs(_peer_quantize(model, calib, method, Path(folder)), feeds)
            found = _sqnr(name, want, theirs)
            row.peer[method] = "no pairs of detections" if found is None else found
        except Exception as error:
            row.peer[method] = str(error).strip().splitlines()[-1][:200]
    return row


def _peer_quantize(
    model: onnx.ModelProto, calib: list[dict[str, np.ndarray]], method: str, folder: Path
) -> onnx.ModelProto:
    from onnxruntime import quantization as peer

    class Reader(peer.CalibrationDataReader):
        feeds: Iterator[dict[str, np.ndarray]] = iter(calib)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    source, target = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(model, source)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends what these models do not need
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            peer.quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=peer.QuantFormat.QDQ,
                per_channel=True,
                activation_type=peer.QuantType.QUInt8,
                weight_type=peer.QuantType.QInt8,
                calibrate_method=getattr(peer.CalibrationMethod, method),
            )
    finally:
        logging.getLogger().setLevel(level)
    return onnx.load(target)


def _peer_outputs(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> list[Outputs]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [session.run(None, feed) for feed in feeds]


def _pairs(
    name: str, want: list[Outputs], got: list[Outputs]
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Outputs side by side, detections paired by their boxes; None where these do not pair."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for one, other in zip(want, got, strict=True):
        one, other = models.matched(name, one, other)
        if any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
            return None
        found += zip(one, other, strict=True)
    return found


def _sqnr(name: str, want: list[Outputs], got: list[Outputs]) -> float | None:
    """Of all outputs together, in dB; None where they do not pair."""
    pairs = _pairs(name, want, got)
    if pairs is None:
        return None
    signal = sum(float(np.square(w, dtype=np.float64).sum()) for w, _ in pairs)
    noise = sum(float(np.square(w.astype(np.float64) - g).sum()) for w, g in pairs)
    return decibels(signal, noise)


def _steps(name: str, want: list[Outputs], got: list[Outputs]) -> float | None:
    """Largest difference, in steps of an output's range / 255; None where they do not pair."""
    pairs = _pairs(name, want, got)
    sizes = [
        float(np.abs(w - g).max() / (w.max() - w.min()) * 255)
        for w, g in pairs or ()
        if w.size and w.max() > w.min()
    ]
    return None if pairs is None else max(sizes, default=0.0)
