"""The difference between two tensors, over any number of runs: powers, angle, extremes.

Only sums are kept, in float64: memory does not grow with the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

SILENT = -200.0  # dB, where there is no signal but an error: nothing real is below
# Values of which float64 copies are made at a time: above 10,000 OpenBLAS would use threads for a
# dot product, and wait for them a hundred times as long where cores are shared.
_BLOCK = 8192

Pair = tuple[str, str]


def decibels(signal: float, noise: float) -> float:
    """Of two powers: inf without noise, `SILENT` where the signal is nothing beside the noise."""
    if noise == 0:
        return math.inf
    if not signal or not math.isfinite(noise):
        return SILENT
    return max(SILENT, 10 * (math.log10(signal) - math.log10(noise)))


@dataclass
class Noise:
    """Of a tensor wanted and one got: `signal`, `got` and `noise` are sums of squares.

    `low` and `high`: what codes can stand for, rounding included; `beyond` counts values wanted
    that lie outside. `bounds`: both tensors are clamped to them, because what reads the tensor does
    not tell values beyond apart. `misshapen`: once the two had different shapes; no error is known
    then. Where what was got is no finite number the error is infinite.
    """

    low: float = -math.inf
    high: float = math.inf
    bounds: tuple[float, float] = (-math.inf, math.inf)
    count: int = 0
    signal: float = 0.0
    got: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    largest_error: float = 0.0
    equal: int = 0
    beyond: int = 0
    misshapen: bool = False

    def add(self, want: np.ndarray, got: np.ndarray) -> None:
        """Tensors of any shape, float or integers."""
        if want.shape != got.shape:
            self.misshapen = True
            return
        self.count += want.size
        wanted, gotten = want.reshape(-1), got.reshape(-1)
        for start in range(0, want.size, _BLOCK):
            a = wanted[start : start + _BLOCK].astype(np.float64)
            b = gotten[start : start + _BLOCK].astype(np.float64)
            if self.bounds != (-math.inf, math.inf):
                a, b = np.clip(a, *self.bounds), np.clip(b, *self.bounds)
            gap = b - a
            self.signal += float(a @ a)
            self.got += float(b @ b)
            self.product += float(a @ b)
            self.noise += float(gap @ gap)
            self.largest = max(self.largest, float(np.abs(a).max()))
            error = float(np.abs(gap).max())
            self.largest_error = max(self.largest_error, error if error == error else math.inf)
            self.equal += int(np.count_nonzero(gap == 0))
            self.beyond += int(np.count_nonzero((a < self.low) | (a > self.high)))

    @property
    def sqnr(self) -> float:
        """Signal to noise, dB."""
        return decibels(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        """1 where both are zero, 0 where one is or has no finite size."""
        if not self.signal or not self.got or not math.isfinite(self.got):
            return float(self.signal == self.got)
        ratio = self.product / math.sqrt(self.signal) / math.sqrt(self.got)
        return max(-1.0, min(1.0, ratio))

    @property
    def relative(self) -> float:
        """The largest error over the largest value; any is 1 where all values are zero."""
        if not self.largest_error:
            return 0.0
        return self.largest_error / self.largest if self.largest else 1.0

    def share(self, count: int) -> float:
        """Of the values; 0 of none."""
        return count / max(1, self.count)


@dataclass
class Pairs:
    """Named tensors to compare by twos. Each waits for its partner, and no longer."""

    noises: dict[Pair, Noise] = field(default_factory=dict)
    _readers: dict[str, list[Pair]] = field(default_factory=dict)
    _waiting: dict[Pair, np.ndarray] = field(default_factory=dict)

    def add(self, want: str, got: str) -> Noise:
        """The sums of a pair, which may be asked for more than once."""
        pair = want, got
        if pair not in self.noises:
            self.noises[pair] = Noise()
            for name in dict.fromkeys(pair):
                self._readers.setdefault(name, []).append(pair)
        return self.noises[pair]

    def names(self) -> list[str]:
        """All tensors; partners are near each other."""
        return list(self._readers)

    def visit(self, name: str, value: np.ndarray) -> None:
        """One of `names` of the present run; every run gives each once."""
        for pair in self._readers[name]:
            if pair[0] == pair[1]:
                self.noises[pair].add(value, value)
            elif pair not in self._waiting:
                self._waiting[pair] = value
            else:
                other = self._waiting.pop(pair)
                want, got = (value, other) if name == pair[0] else (other, value)
                self.noises[pair].add(want, got)
