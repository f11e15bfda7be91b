"""`quantize`: a float ONNX model becomes a QDQ model, which any runtime can load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from dccompile import __version__
from dccompile.console import Progress
from dccompile.errors import AccuracyError, ModelError, Problem, UsageError

from . import placement, ranges, weights
from .dynamic import dynamic
from .evaluate import Metric, named
from .prepare import float_model
from .quantizer import Quantizer, Settings
from .report import Report
from .static import Static
from .weight_only import weight_only

ACTIVATIONS = ("static", "dynamic", "dynamic-rows", "float")
_CONVOLUTION = {"precision": "float32", "reason": "convolutions need static ranges"}
KEY = "dccompile.quantize"  # of the model's metadata: how it was made


def quantize(
    model: Any,
    calib: Any = None,
    *,
    method: str = "l2",
    activations: str = "static",
    selective: bool = False,
    val: Any = None,
    metric: str | Metric | None = None,
    max_drop: float = 0.01,
    exclude: str | Sequence[str] = (),
    granularity: str = "channel",
    net_aware: bool = True,
    fuse_sums: bool = False,
    bias_correction: bool = True,
    outliers: float | None = None,
    acc16: bool = False,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    threads: int | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    report: Callable[[Report], None] | None = None,
) -> onnx.ModelProto:
    """The QDQ form of a float model: a path, bytes, or an onnx.ModelProto.

    `calib` is an .npz file or a folder of them, or an iterable of feeds {input: array}; the float
    model runs over it, and `method` (l2, minmax, percentile, entropy) makes a range for every
    tensor of what it saw. `activations`: "static"; "dynamic" and "dynamic-rows" quantize when
    called, by tensor or by row, and only fully-connected layers; "float" quantizes weights alone;
    these need no `calib`.

    `selective` leaves the layers in float that cost most, until `metric` (called with outputs and
    data, larger is better; or "module:function") on `val` falls by no more than `max_drop`,
    relative to the float model. Without a metric it is 1 - relative error of the outputs, without
    `val` the samples are those of `calib`. The search goes on from `journal`, if it has one.

    `exclude` names nodes, or patterns of names, to leave in float. `granularity` of the weights'
    scales: channel, group or tensor. `net_aware`: ranges narrowed by what reads a tensor;
    `fuse_sums`: residual sums go on from the accumulator of a layer, for this compiler alone.
    For machines without VNNI: `outliers` is the largest share of a filter's weights beyond +-64;
    with `acc16` the model says how long sums may stay in 16 bits by what calibration saw, for
    compile(accumulation="calibrated").
    `report` is called with a `Report` in the end.

    A model that is quantized already comes back as it is. Raises ModelError or UnsupportedError
    for the model, InputError for `calib` and `val`, UsageError for an argument or the metric,
    AccuracyError, which has the best `model`, where `max_drop` cannot be reached.
    """
    chosen = _settings(
        method, exclude, granularity, net_aware, fuse_sums, bias_correction, outliers
    )
    _choose("activations", activations, ACTIVATIONS)
    if not 0 <= max_drop < 1:
        raise UsageError(
            f"max_drop {max_drop}: allowed is 0 up to 1. Fix: give e.g. 0.01", "DC2044"
        )
    score = named(metric) if isinstance(metric, str) else metric
    progress = progress or Progress(quiet=True)
    said = Report({**asdict(chosen), "activations": activations})
    tell = report or (lambda _: None)
    prepared = float_model(model)
    if prepared.quantized:
        count = len(prepared.quantized)
        said.notes.append(f"the model is quantized already ({count} nodes): nothing was changed")
        tell(said)
        return _given(model)
    quantizer = Quantizer(prepared, chosen)
    if not placement.layers(prepared.model):
        found = "no Conv, Gemm or MatMul with constant weights"
        fix = "there is nothing to quantize; tables: compile --embedding int8"
        raise ModelError([Problem("DC3203", "model", found, fix)])
    if activations != "static":
        result = _sign(_unbounded(quantizer, activations, said), said)
        tell(said)
        return result
    _check_excluded(quantizer)
    if calib is None:
        raise UsageError(
            "calib: none given, static ranges need samples. Fix: give --calib F.npz, or quantize "
            "with --activations dynamic",
            "DC2045",
        )
    job = Static(quantizer, said, shapes, threads, progress)
    job.calibrate(calib)
    missed = job.search(val, score, max_drop, journal) if selective else None
    result = _sign(job.finish(acc16), said)
    tell(said)
    if missed is not None:
        raise AccuracyError(missed, "DC5001", result)
    return result


def _unbounded(quantizer: Quantizer, activations: str, said: Report) -> onnx.ModelProto:
    """Without ranges: weights alone, or activations when called."""
    nodes = [quantizer.nodes[name] for name in quantizer.plan.layers]
    names = [node.name for node in nodes if node.op_type in ("Gemm", "MatMul")]
    if not names:
        found = f"no Gemm or MatMul with constant weights, which activations '{activations}' needs"
        fix = "quantize with static activations and samples"
        raise ModelError([Problem("DC3203", "model", found, fix)])
    for node in nodes:
        done = {"precision": activations} if node.name in names else _CONVOLUTION
        said.layers.append({"node": node.name, "op": node.op_type, **done})
    if activations == "float":
        return weight_only(quantizer.model, names)
    return dynamic(quantizer.model, names, activations == "dynamic-rows")


def _sign(model: onnx.ModelProto, said: Report) -> onnx.ModelProto:
    """Writes into the model's metadata how it was made."""
    made = {"version": __version__, "samples": said.samples, **said.settings}
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(made, sort_keys=True)
    model.producer_name = "dccompile"
    return model


def _given(model: Any) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    return onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)


def _settings(
    method: str,
    exclude: str | Sequence[str],
    granularity: str,
    net_aware: bool,
    fuse_sums: bool,
    bias_correction: bool,
    outliers: float | None,
) -> Settings:
    _choose("method", method, ranges.METHODS)
    _choose("granularity", granularity, weights.GRANULARITIES)
    if outliers is not None and not 0 <= outliers < 1:
        raise UsageError(
            f"outliers {outliers}: a share of the weights is allowed, 0 up to 1. "
            "Fix: give for example 0.005",
            "DC2049",
        )
    names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return Settings(method, names, granularity, net_aware, fuse_sums, bias_correction, outliers)


def _check_excluded(quantizer: Quantizer) -> None:
    """Raises UsageError for a pattern that fits no node, and if no layer is left."""
    patterns = quantizer.settings.exclude
    for pattern in patterns:
        if not any(placement.matches(name, pattern) for name in quantizer.nodes):
            raise UsageError(
                f"exclude '{pattern}': the model has no such node. Fix: name nodes as "
                "dccompile check does",
                "DC2046",
            )
    if not quantizer.plan.layers:
        raise UsageError(
            f"exclude {', '.join(map(repr, patterns))}: leaves no layer to quantize. "
            "Fix: exclude fewer nodes",
            "DC2046",
        )


def _choose(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(
            f"{what} '{value}': allowed are {', '.join(allowed)}. Fix: name one of these", "DC2040"
        )
