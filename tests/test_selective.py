"""The search for layers to leave in float, with metrics that are functions of their names."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dccompile.errors import Error, ModelError, UsageError
from dccompile.quantization.selective import Chosen, search

FLOAT = 0.8
RANKED = [f"layer{rank}" for rank in range(50)]


class Metric:
    """`cost` of each layer in integers is lost; counts the models and remembers them."""

    def __init__(self, cost: Callable[[str], float]) -> None:
        self.cost = cost
        self.asked: list[frozenset[str]] = []

    def __call__(self, model: Any) -> float:
        self.asked.append(model)
        return FLOAT - sum(self.cost(name) for name in RANKED if name not in model)


def only(*names: str) -> Callable[[str], float]:
    return lambda name: 0.1 * (name in names)


def run(metric: Any, max_drop: float = 0.01, **given: Any) -> tuple[Chosen, list[str]]:
    """A search where a model is the set of its layers in float."""
    lines: list[str] = []
    settings = {"ranked": RANKED, "build": lambda excluded: excluded, "journal": None, "key": "k"}
    settings |= {"float_metric": FLOAT, "log": lines.append, **given}
    return search(evaluate=metric, max_drop=max_drop, **settings), lines


def test_nothing_is_left_in_float_where_the_drop_is_small() -> None:
    metric = Metric(lambda name: 1e-5)
    found, lines = run(metric)
    assert (found.excluded, found.reached, found.evaluations) == ((), True, 1)
    assert found.metric == pytest.approx(FLOAT - 50e-5)
    assert found.drop == pytest.approx(50e-5 / FLOAT)
    assert lines == ["left in float: 0 layers: metric 0.7995, drop 0.063%, holds"]


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 31, 32, 33, 49, 50])
def test_the_shortest_prefix_is_found(needed: int) -> None:
    """Costs fall by rank; with `needed` layers in float what is left is just allowed."""
    costs = {name: 1.0 / (1 + rank) for rank, name in enumerate(RANKED)}
    allowed = sum(costs[name] for name in RANKED[needed:]) / FLOAT + 1e-9
    metric = Metric(costs.__getitem__)
    found, lines = run(metric, allowed)
    assert found.excluded == tuple(RANKED[:needed])
    assert found.reached and found.drop <= allowed
    assert found.evaluations == len(metric.asked) == len(set(metric.asked)) == len(lines)
    assert found.evaluations <= 3 * math.log2(len(RANKED)) + 6


def test_one_bad_layer_is_left_in_float_alone() -> None:
    found, lines = run(Metric(only("layer6")))
    assert (found.excluded, found.metric, found.reached) == (("layer6",), FLOAT, True)
    assert found.evaluations <= 9
    assert lines[-1] == "left in float: 1 layers (layer6): metric 0.8, drop 0.000%, holds"
    assert "left in float: 4 layers (layer0, layer1, layer2 ..)" in "\n".join(lines)


@pytest.mark.parametrize(
    "pair", [("layer2", "layer6"), ("layer0", "layer12"), ("layer4", "layer5")]
)
def test_two_layers_that_matter(pair: tuple[str, str]) -> None:
    found, _ = run(Metric(only(*pair)))
    assert found.excluded == pair and found.reached
    assert found.evaluations <= 3 * math.log2(len(RANKED)) + 6


def test_a_noisy_metric_ends_with_a_set_that_was_measured_to_hold() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        costs = dict(zip(RANKED, np.sort(random.exponential(0.004, 50))[::-1], strict=True))
        metric = Metric(lambda name: costs[name])  # noqa: B023
        noisy = lambda model: metric(model) + random.normal(0, 0.003)  # noqa: B023, E731
        found, lines = run(noisy, 0.05)
        decision = next(d for d in found.decisions if d.excluded == found.excluded)
        assert decision.holds == found.reached
        assert found.reached == (found.drop <= 0.05)
        assert len(lines) <= 3 * math.log2(len(RANKED)) + 6


def test_the_best_is_kept_where_the_drop_cannot_be_reached() -> None:
    def metric(excluded: Collection[str]) -> float:
        return 0.5 + 0.1 * (len(excluded) == 16) - 1e-3 * len(excluded)

    found, _ = run(metric)
    assert not found.reached and found.excluded == tuple(RANKED[:16])
    assert found.drop == pytest.approx((FLOAT - 0.584) / FLOAT)
    assert found.decisions[-1].excluded == tuple(RANKED)


def test_a_better_metric_than_the_float_models_holds_with_no_drop_allowed() -> None:
    assert run(lambda model: FLOAT + 0.01, 0.0)[0].reached
    assert run(lambda model: -0.5, 0.0, float_metric=-0.5)[0].reached
    assert not run(lambda model: -0.6, 0.1, float_metric=-0.5)[0].reached  # 20 % less


def test_no_layers_at_all() -> None:
    found, _ = run(lambda model: 0.1, ranked=[])
    assert (found.excluded, found.reached, found.evaluations) == ((), False, 1)


def fail(model: Any) -> float:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (fail, "raised KeyError: 'labels'"),
        (lambda model: math.nan, "returned nan"),
        (lambda model: math.inf, "returned inf"),
        (lambda model: None, "returned None"),
        (lambda model: "0.5", "returned '0.5'"),
    ],
)
def test_a_metric_that_is_no_number(metric: Any, says: str, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    with pytest.raises(UsageError, match=says) as caught:
        run(metric, journal=journal)
    assert caught.value.code == "DC2043" and caught.value.exit_code == 2
    assert not journal.exists()


def test_errors_with_a_code_pass() -> None:
    def metric(model: Any) -> float:
        raise ModelError("no", "DC3100")

    with pytest.raises(Error) as caught:
        run(metric)
    assert caught.value.code == "DC3100"


@pytest.mark.parametrize("value", [0.0, math.nan, None])
def test_a_float_metric_without_relative_drop(value: Any) -> None:
    with pytest.raises(UsageError, match="not defined") as caught:
        run(Metric(only()), float_metric=value)
    assert caught.value.code == "DC2047"


# ---- journal ----
def test_a_second_search_evaluates_nothing(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    first, _ = run(Metric(only("layer6")), journal=journal)
    metric = Metric(only("layer6"))
    second, lines = run(metric, journal=journal)
    assert metric.asked == [] and second.evaluations == 0
    assert (second.excluded, second.metric) == (first.excluded, first.metric)
    assert second.decisions == first.decisions
    assert all(line.endswith(", from the journal") for line in lines)


def test_lines_of_another_search_or_torn_ones_are_not_used(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    first, _ = run(Metric(only("layer6")), journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == first.evaluations
    strange = [b"[1]\n", b"nonsense\n", b'{"key":"k","excluded":[],"metric":NaN}\n', b"[" * 5000]
    journal.write_bytes(b"".join([*lines[:3], *strange, b"\n", lines[3][:-20]]))
    metric = Metric(only("layer6"))
    second, _ = run(metric, journal=journal)
    assert second.evaluations == first.evaluations - 3
    assert second.excluded == first.excluded
    readable = 0
    for line in journal.read_bytes().split(b"\n"):
        try:
            readable += isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            continue
    assert readable == first.evaluations + 1  # the torn line was ended, that with NaN is a dict
    other, _ = run(Metric(only("layer6")), journal=journal, key="other")
    assert other.evaluations == first.evaluations


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_selective import Metric, only, run
metric = Metric(only("layer2", "layer6"))
def evaluate(model):
    if len(metric.asked) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return metric(model)
run(evaluate, journal=Path({journal!r}))
"""


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    whole = Metric(only("layer2", "layer6"))
    wanted, _ = run(whole)
    journal = tmp_path / "j"
    script = KILLED.format(tests=os.path.dirname(__file__), journal=str(journal))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    metric = Metric(only("layer2", "layer6"))
    found, _ = run(metric, journal=journal)
    assert found.excluded == wanted.excluded
    assert metric.asked == whole.asked[5:]


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "j"):
        with pytest.raises(UsageError) as caught:
            run(Metric(only()), journal=path)
        assert caught.value.code == "DC2048"
