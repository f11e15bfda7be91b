"""Ranges of 8-bit tensors: the least error there is, zero exact, the error as foretold."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest

from dccompile.errors import UsageError
from dccompile.quantization import ranges
from dccompile.quantization.histogram import Histogram
from dccompile.quantization.ranges import METHODS, Range, choose, dequantize, quantize

RANDOM = np.random.default_rng(11)
N = 40_000
NORMAL = RANDOM.standard_normal(N)
LAPLACE = RANDOM.laplace(size=N)
BIMODAL = np.where(RANDOM.random(N) < 0.5, RANDOM.normal(-3, 0.3, N), RANDOM.normal(5, 1, N))

DATA = {
    "normal": NORMAL,
    "half_normal": np.abs(NORMAL),
    "relu": np.maximum(NORMAL, 0),
    "laplace": LAPLACE,
    "half_laplace": np.abs(LAPLACE),
    "negative": -np.abs(LAPLACE),
    "bimodal": BIMODAL,
    "uniform": RANDOM.uniform(-1, 2, N),
    "gelu": NORMAL * 0.5 * (1 + np.tanh(0.8 * NORMAL)),
    "one_outlier": np.append(NORMAL, 300),
    "outlier_after_relu": np.append(np.maximum(NORMAL, 0), 60),
    "skewed": np.append(0.1 * NORMAL, np.abs(LAPLACE)),
    "heavy_tails": RANDOM.standard_t(3, N),
    "pixels": RANDOM.integers(0, 256, N) / 255,
    "dark_pixels": RANDOM.integers(0, 200, N) / 255,
    "signed_pixels": (RANDOM.integers(3, 240, N) - 128) / 128,
    "normalized_pixels": (RANDOM.integers(0, 256, N) / 255 - 0.485) / 0.229,
    "few_values": RANDOM.standard_normal(50),
}


def histogram(x: np.ndarray) -> Histogram:
    made = Histogram()
    made.add(x.astype(np.float32))
    return made


def sqnr(x: np.ndarray, r: Range) -> float:
    """dB, of the values themselves."""
    x = x.astype(np.float32)
    noise = np.square(x - dequantize(quantize(x, r), r), dtype=np.float64).sum()
    return 10 * math.log10(np.square(x, dtype=np.float64).sum() / noise) if noise else math.inf


def exhaustive(x: np.ndarray) -> float:
    """The best of all zero points, with 300 scales each (20000 where only one is possible)."""
    values, counts = np.unique(x.astype(np.float32).astype(np.float64), return_counts=True)
    if len(values) > 1500:  # quantiles do for smooth data, if the ends stay
        values = np.concatenate([values[:250], values[250 : -250 : N // 1000], values[-250:]])
        counts = np.concatenate([np.ones(250), np.full(len(values) - 500, N // 1000), np.ones(250)])
    low, high = min(values[0], 0), max(values[-1], 0)
    one_sided = 0 if low == 0 else 255 if high == 0 else None
    zeros = range(0, 256) if one_sided is None else [one_sided]
    best = math.inf
    for scale in (high - low) / 255 * np.geomspace(0.02, 2, 300 if one_sided is None else 20_000):
        codes = np.rint(values / scale)
        for zero in zeros:
            lost = values - scale * np.clip(codes, -zero, 255 - zero)
            best = min(best, float(counts @ np.square(lost)))
    return best


def check(r: Range) -> None:
    assert r.scale == float(np.float32(r.scale)) >= np.finfo(np.float32).tiny
    assert 0 <= r.zero <= 255 and isinstance(r.zero, int)
    assert (r.low, r.high) == (-r.zero * r.scale, (255 - r.zero) * r.scale)
    assert np.isfinite(np.float32([r.low, r.high])).all()
    assert dequantize(quantize(np.zeros(1, np.float32), r), r) == 0


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_the_foretold_error_is_the_real_one(name: str, method: str) -> None:
    x = DATA[name]
    r = choose(histogram(x), method)
    check(r)
    if r.sqnr < 60:  # beyond, bins hide it
        assert r.sqnr == pytest.approx(sqnr(x, r), abs=0.05 if len(x) > 50 else 0.5)
    else:
        assert sqnr(x, r) > 60
    outside = (x < r.low - r.scale / 2) | (x > r.high + r.scale / 2)
    assert r.clipped == pytest.approx(outside.mean(), abs=1e-3)


@pytest.mark.parametrize("name", DATA)
def test_l2_is_the_least_of_all(name: str) -> None:
    h = histogram(DATA[name])
    best = choose(h)
    for method in METHODS:
        assert sqnr(DATA[name], best) >= sqnr(DATA[name], choose(h, method)) - 0.01


@pytest.mark.parametrize(
    "name",
    ["half_normal", "half_laplace", "negative", "outlier_after_relu", "dark_pixels", "few_values"],
)
def test_l2_finds_what_exhaustive_search_finds(name: str) -> None:
    x = DATA[name]
    r = choose(histogram(x))
    noise = np.square(x.astype(np.float32).astype(np.float64)).sum() / 10 ** (sqnr(x, r) / 10)
    assert noise <= exhaustive(x) * 1.02


@pytest.mark.parametrize("name", ["normal", "laplace", "bimodal", "one_outlier", "skewed"])
def test_l2_finds_the_best_zero_point(name: str) -> None:
    data = ranges._Data(histogram(DATA[name]), (-math.inf, math.inf))
    whole = (data.high - data.low) / 255 / data.unit
    scales = whole * np.geomspace(0.02, 1.2, 250)
    least = min(float(data.errors(scales, np.full(250, z))[0].min()) for z in range(256))
    found = choose(histogram(DATA[name]))
    scale, zero = np.array([found.scale / data.unit]), np.array([found.zero])
    assert data.errors(scale, zero)[0][0] <= least * 1.002


def test_the_quick_error_is_the_sum_over_all_bins() -> None:
    data = ranges._Data(histogram(BIMODAL), (-3.2, 6.0))
    scales = np.array([1.0, 3.7, 40.0, 90.0, 300.0])
    zeros = np.array([0, 17, 80, 128, 255])
    quick, fitted = data.errors(scales, zeros)
    x = data.values / data.unit
    for scale, zero, error, better in zip(scales, zeros, quick, fitted, strict=True):
        codes = np.clip(np.rint(x / scale), -zero, 255 - zero)
        # at a bound, codes are those of the bin's centre
        assert error == pytest.approx((data.counts * (x - scale * codes) ** 2).sum(), rel=1e-3)
        best = (data.counts * x * codes).sum() / (data.counts * codes**2).sum()
        assert better == pytest.approx(best if best > 0 else scale, rel=1e-3)


def test_one_sided_data_use_all_codes() -> None:
    assert choose(histogram(DATA["relu"])).zero == 0
    assert choose(histogram(DATA["negative"])).zero == 255


def test_data_on_a_grid_get_it() -> None:
    assert choose(histogram(DATA["pixels"])).scale == float(np.float32(1 / 255))
    for name in ("dark_pixels", "signed_pixels"):
        assert sqnr(DATA[name], choose(histogram(DATA[name]))) > 80
    ternary = np.array([0, 0.7, 1.4] * 5)
    assert sqnr(ternary, choose(histogram(ternary))) > 90


def test_bounds_count_as_the_values_beyond_them() -> None:
    x = DATA["normal"] * 3
    h = histogram(x)
    relu = choose(h, bounds=(0.0, math.inf))
    check(relu)
    assert relu.zero == 0 and relu.clipped < 1e-3
    assert relu.scale == pytest.approx(choose(histogram(np.maximum(x, 0))).scale, rel=1e-3)
    for method in METHODS:
        clipped = choose(h, method, bounds=(0.0, 6.0))
        assert clipped.zero == 0 and clipped.high == pytest.approx(6, rel=0.02)
    hard_swish = choose(h, bounds=(-3.0, math.inf))
    assert hard_swish.low == pytest.approx(-3, abs=0.2)
    assert hard_swish.sqnr == pytest.approx(sqnr(np.maximum(x, -3), hard_swish), abs=0.1)
    nothing = choose(histogram(DATA["negative"]), bounds=(0.0, math.inf))
    assert (nothing.scale, nothing.zero) == (float(np.float32(1 / 255)), 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [3.7, -3.7, 1e30, -3.4e38, 1e-30])
def test_a_constant(method: str, value: float) -> None:
    r = choose(histogram(np.full(9, value)), method)
    check(r)
    assert r.zero == (0 if value > 0 else 255)
    assert r.sqnr > 100 and r.clipped == 0
    assert sqnr(np.full(9, value), r) > 100


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1e-45, -1e-40, 1e-37])
def test_a_scale_is_never_denormal(method: str, value: float) -> None:
    check(choose(histogram(np.linspace(0, value, 100)), method))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros(method: str) -> None:
    for h in histogram(np.zeros(5)), Histogram():
        r = choose(h, method)
        assert r == Range(float(np.float32(1 / 255)), 0, 0.0, r.high, 0.0, math.inf)
        assert r.high == pytest.approx(1)


def test_the_widest_range() -> None:
    x = np.array([-3.4e38, 1e38, 3.4e38], np.float32)
    for method in METHODS:
        check(choose(histogram(x), method))
    assert choose(histogram(x), "minmax").sqnr > 40


def test_an_enormous_outlier() -> None:
    h = histogram(np.append(NORMAL, 1e30))
    for method in METHODS:
        check(choose(h, method))
    assert choose(h).high == pytest.approx(1e30)


def test_minmax_and_percentile() -> None:
    x = DATA["normal"].astype(np.float32)
    r = choose(histogram(x), "minmax")
    assert r.low == pytest.approx(x.min(), abs=r.scale / 2) and r.clipped == 0
    assert r.scale == pytest.approx((float(x.max()) - float(x.min())) / 255)
    cut = choose(histogram(x), "percentile", percentile=99)
    assert cut.low == pytest.approx(np.quantile(x, 0.005), abs=cut.scale)
    assert cut.high == pytest.approx(np.quantile(x, 0.995), abs=cut.scale)
    half = choose(histogram(np.maximum(x, 0)), "percentile", percentile=99)
    assert half.zero == 0 and half.high == pytest.approx(cut.high, abs=cut.scale)


@pytest.mark.parametrize("name", ["normal", "half_normal", "laplace", "gelu"])
def test_entropy_is_that_of_onnxruntime(name: str) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    x = DATA[name].astype(np.float32)
    levels = 512 if x.min() >= 0 else 256  # of [-t, t]: as many on the side where data are
    collector = calibrate.HistogramCollector("entropy", False, 2049, levels, 99.999, None)
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"t": x})
        low, high = collector.compute_collection_result()["t"][:2]
    r = choose(histogram(x), "entropy")
    # theirs divides bins unevenly among levels, ours evenly
    assert r.low == pytest.approx(float(low), rel=0.3, abs=2 * r.scale)
    assert r.high == pytest.approx(float(high), rel=0.3)


def test_codes_are_those_of_onnx() -> None:
    r = Range(0.5, 10, -5.0, 122.5, 0.0, 0.0)
    x = np.array([-100, -5, -0.25, 0, 0.25, 0.75, 0.3, 122.5, 1e9], np.float32)
    assert quantize(x, r).tolist() == [0, 0, 10, 10, 10, 12, 11, 255, 255]
    assert quantize(x, r).dtype == np.uint8
    assert dequantize(np.array([0, 10, 255], np.uint8), r).tolist() == [-5.0, 0.0, 122.5]


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="method 'best': allowed are l2, minmax") as error:
        choose(histogram(NORMAL), "best")
    assert error.value.code == "DC2040"
    with pytest.raises(UsageError, match="percentile 20") as error:
        choose(histogram(NORMAL), "percentile", percentile=20)
    assert error.value.code == "DC2041"
