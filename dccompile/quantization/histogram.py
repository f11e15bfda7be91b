"""Histograms of tensors: what is left of calibration data, whatever its amount."""

from __future__ import annotations

import math

import numpy as np

_CHUNK = 1 << 14  # values at a time: larger temporaries would be mapped anew for each
_DIGITS = 24  # of a float32 in binary: bins finer than the last one of the largest stay empty
_SMALLEST = -149  # exponent of the smallest float32


class Histogram:
    """Counts of the values of one tensor, in bins that do not depend on how the data were split.

    Bin k is [k w, (k + 1) w). The width w is the smallest power of two for which the values seen
    so far lie in BINS bins, but not less than the last bit of the largest one. Where the range
    grows, w doubles and neighbours merge exactly; so data in any order and in any pieces give the
    same state, bit by bit. Zeros have a count of their own: quantization represents them exactly.

    `count`: of all values · `zeros`: of those that are 0 · `low`, `high`: least and greatest value,
    0 among them only if present (inf and -inf while empty).
    """

    BINS = 16384

    def __init__(self) -> None:
        self.count = 0
        self.zeros = 0
        self.low, self.high = math.inf, -math.inf
        self._exponent = 0  # of w
        self._first = 0  # number of the first bin, which holds `low`; the last one holds `high`
        self._counts = np.zeros(0, np.int64)  # zeros of the data included

    @property
    def width(self) -> float:
        """w."""
        return math.ldexp(1.0, self._exponent)

    def add(self, values: np.ndarray) -> None:
        """Counts the values of a float32 or float16 array of any shape; all have to be finite."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK].astype(np.float32, copy=False)
            low, high = float(chunk.min()), float(chunk.max())
            if low < self.low or high > self.high:
                self._widen(low, high)
            self.count += chunk.size
            if low <= 0 <= high:
                self.zeros += chunk.size - int(np.count_nonzero(chunk != 0))
            self._counts += np.bincount(self._numbers(chunk), minlength=self._counts.size)

    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres float64[n] and counts int64[n] of the bins from the first value to the last.

        They are w apart, empty ones included. The centre of an outer bin is not beyond the least
        or greatest value. Zeros are not counted.
        """
        counts = self._counts.copy()
        if self.zeros:
            counts[-self._first] -= self.zeros
        used = np.flatnonzero(counts)
        if not used.size:
            return np.zeros(0), np.zeros(0, np.int64)
        begin, end = int(used[0]), int(used[-1]) + 1
        numbers = np.arange(self._first + begin, self._first + end)
        centres = np.ldexp(numbers + 0.5, self._exponent)
        return np.clip(centres, self.low, self.high), counts[begin:end]

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the data of both."""
        union = Histogram()
        for part in self, other:
            if part.count:
                union._widen(part.low, part.high)
        for part in self, other:
            union._fill(part._counts, part._first, part._exponent)
            union.count += part.count
            union.zeros += part.zeros
        return union

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self._state() == other._state()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _state(self) -> tuple[object, ...]:
        place = self.count, self.zeros, self.low, self.high, self._exponent, self._first
        return *place, self._counts.tobytes()

    def _numbers(self, chunk: np.ndarray) -> np.ndarray:
        """The bin of every value, counted from the first bin; exact."""
        # Scaled values are below 2^24, so float32 holds their whole part. Where w > 1, small values
        # would underflow and lose their sign, and 2^127 is the largest factor.
        if not -127 <= self._exponent <= 0:
            chunk = chunk.astype(np.float64)
        scaled = chunk * chunk.dtype.type(math.ldexp(1.0, -self._exponent))
        np.floor(scaled, out=scaled)
        scaled -= chunk.dtype.type(self._first)
        return scaled.astype(np.intp)

    def _widen(self, low: float, high: float) -> None:
        """Makes room for values from `low` to `high`."""
        self.low, self.high = min(self.low, low) + 0.0, max(self.high, high) + 0.0  # -0 becomes 0
        counts, first, exponent = self._counts, self._first, self._exponent
        self._exponent = _exponent(self.low, self.high)
        self._first = _number(self.low, self._exponent)
        last = _number(self.high, self._exponent)
        self._counts = np.zeros(last - self._first + 1, np.int64)
        self._fill(counts, first, exponent)

    def _fill(self, counts: np.ndarray, first: int, exponent: int) -> None:
        """Adds the counts of bins that are as wide as these or finer."""
        numbers = np.arange(first, first + counts.size) >> min(self._exponent - exponent, 63)
        np.add.at(self._counts, numbers - self._first, counts)


def _number(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _exponent(low: float, high: float) -> int:
    """Of the width: it depends on these two numbers alone, and never falls when they part."""
    largest = max(abs(low), abs(high))
    finest = max(math.frexp(largest)[1] - _DIGITS, _SMALLEST) if largest else _SMALLEST
    if low == high:
        return finest
    # BINS + 1 widths would cover the range wherever it lies: start a little below and step up
    exponent = max(finest, math.frexp((high - low) / Histogram.BINS)[1] - 2)
    while _number(high, exponent) - _number(low, exponent) >= Histogram.BINS:
        exponent += 1
    return exponent
