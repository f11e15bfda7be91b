"""Reference models: PyTorch definition, exported graph, weights made from a seed.

A graph lies here without its weights (``<name>.onnx``: float initializers are shapes only);
`export` fills them from a seed, so that the same seed gives the same model everywhere. The int8
forms are made from the float graph and the activation scales in ``<name>.json``. dlrm-clicks has
trained weights instead, and `clicks` the data to test them on.

A family is a module of this folder, `dlrm` or `vision`, with the functions of `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    import onnx

Outputs = list[np.ndarray]

LARGE = 1 << 28  # bytes of weights from which a model does not belong in memory


class Family(Protocol):
    """What a family says of its models, by their names without "-int8"."""

    def size(self, name: str) -> int:
        """Bytes of the embedding tables."""

    def shapes(self, name: str, batch: int | str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the inputs, with one batch or a range "LOW..HIGH"."""

    def batch(self, name: str, largest: int) -> int | str | None:
        """The batch to compile for unless told, to be run up to `largest`; None leaves it open."""

    def graph(self, name: str) -> onnx.ModelProto:
        """The float model without weights."""

    def scales(self, name: str) -> dict[str, list[float]]:
        """Scale and zero point of every quantized tensor."""

    def weights(self, name: str) -> Mapping[str, np.ndarray] | None:
        """Trained weights, or None where a seed makes them."""

    def inputs(self, name: str, batch: int, seed: int) -> dict[str, np.ndarray]:
        """Random inputs."""

    def definition(self, name: str) -> Any:
        """The float model as a torch.nn.Module, or None."""

    def matched(self, name: str, ours: Outputs, theirs: Outputs) -> tuple[Outputs, Outputs]:
        """Outputs of two runtimes with rows in one order."""


_ABOUT = {
    "dlrm": {
        "dlrm-small": "recommendation model: 26 tables of 1000 x 64, pooling 20",
        "dlrm": "recommendation model: 26 tables of 100,000 x 64, pooling 20 (665 MB)",
        "dlrm-1g": "recommendation model: 26 tables of 534,000 x 64 (3.6 GB, 1 GB as int8 rows)",
        "dlrm-clicks": (
            "small recommendation model, trained on generated clicks: 8 tables of 500 x 16"
        ),
        "dlrm-mlp": "fully-connected layers 512-512-512-256-1 of dlrm alone",
    },
    "vision": {
        "resnet50": "image classification, ResNet-50 v1.5: 26 M parameters, 4.1 GMAC",
        "resnext101-32x4d": "image classification: 44 M parameters, 8.0 GMAC, 32 groups",
        "mobilenet-v2": "image classification: 3.5 M parameters, 0.30 GMAC, depthwise",
        "shufflenet-trunk": "features of a 600 x 800 image: 4.5 GMAC, 1x1 convolutions of 4 groups",
        "shufflenet-frcnn": "text detection in a 600 x 800 image: that trunk, 0 to 100 proposals",
        "resnext3d101": "video classification, 32 x 112 x 112: 22 M parameters, 48 GMAC",
    },
}
_INT8 = "-int8"
_FAMILIES = {name: family for family, names in _ABOUT.items() for name in names}


def names() -> list[tuple[str, str]]:
    """Every model with a line about it."""
    forms = (("", ""), (_INT8, ", layers quantized (QDQ)"))
    lines = [line for names in _ABOUT.values() for line in names.items()]
    return [(name + suffix, about + more) for name, about in lines for suffix, more in forms]


def vision_names() -> list[str]:
    """The float vision models."""
    return [*_ABOUT["vision"]]


def size(name: str) -> int:
    """Bytes of a model's tables."""
    return _family(name).size(_base(name))


def shapes(name: str, batch: int | str = "1..256") -> dict[str, tuple[int | str, ...]]:
    """Shapes of a model's inputs for `compile`, one artifact for all of these batches."""
    return _family(name).shapes(_base(name), batch)


def default_shapes(
    name: str, batches: Sequence[int] = (1,)
) -> dict[str, tuple[int | str, ...]] | None:
    """What to compile a model for that is to run these batches; None leaves every dim open."""
    batch = _family(name).batch(_base(name), max(batches))
    return None if batch is None else shapes(name, batch)


def export(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model with weights; batch is the symbol "N".

    An unknown name raises KeyError, a model of more than 2 GB MemoryError: `save` it.
    """
    from dccompile.models import weights

    if size(name) >= 1 << 31:
        raise MemoryError(f"{name}: {size(name)} bytes of tables are more than an ONNX file holds")
    family = _family(name)
    model = family.graph(_base(name))
    weights.fill(model, seed, family.weights(_base(name)))
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
            model = _family(name).graph(_base(name))
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
    return _family(name).inputs(_base(name), batch, seed)


def definition(name: str, seed: int = 0) -> Any:
    """The PyTorch definition of a float model with the weights of its ONNX form; None if none."""
    made = None if name.endswith(_INT8) else _family(name).definition(name)
    if made is None:
        return None
    import torch
    from onnx import numpy_helper

    tensors = export(name, seed).graph.initializer
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in tensors}
    made.load_state_dict({key: found[key] for key, _ in made.named_parameters()}, strict=False)
    return made


def matched(name: str, ours: Outputs, theirs: Outputs) -> tuple[Outputs, Outputs]:
    """Outputs of two runtimes, comparable one by one: detections paired, others as they are."""
    return _family(name).matched(_base(name), ours, theirs)


def _base(name: str) -> str:
    return name.removesuffix(_INT8)


def _family(name: str) -> Family:
    return cast(Family, import_module(f"dccompile.models.{_FAMILIES[_base(name)]}"))


def _finish(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the form asked for, from one with float layers."""
    if not name.endswith(_INT8):
        return model
    from dccompile.models.qdq import quantize

    return quantize(model, _family(name).scales(_base(name)))
