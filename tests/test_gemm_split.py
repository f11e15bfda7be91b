"""GEMM with 16-bit sums: the split is exact for any input, and what it costs is told."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from kernels import listed, load, marked
from memory import aligned, tensor

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm

from dccompile import outliers, reference, registry
from dccompile.bench import gemm_cases, problems
from dccompile.machine import TARGETS, missing_features
from dccompile.workload import INT8_LIMITS, NUMPY, Gemm, GemmWeights

NAMES = listed("split")
KERNELS = pytest.mark.parametrize("name", marked(NAMES))


# ---- weights ----
def _uniform(rng, k, n):
    return rng.integers(-128, 128, (k, n))


def _one_column(rng, k, n):
    b = rng.integers(-20, 21, (k, n))
    b[:, n // 2] = rng.choice([-128, 127], k)
    return b


WEIGHTS = {
    "uniform": _uniform,
    "all_127": lambda rng, k, n: np.full((k, n), 127),
    "all_least": lambda rng, k, n: np.full((k, n), -128),
    "both_ends": lambda rng, k, n: rng.choice([-128, 127], (k, n)),
    "all_64": lambda rng, k, n: rng.choice([-64, 64], (k, n)),
    "same_64": lambda rng, k, n: np.full((k, n), 64),
    "zero": lambda rng, k, n: np.zeros((k, n)),
    "small": lambda rng, k, n: rng.integers(-20, 21, (k, n)),
    "one_column": _one_column,
    "one_weight": lambda rng, k, n: np.where(np.arange(k * n).reshape(k, n) == 37, 127, 60),
    "trained": lambda rng, k, n: np.clip(np.rint(rng.standard_t(8, (k, n)) * 26), -128, 127),
}
SHAPES = ((64, 24), (63, 9), (130, 17), (5, 3), (3, 8), (2, 1), (96, 48))


def _weights(kind, k, n, seed=0):
    return WEIGHTS[kind](np.random.default_rng(seed), k, n).astype(np.int8)


# ---- the split itself ----
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("period", outliers.PERIODS)
def test_no_sum_can_leave_16_bits(kind, period):
    """For every half, window, column and prefix: with the activations that are worst for it."""
    for k, n in SHAPES:
        quads = outliers.steps(_weights(kind, k, n))
        cut = outliers.split(quads, period)
        main = cut.main.astype(np.int64).reshape(len(quads), 2, 2, n)
        for worst in (np.maximum(main, 0), np.minimum(main, 0)):
            pairs = 255 * worst.sum(axis=2)
            assert -(2**15) <= pairs.min() and pairs.max() < 2**15  # vpmaddubsw is exact
            windows = np.zeros((len(cut.offsets) * period, 2, n), np.int64)
            windows[: len(pairs)] = pairs
            total = windows.reshape(-1, period, 2, n).sum(axis=1) + cut.offsets
            assert -(2**15) <= total.min() and total.max() < 2**15


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("period", outliers.PERIODS)
def test_main_and_runs_are_the_weights(kind, period):
    for k, n in SHAPES:
        b = _weights(kind, k, n)
        quads = outliers.steps(b)
        cut = outliers.split(quads, period)
        np.testing.assert_array_equal(cut.main + cut.outliers, quads)
        found = outliers.runs(cut.outliers, k)
        rest = np.zeros((k, n), np.int64)
        columns = np.repeat(found.columns, outliers.RUN)
        np.add.at(rest, (found.k.reshape(-1), columns), found.values.reshape(-1))
        ones = np.zeros((k, n), np.int64)
        for at in range(len(quads)):  # where steps() put the weights
            for t in range(4):
                place = 4 * at + t
                if 4 * at + 4 > k and k > 4:
                    place = k - 4 + t
                if place < k:
                    ones[place] += cut.main[at, t]
        np.testing.assert_array_equal(ones + rest, b)
        values = found.values.astype(np.int64)
        for sign in (1, -1):
            assert np.maximum(sign * values, 0).sum(axis=1).max(initial=0) <= 128


def test_few_weights_are_outliers():
    """Of codes of which 0.5 % are beyond +-64, one in 200 at most is multiplied apart."""
    codes = np.rint(np.random.default_rng(0).standard_t(8, (1024, 256)) * 16.7)
    b = np.clip(codes, -128, 127).astype(np.int8)
    assert 0.002 < np.mean(np.abs(b.astype(int)) > 64) < 0.01
    for count in outliers.counts(b):
        assert count * outliers.RUN <= 0.01 * b.size
    assert outliers.counts(_weights("small", 512, 64)) == (0, 0, 0, 0)
    assert min(outliers.counts(_weights("all_127", 64, 16))) * 4 >= 0.4 * 64 * 16


def test_counts_are_rounded_up_to_few_numbers():
    steps = [0, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    for count in range(129):
        assert outliers.rounded(count) == next(s for s in steps if s >= count)


def test_samples_keep_to_their_limits():
    limits = outliers.counts(_weights("trained", 256, 64))
    found = outliers.counts(outliers.sample(np.random.default_rng(1), 256, 64, limits))
    assert all(have <= most for have, most in zip(found, limits, strict=True))
    assert found[-1] * 3 >= limits[-1]


# ---- kernels ----
def _problem(kind, m, n, k, seed=0, **form):
    work = Gemm(**{**dict(m=m, n=n, k=k, a="u8", b="s8", out="s32"), **form})
    rng = np.random.default_rng(seed)
    b = _weights(kind, k, n, seed)
    scale = None
    if work.out != "s32":
        scale = (rng.uniform(0.5, 1.5, n) / (60 * np.sqrt(k))).astype(np.float32)
    zero = 0 if work.runtime else int(rng.integers(*INT8_LIMITS[work.a], endpoint=True))
    weights = GemmWeights(b, scale, None, zero)
    return replace(work, outliers=outliers.counts(b)), weights


def _compile(kernel, target, cases):
    """A function of every (work, params), named f0, f1 and so on."""
    functions, config = {}, {"kind": "llvm", "mcpu": target.mcpu, "mattr": list(target.mattr)}
    for i, (work, params) in enumerate(cases):
        built = kernel.build(work, params, target)
        functions[f"f{i}"] = built.with_attr("global_symbol", f"f{i}")
    return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(config))


def _call(kernel, function, work, weights, params, a):
    out, _ = aligned((len(a), work.n), NUMPY[work.out])
    packed = tensor(kernel.pack(work, weights, params))
    function(tensor(a), packed, tvm.runtime.from_dlpack(out))
    return out


def _run(kernel, target, cases):
    """What (work, weights, params, A) cases give."""
    library = _compile(kernel, target, [(work, params) for work, _, params, _ in cases])
    return [_call(kernel, library[f"f{i}"], *case) for i, case in enumerate(cases)]


def _check(kernel, target, cases):
    for (work, weights, params, a), got in zip(cases, _run(kernel, target, cases), strict=True):
        expected = reference.gemm(work, weights, a)
        np.testing.assert_array_equal(got, expected, err_msg=f"{work} {params}")


def _extremes(work, rng):
    """A whose rows are all of one end, of both in turns, and random."""
    low, high = INT8_LIMITS[work.a]
    a = rng.integers(low, high + 1, (work.m, work.k))
    a[0::5], a[1::5] = high, low
    a[2::5] = np.where(np.arange(work.k) % 2, low, high)
    a[3::5] = rng.choice([low, high], a[3::5].shape)
    return a.astype(NUMPY[work.a])


@cache
def _adversarial(name):
    """Functions for all kinds of weights: their code depends on most outliers of any kind alone."""
    kernel, target = load(name)
    cases = []
    for period, (m, n, k) in zip(
        itertools.cycle(outliers.PERIODS),
        ((37, 40, 67), (16, 33, 256), (9, 16, 63), (12, 9, 130), (33, 48, 3)),
        strict=False,
    ):
        most = zip(*(outliers.counts(_weights(kind, k, n)) for kind in WEIGHTS), strict=True)
        work = Gemm(
            m, n, k, "s8" if period == 3 else "u8", "s8", "s32", outliers=(*map(max, most),)
        )
        lanes = kernel.lanes(work)
        cases.append((work, kernel.Params(lanes, 1, period)))
        assert kernel.layout(*cases[-1]).runs
    return _compile(kernel, target, cases), cases


@KERNELS
@pytest.mark.parametrize("kind", WEIGHTS)
def test_adversarial_weights(name, kind):
    kernel, _ = load(name)
    library, cases = _adversarial(name)
    for i, (work, params) in enumerate(cases):
        zero = 77 if work.a == "u8" else -128
        weights = GemmWeights(_weights(kind, work.k, work.n), a_zero=zero)
        a = _extremes(work, np.random.default_rng(5))
        got = _call(kernel, library[f"f{i}"], work, weights, params, a)
        np.testing.assert_array_equal(got, reference.gemm(work, weights, a), err_msg=f"{work}")


@KERNELS
def test_row_counts(name):
    """Blocks of every number of tiles, of two sizes, the last of few rows."""
    kernel, target = load(name)
    rng, cases = np.random.default_rng(6), []
    for m in (1, 13, 20, 41, 70):
        work, weights = _problem("trained", m, 16, 36, seed=m, a="s8" if m % 2 else "u8")
        params = replace(kernel.default(work, target), mr=kernel.bits // 32, nr=1, period=3)
        assert kernel.layout(work, params).runs
        cases.append((work, weights, params, _extremes(work, rng)))
    _check(kernel, target, cases)


@KERNELS
def test_threads_share_blocks_with_outliers(name):
    kernel, target = load(name)
    work, weights = _problem("trained", 333, 200, 66, out="u8", zero_point=100)
    params = kernel.default(work, target)
    assert kernel.layout(work, params).runs
    _check(kernel, target, [(work, weights, params, _extremes(work, np.random.default_rng(7)))])


@KERNELS
def test_calibrated_periods_sum_all_weights_in_16_bits(name):
    kernel, target = load(name)
    rng, cases = np.random.default_rng(8), []
    for spill, period, nr, m, n, k in (
        (8, 8, 1, 20, 40, 300),
        (3, 8, 2, None, 41, 77),
        (6, 4, 2, 9, 33, 64),
    ):
        work, weights = _problem("uniform", m, n, k)
        work = replace(work, spill=spill)
        weights.b = rng.integers(-8, 9, (k, n)).astype(np.int8)  # 2 * 8 * 8 * 255 < 2**15
        params = replace(kernel.default(work, target), mr=4, nr=nr, period=period)
        lay = kernel.layout(work, params)
        assert (lay.period, lay.runs, lay.offsets) == (min(spill, period), 0, False)
        a = _extremes(replace(work, m=m or 11), rng)
        cases.append((work, weights, params, a))
    _check(kernel, target, cases)


@KERNELS
def test_calibrated_sums_wrap_where_calibration_was_wrong(name):
    """Which is why they are not the default."""
    kernel, target = load(name)
    work, weights = _problem("same_64", 16, 16, 64)
    work, weights = replace(work, spill=8), replace(weights, a_zero=0)
    a = np.full((16, 64), 255, np.uint8)
    (got,) = _run(kernel, target, [(work, weights, kernel.default(work, target), a)])
    assert not np.array_equal(got, reference.gemm(work, weights, a))
    work = replace(work, spill=0)
    _check(kernel, target, [(work, weights, kernel.default(work, target), a)])


# ---- choice ----
@pytest.mark.parametrize("isa", ("x86-64-v3", "x86-64-v4"))
def test_chosen_where_outliers_are_few(isa):
    """Technique on: 16-bit sums; off, or too many outliers: 32-bit sums; same results."""
    target = TARGETS[isa]
    suffix = "avx512" if isa == "x86-64-v4" else "avx2"
    plain = Gemm(64, 512, 512, "u8", "s8", "u8")

    def chosen(**facts):
        return registry.select(replace(plain, **facts), target)

    few = chosen(outliers=(96, 96, 192, 512))
    assert few.kernel.name == f"gemm_u8s8s32split_{suffix}"
    assert few.params.period > 1 and "outliers apart: exact" in few.why
    widening = f"gemm_u8s8s32_{suffix}"
    for facts in ({}, {"outliers": outliers.counts(_weights("uniform", 512, 512))}):
        choice = chosen(**facts)
        assert choice.kernel.name == widening and choice.workload == plain
    assert chosen(m=2, outliers=(0, 0, 0, 0)).kernel.name == widening
    assert chosen(m=None, outliers=(96, 96, 192, 512)).kernel.name == widening
    assert chosen(m=None, outliers=(0, 0, 0, 0)).kernel is few.kernel
    calibrated = chosen(outliers=outliers.counts(_weights("uniform", 512, 512)), spill=8)
    assert calibrated.kernel is few.kernel and "calibration" in calibrated.why
    reason = few.kernel.refuses(replace(plain, outliers=(40000, 40000, 50000, 60000)))
    assert "outliers" in reason and "the time" in reason


def test_other_kernels_do_not_see_the_outliers():
    """Their code, records and tuning are those of all layers of the form."""
    work = Gemm(64, 512, 512, "u8", "s8", "u8", outliers=(96, 96, 192, 512), spill=4)
    choice = registry.select(work, TARGETS["x86-64-v4-vnni"])
    assert choice.kernel.name == "gemm_u8s8s32_vnni"
    assert choice.workload == replace(work, outliers=(), spill=0)


@KERNELS
def test_both_kernels_agree(name):
    kernel, target = load(name)
    work, weights = _problem("trained", 40, 64, 256, out="u8", zero_point=120)
    a = _extremes(work, np.random.default_rng(9))
    on = registry.select(work, target)
    assert on.kernel is kernel
    off = registry.select(replace(work, outliers=()), target)
    assert off.kernel is not kernel and not missing_features(off.kernel.features)
    (first,) = _run(kernel, target, [(work, weights, on.params, a)])
    (second,) = _run(off.kernel, target, [(off.workload, weights, off.params, a)])
    np.testing.assert_array_equal(first, second)


@KERNELS
def test_half_the_instructions_sum_in_32_bits(name):
    """A window of 4 k-steps has one vpmaddwd, where the widening kernel has 8."""
    kernel, target = load(name)
    work, _ = _problem("small", 8, 16, 64)
    counts = {}
    for k, w, p in (
        (kernel, work, replace(kernel.default(work, target), mr=4, nr=1, period=4)),
        ((off := registry.select(replace(work, outliers=()), target)).kernel, off.workload, None),
    ):
        built = k.build(w, p or replace(off.params, mr=4, nr=1), target)
        text = built.script()
        counts[k.name] = text.count("pmaddw.d") + text.count("pmadd.wd")
    mine, other = counts.values()
    assert 0 < 8 * mine <= other


# ---- bench and tuning ----
def test_benched_on_trained_weights_against_the_widening_kernel():
    kernel = registry.named("gemm_u8s8s32split_avx2")
    suite = gemm_cases.Gemms()
    forms = suite.forms_of(kernel)
    assert [str(form) for form in forms] == [
        "u8s8->u8 trained",
        "u8s8->u8 trained-l2",
        "u8s8->u8 calibrated",
    ]
    beyond = []
    for form in forms:
        work = suite.workload(form, (16, 256, 512))
        assert kernel.refuses(work) is None and work.spill == (8 if "calib" in str(form) else 0)
        assert suite.rival(work, kernel, TARGETS["x86-64-v3"]).name == "gemm_u8s8s32_avx2"
        weights, a = suite.problem(work)
        assert outliers.counts(weights.b) == work.outliers and a.shape == (16, 512)
        beyond.append(np.mean(np.abs(weights.b.astype(int)) > 64))
        assert suite.workload(form, (6, 512, 512)).outliers == ()  # too few rows
    assert 0.003 < beyond[0] < 0.008 and 0.03 < beyond[1] < 0.06
    assert suite.forms_of(registry.named("gemm_u8s8s32_avx2")) == suite.forms


@pytest.mark.parametrize("facts", ({"outliers": (48, 48, 64, 128)}, {"spill": 4}))
def test_problems_of_tuning_keep_to_the_facts(facts):
    work = Gemm(16, 64, 128, "u8", "s8", "u8", **facts)
    weights = problems.make(work)[0].weights
    if work.spill:
        assert 2 * work.spill * 255 * np.abs(weights.b.astype(int)).max() < 2**15
    else:
        found = outliers.counts(weights.b)
        assert all(have <= most for have, most in zip(found, work.outliers, strict=True))
