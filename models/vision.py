"""The vision models: what they take, their graphs and scales.

``python -m dccompile.models.vision --export [NAME ...]`` writes graphs and scales anew; only that
needs PyTorch, and ONNX Runtime to calibrate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Outputs = list[np.ndarray]


@dataclass(frozen=True)
class Config:
    """`maker` is module:function of the definition, `shape` one input, without the batch.

    `floats`: the tensors from which on the int8 form stays float.
    """

    maker: str
    shape: tuple[int, ...] = (3, 224, 224)
    floats: tuple[str, ...] = ()


DETECTION = "shufflenet-frcnn"  # takes one image and gives boxes and scores of 0 to 100 regions
CONFIGS = {
    "resnet50": Config("resnet:resnet50"),
    "resnext101-32x4d": Config("resnet:resnext101"),
    "mobilenet-v2": Config("mobilenet:MobileNetV2"),
    "shufflenet-trunk": Config("shufflenet:Trunk", (3, 600, 800)),
    DETECTION: Config(
        "detection:trace", (3, 600, 800), ("objectness", "offsets", "logits", "changes")
    ),
    "resnext3d101": Config("resnext3d:ResNeXt3D", (3, 32, 112, 112)),
}
# Pixels between two forms of a box, share of the boxes that have one. ONNX Runtime and OpenVINO
# pair 0.75 to 0.84 of the boxes of the int8 form, all of the float form.
_NEAR, _PAIRED = 16.0, 0.6
_SAMPLES = 4  # that scales are calibrated on


def path(name: str, suffix: str = "onnx") -> Path:
    """The file of this folder that holds a graph, or with "json" its scales."""
    return Path(__file__).with_name(f"{name}.{suffix}")


def size(name: str) -> int:
    """Bytes of embedding tables: there are none."""
    return 0


def shapes(name: str, batch: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the input, channels first."""
    return {"x": (1 if name == DETECTION else batch, *CONFIGS[name].shape)}


def batch(name: str, largest: int) -> int | str:
    """Batch 1 alone, unless more is to run."""
    return 1 if largest == 1 or name == DETECTION else f"1..{largest}"


def graph(name: str) -> onnx.ModelProto:
    """The float model without weights."""
    return onnx.ModelProto.FromString(path(name).read_bytes())


def scales(name: str) -> dict[str, list[float]]:
    """Scale and zero point of every tensor that integers hold."""
    found: dict[str, list[float]] = json.loads(path(name, "json").read_text())
    return found


def weights(name: str) -> None:
    """A seed makes the weights."""
    return None


def inputs(name: str, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs: normal floats, as a normalized image has them."""
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((batch, *CONFIGS[name].shape), np.float32)}


def module(name: str) -> Any:
    """The model as a torch.nn.Module in evaluation mode, batch norms folded."""
    from dccompile.models.layers import fold

    file, _, function = CONFIGS[name].maker.partition(":")
    return fold(getattr(import_module(f"dccompile.models.{file}"), function)())


def definition(name: str) -> Any:
    """The model as a torch.nn.Module; detection is one of them only in part."""
    return None if name == DETECTION else module(name)


def matched(name: str, ours: Outputs, theirs: Outputs) -> tuple[Outputs, Outputs]:
    """Detections paired by their boxes, the few without a counterpart left out.

    A proposal whose score is at the threshold, or next to that of another, may be missing or at
    another place for a rounding elsewhere. With too many missing, the outputs stay as they are.
    """
    if name != DETECTION:
        return ours, theirs
    (boxes, *_), (others, *_) = ours, theirs
    if not len(boxes) or not len(others):
        return ours, theirs
    gaps = np.abs(boxes[:, None] - others[None]).max(axis=2)
    nearest = gaps.argmin(axis=1)
    rows = np.flatnonzero(
        (gaps.min(axis=1) <= _NEAR) & (gaps.argmin(axis=0)[nearest] == np.arange(len(boxes)))
    )
    if len(rows) < _PAIRED * max(len(boxes), len(others)):
        return ours, theirs
    return [a[rows] for a in ours], [a[nearest[rows]] for a in theirs]


def trace(name: str) -> onnx.ModelProto:
    """The graph as PyTorch exports it now, weights stripped."""
    from dccompile.models import tracing

    if name == DETECTION:
        from dccompile.models import detection

        return detection.trace()
    return tracing.trace(module(name), inputs(name, 2, 0))


def _export(names: list[str]) -> None:
    from dccompile.models.qdq import activations, calibrate, dump
    from dccompile.models.weights import fill

    for name in names:
        model = trace(name)
        path(name).write_bytes(model.SerializeToString(deterministic=True))
        fill(model, 0)
        feeds = (inputs(name, 1, seed) for seed in range(1, 1 + _SAMPLES))
        dump(calibrate(model, feeds, activations(model, CONFIGS[name].floats)), path(name, "json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", nargs="*", metavar="NAME", required=True)
    _export(parser.parse_args().export or [*CONFIGS])
