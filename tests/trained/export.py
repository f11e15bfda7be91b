"""What the training scripts share: one step, and the way from a module to files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch

from . import Trained

torch.set_num_threads(1)  # the same sums in the same order, so that a seed gives one model


def step(
    loss: torch.Tensor, model: torch.nn.Module, optimizer: Any, schedule: Any, limit: float
) -> None:
    """One step down the gradient of `loss`, cut to the length `limit`."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    schedule.step()


def run(model: torch.nn.Module, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs in evaluation mode; the model is left in the mode it had."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(*(torch.from_numpy(value) for value in feeds.values()))
    model.train(training)
    return {"y": y.numpy()}


def write(name: str, model: torch.nn.Module, feeds: Mapping[str, np.ndarray]) -> None:
    """The graph with its weights, leading dims "N", batch norms left as they are."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no package beside torch is old
        torch.onnx.export(
            model.eval(),
            tuple(torch.from_numpy(value[:2]) for value in feeds.values()),
            file,
            dynamo=False,
            opset_version=18,
            training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold the batch norms
            input_names=list(feeds),
            output_names=["y"],
            dynamic_axes={key: {0: "N"} for key in (*feeds, "y")},
        )
    made = onnx.ModelProto.FromString(file.getvalue())
    for node in made.graph.node:
        node.ClearField("doc_string")
    path = Trained(name).path
    path.write_bytes(made.SerializeToString(deterministic=True))
    print(f"{path.name}: {path.stat().st_size} bytes")


def data(name: str, calib: Mapping[str, Any], val: Mapping[str, Any]) -> None:
    """Both data files."""
    trained = Trained(name)
    for path, arrays in ((trained.calib, calib), (trained.val, val)):
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes")
