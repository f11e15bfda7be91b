"""W = main + outliers, exactly: what lets sums of products u8 x s8 stay in 16 bits.

A k-step of the integer kernels multiplies 4 consecutive k of a column. vpmaddubsw sums its halves,
k (0, 1) and k (2, 3), in 16 bits each, saturating; a *window* of `period` k-steps then adds up such
sums of the same half, modulo 2**16, before they go on in 32 bits. For u8 activations, which are at
most 255, that is exact whatever they are, if of every half

- of a k-step: the positive weights sum to at most 128, and the negative ones to at least -128:
  255 * 128 = 32640 < 2**15, so that nothing saturates;
- of a window: the magnitudes of the weights sum to at most 257. Its sum of products lies between
  -255 * negative and 255 * positive, 65536 values at most, which a constant `offset` moves into the
  16 bits of a signed number. The offsets are subtracted from the column's sum.

What of a weight breaks these rules is an outlier: it is multiplied apart, in 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERIODS = (1, 2, 3, 4)  # k-steps of a window
RUN = 4  # outliers that are summed in 16 bits
_HALF = 128  # most that the weights of one sign may sum to in a half of a k-step
_WINDOW = 257  # most that the magnitudes may sum to in a half of a window


@dataclass(frozen=True)
class Split:
    """A matrix in k-steps: main + outliers are the weights.

    main (steps, 4, n) s8 · outliers (steps, 4, n) s16 · offsets (windows, 2, n) s16, of the halves.
    """

    main: np.ndarray
    outliers: np.ndarray
    offsets: np.ndarray


def steps(b: np.ndarray) -> np.ndarray:
    """b (k, n) s8 as the kernels' k-steps (ceil(k / 4), 4, n).

    Where k % 4 != 0 the last step has the last 4 bytes of a row of A, whose first ones are those
    of the step before: these weights are 0. With k < 4 it is the end that is 0.
    """
    k, n = b.shape
    count = -(-k // 4)
    out = np.zeros((count * 4, n), np.int8)
    whole = k // 4 * 4
    out[:whole] = b[:whole]
    if k % 4:
        end = count * 4 if k >= 4 else k
        out[end - k % 4 : end] = b[whole:]
    return out.reshape(count, 4, n)


def split(quads: np.ndarray, period: int) -> Split:
    """Splits k-steps (steps, 4, n) s8, by greed: few weights of few k-steps are outliers."""
    main = _windowed(_halved(quads), period)
    windows = main.reshape(-1, period, 2, 2, quads.shape[2])
    positive = np.maximum(windows, 0).sum(axis=(1, 3), dtype=np.int32)
    negative = positive - windows.sum(axis=(1, 3), dtype=np.int32)
    offsets = np.clip(0, 255 * negative - 32768, 32767 - 255 * positive)
    kept = main[: len(quads)].reshape(quads.shape)
    return Split(kept.astype(np.int8), quads - kept, offsets.astype(np.int16))


def _halved(quads: np.ndarray) -> np.ndarray:
    """K-steps (steps, 4, n) s8 with halves that keep their rule: s16 (steps, 2, 2, n)."""
    main = quads.astype(np.int16).reshape(len(quads), 2, 2, -1)
    _shorten_halves(np.moveaxis(main, 2, 3))
    return main


def _windowed(halved: np.ndarray, period: int) -> np.ndarray:
    """The same with windows that keep theirs, zeros added up to whole windows."""
    count, _, _, n = halved.shape
    main = np.zeros((-(-count // period) * period, 2, 2, n), np.int16)
    main[:count] = halved
    if period > 1:
        _shorten_windows(main.reshape(-1, period, 2, 2, n))
    return main


def _shorten_halves(pairs: np.ndarray) -> None:
    """Brings pairs (..., 2) of one sign to a sum of magnitudes of at most 128, in place."""
    total = pairs[..., 0] + pairs[..., 1]
    same = pairs[..., 0] * pairs[..., 1] > 0
    at = np.nonzero(same & (np.abs(total) > _HALF))
    excess = total[at] - np.sign(total[at]) * np.int16(_HALF)
    largest = (*at, np.argmax(np.abs(pairs[at]), axis=1))
    pairs[largest] -= excess


def _shorten_windows(main: np.ndarray) -> None:
    """Brings the magnitudes of the halves of windows (windows, period, 2, 2, n) to 257 in all."""
    sizes = np.abs(main)
    total = (sizes[:, :, :, 0] + sizes[:, :, :, 1]).sum(axis=1, dtype=np.int16)
    at = np.nonzero(total > _WINDOW)
    window = main[at[0], :, at[1], :, at[2]]  # (violating, period, 2)
    excess = total[at] - np.int16(_WINDOW)
    each = np.arange(len(excess))
    # the largest steps first, of each the larger weight first
    order = np.argsort(-np.abs(window).sum(axis=2), axis=1, kind="stable")
    for rank in range(window.shape[1]):
        step = order[:, rank]
        first = np.argmax(np.abs(window[each, step]), axis=1)
        for k in (first, 1 - first):
            value = window[each, step, k]
            taken = np.minimum(np.abs(value), excess)
            window[each, step, k] = value - np.sign(value) * taken
            excess -= taken
        if not excess.any():
            break
    main[at[0], :, at[1], :, at[2]] = window


@dataclass(frozen=True)
class Runs:
    """Outliers as runs of `RUN` weights of one column.

    With u8 activations the sum of products of a run stays in 16 bits, as do the products.
    values (runs, RUN) s16 · k (runs, RUN) · columns (runs,), sorted. What a run has less is zeros.
    """

    values: np.ndarray
    k: np.ndarray
    columns: np.ndarray


def runs(outliers: np.ndarray, k: int) -> Runs:
    """Outliers (steps, 4, n) s16 of a matrix (k, n) as runs."""
    flat = outliers.reshape(-1, outliers.shape[2])
    place, column = np.nonzero(flat != 0)
    by_column = np.argsort(column, kind="stable")
    place, column = place[by_column], column[by_column]
    values = flat[place, column]
    whole = k // 4 * 4
    place = np.where((place >= whole) & (k > 4), place - len(flat) + k, place)
    order = np.arange(len(column)) - np.searchsorted(column, column)  # within the column
    starts = order % RUN == 0
    number = np.cumsum(starts) - 1
    over = np.zeros(int(starts.sum()), bool)
    for sign in (1, -1):
        part = np.maximum(sign * values.astype(np.int64), 0)
        over |= np.bincount(number, part, len(over)) > _HALF
    starts |= over[number]  # each weight of these is a run
    number = np.cumsum(starts) - 1
    order = np.arange(len(number)) - np.nonzero(starts)[0][number]
    shape = int(starts.sum()), RUN
    found = Runs(np.zeros(shape, np.int16), np.zeros(shape, np.int64), column[starts])
    found.values[number, order] = values
    found.k[number, order] = place
    return found


def counts(b: np.ndarray) -> tuple[int, ...]:
    """For every one of PERIODS the `runs` of b (k, n) s8, rounded up to few different numbers.

    One of them is about 1.5 times the one before: like layers then share code and tuning.
    """
    quads = steps(b)
    halved, found = _halved(quads), []
    for period in PERIODS:
        main = _windowed(halved, period)[: len(quads)].reshape(quads.shape)
        found.append(rounded(len(runs(quads - main, len(b)).columns)))
    return tuple(found)


def sample(rng: np.random.Generator, k: int, n: int, limits: tuple[int, ...]) -> np.ndarray:
    """Random weights (k, n) s8 that have about as many `runs` as `limits`, and not more."""
    shape = rng.standard_t(8, (k, n))
    low, high = 0.0, 64.0
    for _ in range(7):
        middle = (low + high) / 2
        codes = np.clip(np.rint(shape * middle), -128, 127).astype(np.int8)
        fits = all(have <= most for have, most in zip(counts(codes), limits, strict=True))
        low, high = (middle, high) if fits else (low, middle)
    return np.clip(np.rint(shape * low), -128, 127).astype(np.int8)


def rounded(count: int) -> int:
    """The next of 0, 8, 12, 16, 24, 32, 48, ..."""
    if count == 0:
        return 0
    power = 8
    while power < count:
        if power * 3 // 2 >= count:
            return power * 3 // 2
        power *= 2
    return power
