"""Images of handwritten digits, and a small MobileNet that reads them.

8 x 8 images of scikit-learn's ``load_digits`` (UCI, "Optical Recognition of Handwritten Digits",
CC BY 4.0): the first 1000 to train, the other 797 to validate, these three times: as they are,
noisy, and noisy and shifted by a pixel.

As in MobileNet the filters of one layer differ in range, depthwise ones by more than a thousand
times once the batch norms are folded, so that one scale for all of them ruins the model. In so
small a model that does not come by itself: batch norms begin with factors of log-normal sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

SEED = 6
TRAINED, _CALIBRATED = 1000, 512
_LEVELS = 16  # pixels are 0 to 16 of them


def accuracy(outputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    """Share of the images whose largest score is that of their digit."""
    return float(np.mean(outputs["y"].argmax(axis=1) == data["label"]))


def likelihood(outputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    """Geometric mean of the probability given to the right digit."""
    scores = outputs["y"].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    right = scores[np.arange(len(scores)), data["label"]]
    return float(np.exp(np.mean(right - np.log(np.exp(scores).sum(axis=1)))))


def disturb(images: np.ndarray, rng: np.random.Generator, shift: bool) -> np.ndarray:
    """Images (n, 8, 8) of 0 to 16 with noise; with `shift` most of them moved by a pixel."""
    moved = images.copy()
    for index, direction in enumerate(rng.integers(0, 5, len(images)) if shift else ()):
        if direction < 4:
            axis, step = direction % 2, direction // 2 * 2 - 1
            rows = np.moveaxis(moved[index], axis, 0)
            rows[:] = np.roll(rows, step, axis=0)
            rows[0 if step > 0 else -1] = 0
    noise = np.rint(rng.normal(0, 1.5, images.shape)).astype(images.dtype)
    return np.clip(moved + noise, 0, _LEVELS)


def images() -> tuple[np.ndarray, np.ndarray]:
    """All images (1797, 8, 8) of 0 to 16, and their digits; needs scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.int64).reshape(-1, 8, 8), labels


def inputs(pictures: np.ndarray) -> np.ndarray:
    """What the model takes: (n, 1, 8, 8) from 0 to 1."""
    return (pictures[:, None] / _LEVELS).astype(np.float32)


def network() -> Any:
    """The model as a torch.nn.Module: x (N, 1, 8, 8) to scores (N, 10)."""
    from torch import nn

    def conv(width, outputs, kernel, activation=None, **options):
        layers = [
            ("conv", nn.Conv2d(width, outputs, kernel, padding=kernel // 2, bias=False, **options)),
            ("norm", nn.BatchNorm2d(outputs)),
        ]
        return nn.Sequential(OrderedDict(layers + [("act", activation)] * bool(activation)))

    class Inverted(nn.Module):
        """1x1 up, depthwise 3x3, 1x1 down, plus the input."""

        def __init__(self, width, inner):
            super().__init__()
            self.expand = conv(width, inner, 1, nn.ReLU6())
            self.depthwise = conv(inner, inner, 3, nn.ReLU6(), groups=inner)
            self.project = conv(inner, width, 1)

        def forward(self, x):
            return x + self.project(self.depthwise(self.expand(x)))

    layers = {
        "stem": conv(1, 16, 3, nn.Hardswish()),
        "first": Inverted(16, 64),
        "grouped": conv(16, 32, 3, nn.Hardswish(), stride=2, groups=4),
        "second": Inverted(32, 128),
        "third": Inverted(32, 128),
        "head": conv(32, 64, 1, nn.Hardswish()),
        "mean": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "scores": nn.Linear(64, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def train(epochs: int = 80, batch: int = 50) -> None:
    """Trains, prints the metrics of the model and writes it."""
    import torch

    from . import export

    torch.manual_seed(SEED)
    model = network()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # filters of unlike ranges
            parameter.data.normal_().exp_()
    pictures, labels = images()
    rng = np.random.default_rng(SEED)
    held = pictures[TRAINED:]
    val = np.concatenate([held, disturb(held, rng, False), disturb(held, rng, True)])
    data = {"x": inputs(val), "label": np.tile(labels[TRAINED:], 3).astype(np.uint8)}
    target = torch.from_numpy(labels[:TRAINED])
    steps = epochs * (TRAINED // batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        seen = torch.from_numpy(inputs(disturb(pictures[:TRAINED], rng, True)))
        for pick in torch.randperm(TRAINED).split(batch):
            loss = torch.nn.functional.cross_entropy(model(seen[pick]), target[pick])
            export.step(loss, model, optimizer, schedule, limit=np.inf)
    scores = export.run(model, {"x": data["x"]})
    print(f"accuracy {accuracy(scores, data):.4f}, likelihood {likelihood(scores, data):.4f}")
    calib = inputs(disturb(pictures[:_CALIBRATED], rng, True))
    export.write("digits", model, {"x": calib})
    export.data("digits", {"x": calib}, data)


if __name__ == "__main__":
    train()
