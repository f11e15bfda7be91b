"""Clicks with a planted structure, the model trained on them, and how well it ranks them.

Every row of every table stands for a thing with a hidden vector; a click is likely where the
hidden vectors of a sample's things agree, and by some of the dense features. Popular rows come up
often, most come up rarely, as in real logs.

``python -m dccompile.models.clicks --train`` makes ``dlrm-clicks.npz`` anew (PyTorch, a few
minutes); ``python -m dccompile.models.dlrm --export`` then makes its graph and scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

WORLD = 2026  # seed of what is true
WEIGHTS = Path(__file__).with_name("dlrm-clicks.npz")
_HIDDEN = 4  # length of the hidden vectors


def samples(count: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of the model, and the clicks (count,) as 0 and 1; a seed of its own for testing."""
    from dccompile.models.dlrm import CONFIGS, DENSE

    config = CONFIGS["dlrm-clicks"]
    truth = np.random.default_rng(WORLD)
    hidden = truth.standard_normal((config.tables, config.rows, _HIDDEN))
    weights = truth.standard_normal(DENSE) * (np.arange(DENSE) < 6)
    rng = np.random.default_rng([WORLD, seed])
    shape = (count, config.tables, config.pooling)
    sparse = (config.rows * rng.random(shape) ** 2).astype(np.int64)
    dense = rng.standard_normal((count, DENSE)).astype(np.float32)
    things = hidden[np.arange(config.tables)[:, None], sparse].sum(axis=2)
    total = things.sum(axis=1)
    agreement = (total**2).sum(axis=1) - (things**2).sum(axis=(1, 2))
    pairs = config.tables * (config.tables - 1) * config.pooling
    logit = 2.5 * agreement / (pairs * np.sqrt(_HIDDEN)) + 0.4 * dense @ weights - 1.2
    clicks = rng.random(count) < 1 / (1 + np.exp(-logit))
    return {"dense": dense, "sparse": sparse}, clicks.astype(np.float32)


def auc(clicks: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a click scores above a sample without one."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]
    positive = clicks > 0.5
    hits = int(positive.sum())
    above = ranks[positive].sum() - hits * (hits + 1) / 2
    return float(above / (hits * (len(clicks) - hits)))


def normalized_entropy(clicks: np.ndarray, scores: np.ndarray) -> float:
    """Mean log loss over that of always saying the mean; below 1 is better than that."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.mean(clicks * np.log(p) + (1 - clicks) * np.log(1 - p))
    mean = float(clicks.mean())
    return float(loss / -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)))


def weights() -> dict[str, np.ndarray]:
    """The trained weights, by the names of the graph's initializers."""
    with np.load(WEIGHTS, allow_pickle=False) as file:
        return dict(file)


def train(count: int = 1_500_000, epochs: int = 1, batch: int = 512) -> dict[str, Any]:
    """Trains the model; returns its weights and prints how it does on samples unseen."""
    import torch
    from dccompile.models.dlrm import CONFIGS, module

    torch.manual_seed(0)
    model = module(CONFIGS["dlrm-clicks"])
    for table in model.tables:
        torch.nn.init.normal_(table, std=0.1)
    inputs, clicks = samples(count, 1)
    dense, sparse = (torch.from_numpy(inputs[name]) for name in ("dense", "sparse"))
    target = torch.from_numpy(clicks)
    held, truth = samples(100_000, 2)
    tested = [torch.from_numpy(held[name]) for name in ("dense", "sparse")]
    steps = epochs * (count // batch)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(count)
        for first in range(0, count - batch + 1, batch):
            pick = order[first : first + batch]
            y = model(dense[pick], sparse[pick])[:, 0]
            loss = torch.nn.functional.binary_cross_entropy(y, target[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            scores = model(*tested)[:, 0].numpy()
        measured = f"AUC {auc(truth, scores):.4f}, NE {normalized_entropy(truth, scores):.4f}"
        print(f"epoch {epoch}: {measured}", flush=True)
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", required=True)
    parser.parse_args()
    np.savez_compressed(WEIGHTS, **train())
