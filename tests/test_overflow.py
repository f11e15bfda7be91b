"""Periods of 16-bit sums by calibration: how they are found, carried by a model and used."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recovery import NUMPY, S8, U8, Maker, only

from dccompile import outliers
from dccompile.compiler import compile
from dccompile.errors import InputError, ModelError, UsageError
from dccompile.frontend import accumulation
from dccompile.frontend.accumulation import KEY
from dccompile.frontend.gate import read
from dccompile.frontend.recover import recover
from dccompile.quantization.overflow import PERIODS, spill_period

K, N = 70, 24


def _codes(reach, k=K, n=N, seed=0):
    return np.random.default_rng(seed).integers(-reach, reach + 1, (k, n)).astype(np.int8)


def _activations(high=255, rows=40, k=K, seed=1):
    return np.random.default_rng(seed).integers(0, high + 1, (rows, k)).astype(np.uint8)


def _sums(b, a, period):
    """Every 16-bit sum of rows of A, the slow way: (rows, windows, halves, columns)."""
    k = len(b)
    order = list(range(k // 4 * 4)) + ([-1] * (4 - k % 4) + list(range(k // 4 * 4, k))) * (
        k % 4 > 0
    )
    order += [-1] * (-len(order) % (4 * period))
    wide = np.vstack([b, np.zeros_like(b[:1])]).astype(np.int64)[order]
    rows = np.hstack([a, np.zeros_like(a[:, :1])]).astype(np.int64)[:, order]
    products = rows[:, :, None] * wide[None]
    return products.reshape(len(a), -1, period, 2, 2, b.shape[1]).sum(axis=(2, 4))


# ---- periods ----
@pytest.mark.parametrize("reach", (1, 6, 30, 127))
@pytest.mark.parametrize("k", (70, 64, 97))
def test_the_largest_sum_is_that_of_the_period(reach, k):
    b, a = _codes(reach, k), _activations(200, k=k)
    found = spill_period(b, [a[:25], a[25:]])
    largest = {p: np.abs(_sums(b, a, p)).max() for p in PERIODS}
    fits = [p for p in PERIODS if max(largest[p], largest[1]) * 1.5 <= 32767]
    assert found.period == (fits[0] if fits else 0)
    assert found.largest == largest[found.period or 1]


def test_a_margin_shortens_the_period():
    b, a = _codes(25), _activations(150)
    periods = [spill_period(b, [a], margin).period for margin in (1.0, 2.0, 4.0, 50.0)]
    assert periods == sorted(periods, reverse=True) and periods[0] > periods[-1] == 0


def test_the_probability_grows_with_the_activations():
    b = _codes(30)
    few, many = (spill_period(b, [_activations(high)], 1.0) for high in (60, 200))
    assert 0 <= few.probability <= many.probability <= 1
    assert spill_period(_codes(127), [_activations()], 1.0).probability > few.probability
    still = spill_period(b, [np.zeros((3, K), np.uint8)])
    assert (still.period, still.largest, still.probability) == (PERIODS[0], 0, 0.0)


def test_samples_of_another_kind_are_errors():
    b = _codes(10)
    for wrong in (np.zeros((2, K + 1), np.uint8), np.zeros((2, K), np.int8), np.zeros(K, np.uint8)):
        with pytest.raises(InputError, match="sample 1") as error:
            spill_period(b, [_activations(), wrong])
        assert error.value.code == "DC2138"
    for none in ([], [np.zeros((0, K), np.uint8)]):
        with pytest.raises(InputError, match="no samples") as error:
            spill_period(b, none)
        assert error.value.code == "DC2139"


# ---- in a model ----
def _model(dtype=U8, facts=None, rows=16):
    """x u8 -> dequantize, MatMul with s8 weights, quantize; the weights, their name, the model."""
    make = Maker()
    x = make.input(rows, K, dtype=dtype)
    b = _codes(20)
    codes = make.const(b)
    weights = make.op(
        "DequantizeLinear", codes, make.const(np.float32(0.01)), make.const(np.int8(0))
    )
    a = make.dequant(x, 0.02, 3, NUMPY[dtype])
    y = make.quant(make.op("MatMul", a, weights), 0.5, 100, U8)
    model = make.model(y)
    if facts is not None:
        entry = model.metadata_props.add()
        entry.key, entry.value = KEY, facts if isinstance(facts, str) else json.dumps(facts)
    return b, codes, model


def _workload(model, calibrated=True):
    graph = read(model.SerializeToString())
    facts = accumulation.read_facts(graph.model) if calibrated else None
    return only(recover(graph.model, graph.constants, facts=facts))


def test_facts_reach_the_workload_where_asked_for():
    b, name, _ = _model()
    found = spill_period(b, [_activations(90)])
    assert found.period > 1
    facts = {name: found.to_json()}
    _, _, model = _model(facts=facts)
    assert _workload(model).spill == found.period
    assert _workload(model, calibrated=False).spill == 0
    node = next(n.name for n in model.graph.node if n.op_type == "MatMul")
    _, _, by_node = _model(facts={node: found.to_json()})
    assert _workload(by_node).spill == found.period


def test_facts_of_other_weights_or_activations_are_not_used():
    b, name, _ = _model()
    facts = spill_period(b, [_activations(90)]).to_json()
    for other, dtype in (({**facts, "weights": 1}, U8), ({**facts, "period": 0}, U8), (facts, S8)):
        _, _, model = _model(dtype, {name: other})
        assert _workload(model).spill == 0
    _, _, model = _model(facts={"another": facts})
    assert _workload(model).spill == 0


@pytest.mark.parametrize(
    "text", ("{", "[]", '{"w": 3}', '{"w": {"period": -1, "weights": 0}}', '{"w": {"period": 2}}')
)
def test_misspelled_facts_are_errors(text):
    _, _, model = _model(facts=text)
    with pytest.raises(ModelError, match="quantize the model again") as error:
        _workload(model)
    assert error.value.code == "DC3209"
    assert _workload(model, calibrated=False).spill == 0


def test_a_model_without_facts_cannot_be_calibrated():
    _, _, model = _model()
    with pytest.raises(ModelError, match="no metadata") as error:
        compile(model, targets="x86-64-v3", accumulation="calibrated")
    assert error.value.code == "DC3208"
    with pytest.raises(UsageError, match="exact, calibrated"):
        compile(model, accumulation="fast")


@pytest.mark.avx2
def test_compiled_models_are_exact_and_say_how():
    """Exact sums by default, those of calibration where asked for: equal on what it has seen."""
    b, name, _ = _model()
    _, _, model = _model(facts={name: spill_period(b, [_activations(90)]).to_json()})
    feed = {"x": _activations(90, 16)}
    results, whys = [], []
    for how in ("exact", "calibrated"):
        made = compile(model, targets="x86-64-v3", accumulation=how)
        (kernel,) = made.manifest["variants"][0]["kernels"]
        assert kernel["name"] == "gemm_u8s8s32split_avx2"
        whys.append(kernel["why"])
        results.append(made.load()(**feed))
    assert "exact" in whys[0] and "not for any input" in whys[1]
    for exact, calibrated in zip(results[0].values(), results[1].values(), strict=True):
        np.testing.assert_array_equal(exact, calibrated)


def test_outliers_of_a_layer_are_counted():
    _, _, model = _model()
    work = _workload(model, calibrated=False)
    assert work.outliers == outliers.counts(_codes(20))
    floats = Maker()
    floats.op("MatMul", floats.input(3, K), floats.const(np.ones((K, N), np.float32)))
    assert only(recover(floats.model("v0_0"))).outliers == ()
