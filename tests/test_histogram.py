"""Histograms: the same state however the data are split, every value in its bin."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from dccompile.quantization.histogram import Histogram

RANDOM = np.random.default_rng(5)
NORMAL = RANDOM.standard_normal(3000).astype(np.float32)
SMALLEST = np.float32(1e-45)

DATA = {
    "normal": NORMAL,
    "relu": np.maximum(NORMAL, 0),
    "negative": -np.abs(NORMAL),
    "range_doubles_often": (NORMAL * 2.0 ** RANDOM.integers(-40, 40, 3000)).astype(np.float32),
    "every_exponent": (NORMAL * 2.0 ** RANDOM.integers(-149, 126, 3000)).astype(np.float32),
    "denormals": (RANDOM.integers(-3000, 3000, 3000) * SMALLEST).astype(np.float32),
    "denormals_and_huge": np.append(RANDOM.integers(-9, 9, 500) * SMALLEST, [1e30, -3e38]),
    "huge": NORMAL * np.float32(1e30),
    "far_from_zero": np.float32(5) + np.float32(1e-3) * NORMAL,
    "one_value": np.array([0.1], np.float32),
    "one_value_often": np.full(100, -7.3, np.float32),
    "zeros": np.array([0.0, -0.0, 0.0], np.float32),
    "pixels": (RANDOM.integers(0, 256, 3000) / 255).astype(np.float32),
    "half_floats": NORMAL.astype(np.float16),
}


def histogram(*parts: np.ndarray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def pieces(x: np.ndarray, seed: int) -> list[np.ndarray]:
    """The values in a random order, cut at random places; some pieces are empty."""
    random = np.random.default_rng(seed)
    cuts = np.sort(random.integers(0, x.size + 1, random.integers(1, 12)))
    return np.split(random.permutation(x), cuts)


@pytest.mark.parametrize("name", DATA)
def test_order_and_splits_do_not_matter(name: str) -> None:
    x = DATA[name].astype(DATA[name].dtype if name == "half_floats" else np.float32)
    whole = histogram(x)
    for seed in range(8):
        assert histogram(*pieces(x, seed)) == whole
    assert histogram(*np.sort(x).reshape(-1, 1)) == whole
    parts = [histogram(part) for part in pieces(x, 9)]
    union = Histogram()
    for part in parts:
        union = union.merge(part)
    assert union == whole


@pytest.mark.parametrize("name", DATA)
def test_every_value_is_in_its_bin(name: str) -> None:
    x = DATA[name].astype(np.float32)
    h = histogram(x)
    assert (h.count, h.zeros) == (x.size, int((x == 0).sum()))
    assert (h.low, h.high) == (x.min(), x.max())
    width = Fraction(h.width)
    expected: dict[int, int] = {}
    for value in x[x != 0].tolist():
        number = math.floor(Fraction(value) / width)
        expected[number] = expected.get(number, 0) + 1
    centres, counts = h.bins()
    found = {
        math.floor(Fraction(c) / width): n
        for c, n in zip(centres.tolist(), counts.tolist(), strict=True)
        if n
    }
    assert found == expected
    assert len(centres) <= Histogram.BINS
    if len(centres):
        assert counts[0] and counts[-1]
        assert x.min() <= centres[0] and centres[-1] <= x.max()


def test_bins_are_as_fine_as_they_may() -> None:
    h = histogram(np.array([-1, 1], np.float32) * np.float32(0.999))
    assert h.width == 2.0**-13  # 2^-14 would need 32736 bins
    assert histogram(np.array([3.7], np.float32)).width == 2.0**-22  # the last bit of 3.7


def test_a_different_value_is_a_different_histogram() -> None:
    changed = NORMAL.copy()
    changed[17] += 0.01
    assert histogram(changed) != histogram(NORMAL)
    assert histogram(NORMAL[:-1]) != histogram(NORMAL)


def test_any_shape_and_strides() -> None:
    x = NORMAL.reshape(10, 20, 15)
    assert histogram(x) == histogram(NORMAL)
    assert histogram(x.transpose(2, 0, 1)[:, ::-1]) == histogram(NORMAL)
    assert histogram(x[:0]) == Histogram()


def test_more_values_than_a_chunk() -> None:
    x = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    h = histogram(x)
    centres, counts = h.bins()
    assert counts.sum() == x.size
    assert (counts * centres).sum() == pytest.approx(x.sum(dtype=np.float64), abs=1)
    assert h == histogram(x[::-1])


def test_merging_leaves_its_operands_alone() -> None:
    small, large = histogram(NORMAL), histogram(NORMAL * np.float32(1e6))
    union = small.merge(large)
    assert small == histogram(NORMAL)
    assert union == large.merge(small) == histogram(NORMAL, NORMAL * np.float32(1e6))
    assert small.merge(Histogram()) == small
