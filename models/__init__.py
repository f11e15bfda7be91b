"""Reference models: PyTorch definition, exported graph, weights made from a seed.

A graph lies here without its weights (``<name>.onnx``: float initializers are shapes only);
`export` fills them from a seed, so that the same seed gives the same model everywhere. The int8
forms are made from the float graph and the activation scales in ``<name>.json``. dlrm-clicks has
trained weights instead, and `clicks` the data to test them on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

    from .dlrm import Config

LARGE = 1 << 28  # bytes of weights from which a model does not belong in memory


@dataclass(frozen=True)
class _Entry:
    config: str  # of dlrm.CONFIGS
    int8: bool
    about: str


_ABOUT = {
    "dlrm-small": "recommendation model: 26 tables of 1000 x 64, pooling 20",
    "dlrm": "recommendation model: 26 tables of 100,000 x 64, pooling 20 (665 MB)",
    "dlrm-1g": "recommendation model: 26 tables of 534,000 x 64 (3.6 GB, 1 GB as int8 rows)",
    "dlrm-clicks": "small recommendation model, trained on generated clicks: 8 tables of 500 x 16",
    "dlrm-mlp": "fully-connected layers 512-512-512-256-1 of dlrm alone",
}
_MODELS = {
    name + suffix: _Entry(name, bool(suffix), about + more)
    for name, about in _ABOUT.items()
    for suffix, more in (("", ""), ("-int8", ", layers quantized (QDQ)"))
}


def names() -> list[tuple[str, str]]:
    """Every model with a line about it."""
    return [(name, entry.about) for name, entry in _MODELS.items()]


def size(name: str) -> int:
    """Bytes of a model's tables."""
    config = _config(name)
    return 4 * config.tables * config.rows * config.bottom[-1] if config.tables else 0


def shapes(name: str, batch: str = "1..256") -> dict[str, tuple[int | str, ...]]:
    """Shapes of a model's inputs for `compile`, one artifact for all of these batches."""
    from dccompile.models.dlrm import DENSE

    config = _config(name)
    if not config.bottom:
        return {"x": (batch, config.top[0])}
    return {"dense": (batch, DENSE), "sparse": (batch, config.tables, config.pooling)}


def export(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model with weights; batch is the symbol "N".

    An unknown name raises KeyError, a model of more than 2 GB MemoryError: `save` it.
    """
    from dccompile.models import clicks, weights

    if size(name) >= 1 << 31:
        raise MemoryError(f"{name}: {size(name)} bytes of tables are more than an ONNX file holds")
    model = _graph(name)
    weights.fill(model, seed, clicks.weights() if _entry(name).config == "dlrm-clicks" else None)
    return _finish(name, model)


def save(name: str, path: Path, seed: int = 0) -> list[Path]:
    """Writes the model, its tables in a file beside it if they are `LARGE`; returns the files.

    They are made and written piece by piece. Both files appear whole or not at all.
    """
    from dccompile.models import weights

    files = [path]
    data = path.with_name(f"{path.name}.data")
    part = path.with_name(f".{path.name}.part")
    large = size(name) >= LARGE
    try:
        if large:
            model = _graph(name)
            files.append(data)
            weights.fill_outside(model, seed, data)
            model = _finish(name, model)
        else:
            model = export(name, seed)
        part.write_bytes(model.SerializeToString())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        if large:
            data.unlink(missing_ok=True)
        raise
    return files


def sample_inputs(name: str, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a model: normal floats, indices within every table."""
    from dccompile.models.dlrm import inputs

    return inputs(_entry(name).config, batch, seed)


def _entry(name: str) -> _Entry:
    return _MODELS[name]


def _config(name: str) -> Config:
    from dccompile.models.dlrm import CONFIGS

    return CONFIGS[_entry(name).config]


def _graph(name: str) -> onnx.ModelProto:
    """The graph, without weights."""
    import onnx
    from dccompile.models.dlrm import path
    from dccompile.models.weights import resize

    config = _config(name)
    model = onnx.ModelProto.FromString(path(config.graph).read_bytes())
    resize(model, config.rows)
    return model


def _finish(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the form asked for, from one with float layers."""
    if not _entry(name).int8:
        return model
    from dccompile.models.dlrm import path
    from dccompile.models.qdq import quantize

    return quantize(model, json.loads(path(_config(name).graph, "json").read_text()))
