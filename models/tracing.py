"""How a PyTorch definition becomes a graph of this folder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx


def trace(
    module: Any,
    feeds: Mapping[str, np.ndarray],
    outputs: Sequence[str] = ("y",),
    dynamic: str | None = "N",
) -> onnx.ModelProto:
    """The graph as PyTorch exports it now, weights stripped; `dynamic` names the leading dims."""
    import torch
    from dccompile.models.weights import strip

    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)  # the exporter merges equal tensors
    axes = {key: {0: dynamic} for key in (*feeds, *outputs)} if dynamic else None
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no package beside torch is old
        torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(value) for value in feeds.values()),
            file,
            dynamo=False,
            opset_version=17,
            input_names=list(feeds),
            output_names=list(outputs),
            dynamic_axes=axes,
        )
    model = onnx.ModelProto.FromString(file.getvalue())
    for node in model.graph.node:
        node.ClearField("doc_string")
    strip(model)
    return model
