"""Clicks of users on items, and a deep and cross network (Wang et al., 2021) that predicts them.

What is true is planted: users and items have hidden vectors, and a click is likely where these
agree. Dense features have the ranges of real logs: normal ones beside counts with a long tail and
shares near zero, so that one scale for all of them has to choose; and products of features carry
the errors of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from dccompile.models.clicks import auc, normalized_entropy

WORLD = 7  # seed of what is true
SPARSE, ROWS, WIDTH = 6, 200, 8  # features with an embedding, rows of each, their length
NORMAL, COUNTS, SHARES = 4, 3, 3  # dense features of each kind
DENSE = NORMAL + COUNTS + SHARES
_HIDDEN = 3
VALIDATED, _CALIBRATED = 8000, 2048
HELD = 2  # seed of the samples to validate on


def area(outputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    """Area under the ROC curve."""
    return auc(data["click"], outputs["y"][:, 0])


def gain(outputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    """Share of the log loss of always saying the mean that the model saves: 1 is perfect."""
    return 1 - normalized_entropy(data["click"], outputs["y"][:, 0])


def samples(count: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of the model and the clicks (count,), 0 and 1."""
    truth = np.random.default_rng(WORLD)
    hidden = truth.standard_normal((SPARSE, ROWS, _HIDDEN))
    bias = truth.standard_normal((SPARSE, ROWS))
    mix = truth.standard_normal((_HIDDEN, NORMAL))
    rng = np.random.default_rng([WORLD, seed])
    sparse = (ROWS * rng.random((count, SPARSE)) ** 2).astype(np.int64)
    normal = np.rint(rng.standard_normal((count, NORMAL)) * 32) / 32
    counts = np.sqrt(np.floor(np.exp(rng.normal(0.5, 1.2, (count, COUNTS)))))
    shares = np.rint(rng.beta(1, 8, (count, SHARES)) * 256) / 256
    things = hidden[np.arange(SPARSE), sparse]
    users, items = things[:, : SPARSE // 2].sum(axis=1), things[:, SPARSE // 2 :].sum(axis=1)
    taste = (normal @ mix.T / 4 * items).sum(axis=1)
    logit = (
        (users * items).sum(axis=1) / 3
        + taste * (0.5 + np.log1p(counts[:, 0]) / 2)
        + bias[np.arange(SPARSE), sparse].sum(axis=1) / 2
        + 6 * (shares[:, 0] - shares[:, 1]) * users[:, 0]
        + np.log1p(counts[:, 1])
        - np.log1p(counts[:, 2])
        - 1.5
    )
    click = rng.random(count) < 1 / (1 + np.exp(-logit))
    dense = np.concatenate([normal, counts, shares], axis=1).astype(np.float32)
    return {"dense": dense, "sparse": sparse}, click.astype(np.uint8)


def network() -> Any:
    """The model as a torch.nn.Module: dense (N, 10), sparse (N, 6) to probabilities (N, 1)."""
    import torch
    from torch import nn

    class Crosses(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ParameterList(torch.randn(ROWS, WIDTH) / 4 for _ in range(SPARSE))
            self.dense = nn.Sequential(nn.Linear(DENSE, 32), nn.ReLU(), nn.Linear(32, 16))
            width = SPARSE * WIDTH + 16
            self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.deep = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
            self.click = nn.Linear(width + 32, 1)

        def forward(self, dense, sparse):
            rows = [
                nn.functional.embedding(sparse[:, index], table)
                for index, table in enumerate(self.tables)
            ]
            first = x = torch.cat([self.dense(dense), *rows], 1)
            for layer in self.crosses:
                x = first * layer(x) + x
            return torch.sigmoid(self.click(torch.cat([x, self.deep(first)], 1)))

    return Crosses()


def train(count: int = 1_000_000, epochs: int = 3, batch: int = 512) -> None:
    """Trains, prints the metrics of the model and writes it."""
    import torch

    from . import export

    torch.manual_seed(WORLD)
    model = network()
    inputs, clicks = samples(count, 1)
    dense, sparse = (torch.from_numpy(inputs[name]) for name in ("dense", "sparse"))
    target = torch.from_numpy(clicks.astype(np.float32))
    held, truth = samples(VALIDATED, HELD)
    data = {**held, "click": truth}
    steps = epochs * (count // batch)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(count)
        for pick in order[: count // batch * batch].split(batch):
            y = model(dense[pick], sparse[pick])[:, 0]
            loss = torch.nn.functional.binary_cross_entropy(y, target[pick])
            export.step(loss, model, optimizer, schedule, limit=1.0)
        scores = export.run(model, held)
        figures = f"AUC {area(scores, data):.4f}, gain {gain(scores, data):.4f}"
        print(f"epoch {epoch}: {figures}", flush=True)
    calib, _ = samples(_CALIBRATED, 3)
    export.write("clicks", model, calib)
    export.data("clicks", calib, data)


if __name__ == "__main__":
    train()
