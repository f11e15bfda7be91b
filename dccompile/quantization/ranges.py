"""The range of an 8-bit tensor: a scale and a zero point, from the histogram of its values.

real = scale * (code - zero), codes 0..255. The real number 0 always has a code, because padding and
ReLU make it, and data of one sign use all codes on their side.

The expected squared error of a candidate needs no pass over the bins. With M0 and M1 the number and
the sum of the values in front of each of the 255 places where one code ends and the next begins,
sum (x - s q)^2 = sum x^2 - 2 s sum x q + s^2 sum q^2, where both sums over q are sums over M0 and
M1. A candidate costs about 2 us, so that thousands can be tried: rounding is exact, and data that
lie on a grid (pixels / 255) get theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .entropy import threshold
from .histogram import Histogram

METHODS = ("l2", "minmax", "percentile", "entropy")
_CODES = 255  # steps between the first and the last code
_F32 = np.finfo(np.float32)

# Shares of an end of the data at which a range may end. One outlier in 1e8 values can be worth
# cutting at a hundredth; beyond the data, a wider range may be the one whose grid they lie on.
_ENDS = np.geomspace(0.01, 1.0, 32)
_SCALES = np.geomspace(0.01, 2.0, 2600)  # 0.2 % apart: at 255 steps that is half a step
_KEPT = 8  # best candidates of the first search from which least squares go on
# Around the best: zero points up and down, relative change of the scale, and number of scales
_AROUND = ((12, 0.16, 33), (4, 0.04, 33), (1, 0.005, 33))
_ROUNDS = 4  # of least squares
_BATCH = 128  # candidates at a time: their places fit a second-level cache


@dataclass(frozen=True)
class Range:
    """real = scale * (code - zero).

    `scale`: exactly a float32, positive and normal · `zero`: 0..255 · `low`, `high`: the reals of
    the codes 0 and 255 · `clipped`: share of the values more than half a step outside of these ·
    `sqnr`: expected, in dB, of the data after rounding and clipping; inf if they are exact.
    """

    scale: float
    zero: int
    low: float
    high: float
    clipped: float
    sqnr: float


def choose(
    histogram: Histogram,
    method: str = "l2",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    percentile: float = 99.999,
) -> Range:
    """The range that a method gives; data outside `bounds` count as if clamped to them.

    l2: least expected squared error · minmax: all values · percentile: all but as many per cent,
    half of them on either side · entropy: least KL divergence, symmetric where both signs occur.
    Without data other than 0, the scale is 1/255 and 0 the zero point. Raises UsageError.
    """
    if method not in METHODS:
        raise UsageError(
            f"method '{method}': allowed are {', '.join(METHODS)}. Fix: name one of these", "DC2040"
        )
    if not 50 < percentile <= 100:
        raise UsageError(
            f"percentile {percentile}: allowed is more than 50 up to 100. Fix: give e.g. 99.999",
            "DC2041",
        )
    data = _Data(histogram, bounds)
    if data.low == data.high == 0:
        return data.range(1 / _CODES, 0)
    if method == "l2":
        return data.range(*_search(data))
    ends = data.low, data.high
    if method == "percentile":
        ends = data.percentile(percentile)
    elif method == "entropy":
        ends = threshold(data.values, data.counts, histogram.width)
    return data.range(*_covering(*ends))


def quantize(x: np.ndarray, r: Range) -> np.ndarray:
    """Codes u8 of float32 values as ONNX's QuantizeLinear: round half to even, saturate."""
    codes = np.rint(x / np.float32(r.scale)) + np.float32(r.zero)
    return np.clip(codes, 0, _CODES).astype(np.uint8)


def dequantize(codes: np.ndarray, r: Range) -> np.ndarray:
    """The float32 values of codes."""
    return (codes.astype(np.float32) - np.float32(r.zero)) * np.float32(r.scale)


class _Data:
    """The histogram as a search wants it.

    `values` float64[n] and `counts` int64[n], without zeros; `unit` is the width of a bin, and in
    this unit are `sum_squares` and, for the bins in front of bin i, `number[i]` (M0) and `sum[i]`
    (M1); bin 0 is centred at `origin`.
    """

    def __init__(self, histogram: Histogram, bounds: tuple[float, float]) -> None:
        centres, counts = histogram.bins()
        low, high = bounds
        zero = min(max(0.0, low), high)
        if zero:  # then the zeros count as this value
            centres, counts = np.append(centres, 0.0), np.append(counts, histogram.zeros)
        used = np.flatnonzero(counts)
        values, self.counts = np.clip(centres[used], low, high), counts[used]
        self.values = values
        self.total = histogram.count
        self.low = min(values.min(initial=0.0), max(histogram.low, low), 0.0)
        self.high = max(values.max(initial=0.0), min(histogram.high, high), 0.0)
        if not values.size:
            self.low = self.high = 0.0
            return
        self.unit = histogram.width
        scaled = values / self.unit
        # what is clamped joins the bin where its bound lies
        bins = np.floor(scaled).astype(np.int64)
        first = int(bins.min())
        self.origin = first + 0.5
        self.sum_squares = float((self.counts * scaled**2).sum())
        self.number = _before(bins - first, self.counts)
        self.sum = _before(bins - first, self.counts * scaled)

    def range(self, scale: float, zero: int) -> Range:
        """With this scale as a float32, and what it does to the data."""
        # no denormal scale, and no code whose value is infinite
        most = np.nextafter(_F32.max / np.float32(max(zero, _CODES - zero)), np.float32(0))
        scale = float(np.float32(min(max(scale, float(_F32.tiny)), float(most))))
        low, high = -zero * scale, (_CODES - zero) * scale
        codes = np.clip(np.rint(self.values / scale), -zero, _CODES - zero)
        noise = float((self.counts * (self.values - codes * scale) ** 2).sum())
        signal = float((self.counts * self.values**2).sum())
        outside = (self.values < low - scale / 2) | (self.values > high + scale / 2)
        clipped = float(self.counts[outside].sum()) / max(self.total, 1)
        sqnr = 10 * math.log10(signal / noise) if noise and signal else math.inf
        return Range(scale, zero, low, high, clipped, sqnr)

    def percentile(self, percentile: float) -> tuple[float, float]:
        """The ends of what is left without the outer values."""
        order = np.argsort(self.values, kind="stable")
        values, counts = self.values[order], self.counts[order]
        zeros = self.total - int(counts.sum())
        place = int(np.searchsorted(values, 0.0))
        values, counts = np.insert(values, place, 0.0), np.insert(counts, place, zeros)
        tail = (100 - percentile) / 200 * self.total
        low = values[np.flatnonzero(np.cumsum(counts) > tail)[0]]
        high = values[np.flatnonzero(np.cumsum(counts[::-1])[::-1] > tail)[-1]]
        return min(float(low), 0.0), max(float(high), 0.0)

    def errors(self, scales: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of squared errors, and the scales that fit the same codes best; all (n,)."""
        found = [
            self._errors(scales[i : i + _BATCH], zeros[i : i + _BATCH])
            for i in range(0, len(scales), _BATCH)
        ]
        return np.concatenate([e for e, _ in found]), np.concatenate([s for _, s in found])

    def _errors(self, scales: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # place j is between the multiples q_j and q_j + 1 of the scale
        q = np.arange(_CODES) - zeros[:, None]
        places = (q + 0.5) * scales[:, None]
        places -= self.origin
        np.clip(np.ceil(places, out=places), 0, len(self.number) - 1, out=places)
        before = places.astype(np.intp)
        last = (_CODES - zeros).astype(np.float64)
        xq = last * self.sum[-1] - self.sum[before].sum(axis=1)
        qq = last**2 * self.number[-1] - ((2 * q + 1) * self.number[before]).sum(axis=1)
        errors = self.sum_squares - 2 * scales * xq + scales**2 * qq
        return errors, np.divide(xq, qq, out=scales.copy(), where=(qq > 0) & (xq > 0))


def _before(bins: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """float64[n + 1]: the sum of the amounts in front of every bin, and of all."""
    return np.concatenate([[0.0], np.cumsum(np.bincount(bins, amounts))])


def _covering(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the range from `low` <= 0 to `high` >= 0."""
    scale = (high - low) / _CODES
    return scale, round(-low / scale)


def _search(data: _Data) -> tuple[float, int]:
    """Scale and zero point of the least error: everywhere coarsely, then around the best."""
    low, high = data.low / data.unit, data.high / data.unit
    whole, middle = _covering(low, high)
    one_sided = middle if not low or not high else None
    scales = _SCALES * whole
    # a range narrower than the data gives both sides their share, a wider one ends at `low`
    zeros = np.where(_SCALES < 1, middle, np.ceil(-low / scales))
    if one_sided is None:
        downs, ups = (x.ravel() for x in np.meshgrid(-low * _ENDS, high * _ENDS))
        steps = (downs + ups) / _CODES
        scales = np.append(scales, steps)
        zeros = np.append(zeros, np.rint(downs / steps))
    else:
        zeros[:] = one_sided
    best = _Best(data, whole, middle)
    best.try_all(scales, zeros, _KEPT)
    for up_and_down, change, number in _AROUND:
        near = np.arange(best.zero - up_and_down, best.zero + up_and_down + 1)
        near = near[(near >= 0) & (near <= _CODES)] if one_sided is None else np.array([one_sided])
        grid = np.meshgrid(best.scale * np.linspace(1 - change, 1 + change, number), near)
        best.try_all(grid[0].ravel(), grid[1].ravel(), 1)
    return best.scale * data.unit, best.zero


class _Best:
    """The best candidate so far; at first the range of all values."""

    def __init__(self, data: _Data, scale: float, zero: int) -> None:
        self.data, self.scale, self.zero = data, scale, zero
        self.error = float(data.errors(np.array([scale]), np.array([zero]))[0][0])
        # What the width of the bins hides (w^2 / 12 a value, twice for safety) is no reason to
        # leave a range that has all values, so that exact data get an exact scale.
        if self.error <= data.number[-1] / 6:
            self.error = -math.inf

    def try_all(self, scales: np.ndarray, zeros: np.ndarray, kept: int) -> None:
        """Takes the best of these; for the `kept` best of them least squares go on."""
        errors, fitted = self.data.errors(scales, zeros)
        self._take(errors, scales, zeros)
        for _ in range(_ROUNDS):
            order = np.argsort(errors)[:kept]
            scales, zeros = fitted[order], zeros[order]
            errors, fitted = self.data.errors(scales, zeros)
            self._take(errors, scales, zeros)

    def _take(self, errors: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> None:
        least = int(errors.argmin())
        if errors[least] < self.error:
            self.error = float(errors[least])
            self.scale, self.zero = float(scales[least]), int(zeros[least])
