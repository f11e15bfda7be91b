"""Small models trained on real tasks, with the data to calibrate and to judge them.

============  =====================================================================================
`digits`      images of digits (scikit-learn's), convolutions: grouped, depthwise, 1x1, residual
`clicks`      whether a user clicks: embeddings, feature crosses, dense features of unlike ranges
`sequence`    where a lift stands after a sequence of commands: a GRU, written out step by step
`qat`         that of `digits` as a training tool exports it after quantization-aware training
============  =====================================================================================

Each has a float graph with its weights, ``<name>.onnx``, inputs in ``<name>_calib.npz``, inputs and
labels in ``<name>_val.npz``, and metrics fn(outputs, data) -> float, larger is better. In this
folder's parent ``python -m trained.<name>`` makes the three files anew (PyTorch, scikit-learn;
minutes), and

    dccompile quantize trained/digits.onnx -o q.onnx --calib trained/digits_calib.npz \\
        --selective --val trained/digits_val.npz --metric trained.digits:accuracy

uses them on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

FOLDER = Path(__file__).parent
NAMES = ("digits", "clicks", "sequence")


@dataclass(frozen=True)
class Trained:
    """A model of this folder and its data."""

    name: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.onnx"

    @property
    def calib(self) -> Path:
        return FOLDER / f"{self.name}_calib.npz"

    @property
    def val(self) -> Path:
        return FOLDER / f"{self.name}_val.npz"

    def model(self) -> onnx.ModelProto:
        return onnx.ModelProto.FromString(self.path.read_bytes())


def arrays(path: Path) -> dict[str, np.ndarray]:
    """What an .npz holds."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
