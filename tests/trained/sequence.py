"""A lift that hears commands, and a recurrent network that says where it stands in the end.

A command moves the lift up or down by 1 to 4 of 32 floors (it stops at the lowest and the highest),
sends it to the ground, or turns the meaning of up and down around. Every error of the state is
carried on, and every command may matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SEED = 8
FLOORS, STEPS = 32, 16
_UP, _DOWN, _GROUND, _TURN, TOKENS = 0, 4, 8, 9, 10  # first token of each kind; how many
VALIDATED, _CALIBRATED = 6000, 1024


def accuracy(outputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    """Share of the sequences whose largest score is that of the right floor."""
    return float(np.mean(outputs["y"].argmax(axis=1) == data["floor"]))


def likelihood(outputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    """Geometric mean of the probability given to the right floor."""
    scores = outputs["y"].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    right = scores[np.arange(len(scores)), data["floor"]]
    return float(np.exp(np.mean(right - np.log(np.exp(scores).sum(axis=1)))))


def samples(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Commands (count, STEPS) int64 and the last floor (count,) uint8."""
    chances = np.full(TOKENS, 0.11)
    chances[[_GROUND, _TURN]] = 0.03, 0.09
    tokens = rng.choice(TOKENS, (count, STEPS), p=chances / chances.sum())
    floor, sign = np.zeros(count, np.int64), np.ones(count, np.int64)
    for token in tokens.T:
        step = np.where(token < _DOWN, token + 1, _DOWN - 1 - token) * (token < _GROUND)
        floor = np.clip(floor + sign * step, 0, FLOORS - 1) * (token != _GROUND)
        sign = np.where(token == _TURN, -sign, sign)
    return tokens, floor.astype(np.uint8)


def network(width: int = 48) -> Any:
    """The model as a torch.nn.Module: tokens (N, STEPS) to scores (N, FLOORS)."""
    import torch
    from torch import nn

    class Recurrent(nn.Module):
        """A GRU cell (Cho et al., 2014), its steps written out; they share their weights."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(TOKENS, 16)
            self.inputs = nn.Linear(16, 3 * width)
            self.state = nn.Linear(width, 3 * width)
            self.floor = nn.Linear(width, FLOORS)

        def forward(self, tokens):
            given = self.inputs(self.embedding(tokens))
            h = torch.zeros_like(given[:, 0, :width])
            for step in range(STEPS):
                reset, update, new = given[:, step].split(width, 1)
                reset_h, update_h, new_h = self.state(h).split(width, 1)
                keep = torch.sigmoid(update + update_h)
                candidate = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
                h = candidate + keep * (h - candidate)
            return self.floor(h)

    return Recurrent()


def train(steps: int = 12000, batch: int = 256) -> None:
    """Trains, prints the metrics of the model and writes it."""
    import torch

    from . import export

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = network()
    tokens, floor = samples(VALIDATED, rng)
    data = {"tokens": tokens, "floor": floor}
    calib = {"tokens": samples(_CALIBRATED, rng)[0]}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(1, steps + 1):
        seen, target = samples(batch, rng)
        y = model(torch.from_numpy(seen))
        loss = torch.nn.functional.cross_entropy(y, torch.from_numpy(target.astype(np.int64)))
        export.step(loss, model, optimizer, schedule, limit=1.0)
        if step % (steps // 10) == 0:
            scores = export.run(model, {"tokens": tokens})
            figures = f"accuracy {accuracy(scores, data):.4f}, {likelihood(scores, data):.4f}"
            print(f"step {step}: {figures}", flush=True)
    export.write("sequence", model, calib)
    export.data("sequence", calib, data)


if __name__ == "__main__":
    train()
