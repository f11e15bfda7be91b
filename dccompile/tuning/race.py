"""Two competitors timed in turns until it is clear who is faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

PLACES = 4  # that a competitor's code is loaded at: see `Turns`
_SAMPLE_NS = 100_000  # of one sample, in calls
_FIRST_ROUNDS, _FIRST_S = 5, 0.02  # of the first look
_LOST = 0.9  # of the incumbent's speed: a candidate below is not looked at again
_BEHIND = 0.995  # the same, for the upper bound of what more rounds say
_MIN_ROUNDS, _LONG_S = 11, 2.0  # fewer, down to those of the first look, after so many seconds


class Turns(Protocol):
    """A competitor's calls on one problem: `turns.Turns` on a CPU, `replay.Replay` on a GPU."""

    def run(self, calls: int, place: int = 0) -> float:
        """Nanoseconds for so many calls."""


def race(ours: Sequence[Turns], theirs: Sequence[Turns], seconds: float) -> dict[str, Any]:
    """Times both in turns, all problems in every round, until it is clear who is faster.

    A candidate far behind stops after the first look, one that is surely behind at a later one.
    Seconds are those spent in calls: a busy machine does not make for fewer rounds.
    """
    pairs = [
        (a, b, _calls(a), _calls(b) if b is not a else 0) for a, b in zip(ours, theirs, strict=True)
    ]
    look, spent = min(_FIRST_S, seconds), 0.0
    rows: list[list[tuple[float, float]]] = []
    while True:
        row = []
        for a, b, many, more in pairs:
            row.append(_sample(a, b, many, more, len(rows)))
            spent += ((many + 1) * row[-1][0] + (more + 1) * row[-1][1] * (more > 0)) / 1e9
        rows.append(row)
        if len(rows) < _FIRST_ROUNDS or spent < look:
            continue
        look = min(2 * spent, seconds)
        found = _summary(rows)
        enough = len(rows) >= _MIN_ROUNDS or spent >= _LONG_S
        lost = found["ratio"] < _LOST and found["high"] < 1.0
        lost = lost or (enough and found["high"] < _BEHIND)
        if lost or (enough and spent >= seconds):
            return found


def _sample(a: Turns, b: Turns, many: int, more: int, number: int) -> tuple[float, float]:
    """Nanoseconds per call of both, or of the one that both are.

    Rounds alternate in who is first; 32 of them have every place of one with every of the other.
    """
    mine, other = number // 2, number // 2 // PLACES
    if not more:
        ns = a.run(many, mine) / many
        return ns, ns
    if number % 2:
        late = b.run(more, other) / more
        return a.run(many, mine) / many, late
    early = a.run(many, mine) / many
    return early, b.run(more, other) / more


def _calls(turns: Turns) -> int:
    """How many calls fill a sample."""
    spent = min(turns.run(1) for _ in range(3))
    if spent < _SAMPLE_NS:
        many = math.ceil(_SAMPLE_NS / 4 / max(spent, 1))
        spent = max(1.0, turns.run(many) // many)
    return max(1, math.ceil(_SAMPLE_NS / spent))


def bounds(ordered: np.ndarray) -> tuple[float, float]:
    """What holds the median of sorted samples with a chance of 95 %: two of them."""
    count = len(ordered)
    low = max(0, math.floor((count - 1) / 2 - 0.98 * math.sqrt(count)))
    return float(ordered[low]), float(ordered[count - 1 - low])


def _summary(rows: list[list[tuple[float, float]]]) -> dict[str, Any]:
    times = np.array(rows)  # (rounds, problems, 2)
    ratios = np.sort(np.exp(np.log(times[:, :, 1] / times[:, :, 0]).mean(axis=1)))
    us = times[:, :, 0].sum(axis=1) / 1e3
    low, high = bounds(ratios)
    return {
        "status": "ok",
        "reason": "",
        "us": round(float(np.median(us)), 4),
        "p20": round(float(np.percentile(us, 20)), 4),
        "p80": round(float(np.percentile(us, 80)), 4),
        "against_us": round(float(np.median(times[:, :, 1].sum(axis=1))) / 1e3, 4),
        "ratio": round(float(np.median(ratios)), 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "rounds": len(ratios),
    }
