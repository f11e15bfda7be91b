"""Reference models: PyTorch definition, exported graph, weights made from a seed.

A graph lies here without its weights (``<name>.onnx``: float initializers are shapes only);
`export` fills them from a seed, so that the same seed gives the same model everywhere. The int8
forms are made from the float graph and the activation scales in ``<name>.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class _Entry:
    graph: str  # name of the file of the float graph
    int8: bool
    about: str


_MODELS = {
    "dlrm": _Entry("dlrm", False, "recommendation model: 26 tables of 1000 x 64, pooling 20"),
    "dlrm-int8": _Entry("dlrm", True, "dlrm with its fully-connected layers quantized (QDQ)"),
    "dlrm-mlp": _Entry("dlrm-mlp", False, "fully-connected layers 512-512-512-256-1 alone"),
    "dlrm-mlp-int8": _Entry("dlrm-mlp", True, "dlrm-mlp quantized (QDQ)"),
}


def names() -> list[tuple[str, str]]:
    """Every model with a line about it."""
    return [(name, entry.about) for name, entry in _MODELS.items()]


def export(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model with weights; batch is the symbol "N". An unknown name raises KeyError."""
    import onnx
    from dccompile.models.dlrm import path
    from dccompile.models.weights import fill

    entry = _MODELS[name]
    model = onnx.ModelProto.FromString(path(entry.graph).read_bytes())
    fill(model, seed)
    if entry.int8:
        from dccompile.models.qdq import quantize

        model = quantize(model, json.loads(path(entry.graph, "json").read_text()))
    return model


def sample_inputs(name: str, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a model: normal floats, indices within every table."""
    from dccompile.models.dlrm import inputs

    return inputs(_MODELS[name].graph, batch, seed)
