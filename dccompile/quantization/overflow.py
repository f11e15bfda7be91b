"""How many k-steps of a layer may be summed in 16 bits, judged by calibration data.

The integer kernels for machines without VNNI sum products u8 x s8 of pairs of neighbouring k in
16 bits (vpmaddubsw), and can go on in 16 bits for a *period* of k-steps of 4 before they spill to
32. Which sums these are: those of k-step s, k 4s .. 4s+3, have two halves; a window sums the same
half of `period` k-steps, the first window from k = 0 on. Where K % 4 != 0 the last step's k are
right-aligned in it.

What calibration has not seen may overflow: periods of this module are used only where the user of
the compiler asks for it (``compile(accumulation="calibrated")``). Without, the compiler splits off
what could overflow for any input at all, see ``dccompile.outliers``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..outliers import steps

PERIODS = (8, 6, 4, 3, 2, 1)
_ALL = 24  # a multiple of every period, in k-steps
_MOST = 32767
_ROWS = 64  # of a sample, at once


@dataclass(frozen=True)
class Spill:
    """A period that calibration allows; 0: none, not even the sums of pairs are safe.

    largest: magnitude of the largest 16-bit sum that was seen with this period. probability: that
    such a sum leaves 16 bits, were all sums of a window and column normally distributed, the mean
    over windows and columns. margin: largest * margin fits 16 bits. digest: of the weights.
    """

    period: int
    largest: int
    probability: float
    margin: float
    digest: int

    def to_json(self) -> dict[str, Any]:
        """The facts of a layer, as the front end reads them from the model's metadata."""
        return {
            "period": self.period,
            "margin": self.margin,
            "probability": self.probability,
            "weights": self.digest,
        }


def spill_period(codes_w: np.ndarray, a: Iterable[np.ndarray], margin: float = 1.5) -> Spill:
    """The longest of PERIODS whose sums stay below 2**15 / margin on all samples.

    codes_w (k, n) s8 with zero points 0; every sample of `a` is (rows, k) u8 codes as the layer
    multiplies them (of s8 codes those plus 128). Raises InputError without samples or where their
    shape or dtype is another.
    """
    quads = steps(codes_w)
    count, _, n = quads.shape
    padded = np.zeros((-(-count // _ALL) * _ALL, 2, 2, n), np.float32)
    padded[:count] = quads.reshape(count, 2, 2, n)
    largest = dict.fromkeys(PERIODS, 0)
    sums = {p: np.zeros((2, len(padded) // p, 2, n)) for p in PERIODS}  # of x and of x**2
    rows = 0
    for number, sample in enumerate(a):
        if sample.dtype != np.uint8 or sample.ndim != 2 or sample.shape[1] != len(codes_w):
            raise InputError(
                f"activations, sample {number}: {sample.dtype} of shape {sample.shape}, allowed "
                f"is uint8 (rows, {len(codes_w)}). Fix: give the codes that the layer multiplies",
                "DC2138",
            )
        for first in range(0, len(sample), _ROWS):
            part = sample[first : first + _ROWS]
            rows += len(part)
            _observe(_steps_of(part, len(padded)), padded, largest, sums)
    if not rows:
        raise InputError(
            "activations: no samples, at least one row is needed. Fix: give calibration data",
            "DC2139",
        )
    digest = zlib.crc32(codes_w.tobytes())
    for period in PERIODS:
        if largest[period] * margin <= _MOST and largest[1] * margin <= _MOST:
            chance = _probability(sums[period], rows)
            return Spill(period, largest[period], chance, margin, digest)
    return Spill(0, largest[1], _probability(sums[1], rows), margin, digest)


def _steps_of(a: np.ndarray, count: int) -> np.ndarray:
    """A (rows, k) as k-steps (count, 2, rows, 2), zeros beyond its own."""
    quads = steps(a.T.view(np.int8)).view(np.uint8)
    out = np.zeros((count, 2, 2, len(a)), np.float32)
    out[: len(quads)] = quads.reshape(len(quads), 2, 2, len(a))
    return out.swapaxes(2, 3)


def _observe(
    a: np.ndarray, b: np.ndarray, largest: dict[int, int], sums: dict[int, np.ndarray]
) -> None:
    """Adds what rows (steps, 2, rows, 2) times weights (steps, 2, 2, n) show."""
    for first in range(0, len(b), _ALL):
        halves = np.matmul(a[first : first + _ALL], b[first : first + _ALL])
        for period in PERIODS:
            windows = halves.reshape(-1, period, *halves.shape[1:]).sum(axis=1)
            largest[period] = max(largest[period], int(np.abs(windows).max()))
            here = slice(first // period, (first + _ALL) // period)
            sums[period][0, here] += windows.sum(axis=2)
            sums[period][1, here] += np.square(windows, dtype=np.float64).sum(axis=2)


def _probability(sums: np.ndarray, rows: int) -> float:
    mean = sums[0] / rows
    deviation = np.sqrt(np.maximum(sums[1] / rows - mean**2, 0.0))
    total = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for room in (_MOST - mean, _MOST + mean):
            far = np.where(deviation > 0, room / (deviation * math.sqrt(2)), np.inf)
            # erfc by its asymptotic series: beyond 2 within 10 %, and never below the true value
            tail = np.exp(-np.square(far)) / (np.maximum(far, 0.5) * math.sqrt(math.pi))
            total += float(np.minimum(np.where(far == np.inf, 0.0, tail), 1.0).mean())
    return total / 2
