"""What calibration learns about a float model: histograms of tensors, means of channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from .histogram import Histogram
from .observe import Observed, watch


@dataclass
class Mean:
    """The mean of every channel of a tensor; its channels are along `axis`."""

    axis: int
    count: int = 0
    total: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        rest = tuple(i for i in range(values.ndim) if i != self.axis % values.ndim)
        sums = values.sum(axis=rest, dtype=np.float64)
        self.total = sums if self.total is None else self.total + sums
        self.count += values.size // max(1, sums.size)

    def value(self) -> np.ndarray | None:
        """(channels,) float64; None where nothing was seen."""
        return None if self.total is None or not self.count else self.total / self.count


@dataclass
class Statistics:
    """By tensor. `means` are those of the tensors that layers read."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    means: dict[str, Mean] = field(default_factory=dict)
    observed: Observed | None = None


def collect(
    model: onnx.ModelProto,
    names: Sequence[str],
    channels: Mapping[str, int],
    feeds: Iterable[dict[str, np.ndarray]],
    *,
    shapes: Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: Any = None,
) -> Statistics:
    """Runs the model over the feeds; histograms of `names`, means of those in `channels` (axis)."""
    found = Statistics(
        {name: Histogram() for name in names},
        {name: Mean(axis) for name, axis in channels.items()},
    )

    def visit(name: str, values: np.ndarray) -> None:
        found.histograms[name].add(values)
        if name in found.means:
            found.means[name].add(values)

    found.observed = watch(
        model, names, feeds, visit, shapes=shapes, threads=threads, progress=progress
    )
    return found
