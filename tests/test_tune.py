"""Tuning jobs: what is chosen, kills and resumes, the proof in whole models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

import dccompile as dc
from dccompile import records, registry
from dccompile.cli.main import main
from dccompile.console import Progress
from dccompile.errors import TuningError, UsageError
from dccompile.machine import host
from dccompile.tuning import job, race, tune, whole
from dccompile.tuning.job import Job
from dccompile.tuning.journal import Journal
from dccompile.tuning.tasks import Task
from dccompile.workload import Gemm

WORK = Gemm(64, 256, 64, "u8", "s8", "u8")
CPU = "test-1-1"


def task(work: Gemm = WORK) -> Task:
    choice = registry.select(work, host())
    return Task(choice.kernel, host(), work, {"model": 1}, {"model": 10.0})


class Fake:
    """An engine whose trials end at once, with the gains over the default of a function."""

    def __init__(self, gain: Callable[[Any], float | str], spread: float = 0.001) -> None:
        self.gain, self.spread, self.seen = gain, spread, []  # type: ignore[var-annotated]

    def machines(self) -> dict[str, list[str]]:
        return {CPU: ["here"]}

    def slots(self, cpu: str) -> int:
        return 2

    def submit(self, request: dict[str, Any], cpu: str) -> Future[dict[str, Any]]:
        self.seen.append(request)
        future: Future[dict[str, Any]] = Future()
        future.set_result({"cpu": cpu, "worker": "here", "seconds": 0.1, **self._result(request)})
        return future

    def _result(self, request: dict[str, Any]) -> dict[str, Any]:
        mine, other = self.gain(request["params"]), self.gain(request["against"])
        if isinstance(mine, str):
            return {"status": mine, "reason": "as told"}
        assert not isinstance(other, str)
        ratio = mine / other
        us = 100 / mine
        return {
            "status": "ok",
            "reason": "",
            "us": us,
            "p20": us * 0.99,
            "p80": us * 1.01,
            "against_us": 100 / other,
            "ratio": ratio,
            "low": ratio - self.spread,
            "high": ratio + self.spread,
            "rounds": 11,
        }


def run(folder: Path, engine: Any, **options: Any) -> tuple[Job, list[job.Decision]]:
    given: dict[str, Any] = {"seconds": None, "trials": None, "seed": 0, **options}
    running = Job(
        [task()],
        engine,
        Journal(folder),
        None,
        hints=lambda _: [],
        progress=Progress(quiet=True),
        **given,
    )
    return running, running.run()


def default() -> dict[str, Any]:
    return asdict(task().default())


def other() -> dict[str, Any]:
    return next(asdict(p) for p in task().space() if asdict(p) != default())


def test_the_fastest_wins_and_the_default_competes(tmp_path: Path) -> None:
    best = other()
    engine = Fake(lambda p: 1.5 if p == best else 1.0 if p == default() else 0.7)
    running, (found,) = run(tmp_path, engine)
    assert asdict(found.params) == best and found.gain == pytest.approx(1.5) and found.changed
    assert found.default_us == pytest.approx(100) and found.us == pytest.approx(66.7, rel=1e-2)
    assert found.tried == min(len(task().space()), 32) and running.trials == found.tried + 1
    first, last = engine.seen[0], engine.seen[-1]
    assert first["params"] == first["against"] == default()
    assert last["params"] == best and last["against"] == default()
    assert last["seconds"] > first["seconds"]


def test_nothing_better_beyond_the_noise_leaves_the_default(tmp_path: Path) -> None:
    _, (found,) = run(tmp_path, Fake(lambda p: 1.0 if p == default() else 1.03, spread=0.05))
    assert not found.changed and found.gain == 1.0


@pytest.mark.parametrize("status", ["wrong", "crash", "timeout", "error"])
def test_what_fails_is_recorded_and_never_chosen(tmp_path: Path, status: str) -> None:
    bad = other()
    running, (found,) = run(tmp_path, Fake(lambda p: status if p == bad else 1.0))
    assert not found.changed and running.failures == {status: 1}
    entries = Journal(tmp_path).read(host().name, task().kernel.name)
    assert [e["params"] for e in entries if e["status"] == status] == [bad]
    assert next(e for e in entries if e["status"] == status)["reason"] == "as told"


def test_a_default_that_fails_is_reported(tmp_path: Path) -> None:
    running, found = run(tmp_path, Fake(lambda p: "wrong"))
    assert found == [] and running.subjects[0].failed == "wrong, as told"


def test_a_budget_of_trials_is_kept(tmp_path: Path) -> None:
    best = asdict(task().space()[1])
    running, (found,) = run(tmp_path, Fake(lambda p: 1.2 if p == best else 1.0), trials=5)
    assert running.trials in (5, 6) and found.tried == 5  # and the final of the best
    running, found_ = run(tmp_path / "1", Fake(lambda p: 1.0), trials=1)
    assert found_ == [] and running.subjects[0].skipped


def test_a_later_job_tries_nothing_again(tmp_path: Path) -> None:
    best = asdict(task().space()[1])
    gain = lambda p: 1.4 if p == best else 1.0  # noqa: E731
    first = Fake(gain)
    run(tmp_path, first, trials=7)
    second = Fake(gain)
    _, (found,) = run(tmp_path, second)
    tried = Counter(json.dumps(r["params"]) for r in first.seen + second.seen if not _final(r))
    assert set(tried.values()) == {1} and len(tried) == min(len(task().space()), 32)
    assert asdict(found.params) == best and found.tried == len(tried)


def _final(request: dict[str, Any]) -> bool:
    return bool(request["seconds"] == job.FINAL_S)


def test_another_schedule_is_another_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, Fake(lambda p: 1.0))
    monkeypatch.setattr(job.fingerprint, "schedule", lambda kernel: "12345678")
    again = Fake(lambda p: 1.0)
    run(tmp_path, again)
    assert len(again.seen) == min(len(task().space()), 32)


def test_the_same_seed_asks_in_the_same_order(tmp_path: Path) -> None:
    asked = []
    for name in ("a", "b"):
        engine = Fake(lambda p: 1.0 + 0.1 * (p == other()))
        _, (found,) = run(tmp_path / name, engine, seed=1)
        asked.append([r["params"] for r in engine.seen])
        assert asdict(found.params) == other()
    assert asked[0] == asked[1]


def test_a_refused_trial_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="worker here: as told") as caught:
        run(tmp_path, Fake(lambda p: "refused"))
    assert caught.value.code == "DC7032"


# ---- whole models ----


def record(kernel: str, us: float) -> records.Record:
    decision = job.Decision(task(), CPU, task().space()[1], 1.2, us, us, us, 100.0, 5)
    return replace(tune.record(decision), kernel=kernel)


class Model:
    """A model that is faster with some winners and slower with others."""

    def __init__(self, harm: set[str]) -> None:
        self.harm, self.asked = harm, []  # type: ignore[var-annotated]

    def compare(self, winners: list[records.Record]) -> whole.Comparison:
        names = {r.kernel for r in winners}
        self.asked.append(names)
        ratio = 0.9 if names & self.harm else 1.1
        return whole.Comparison(ratio, ratio - 0.01, ratio + 0.01, 1.1, 1.0)


def settle(harm: set[str], monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], bool, list[Any]]:
    model: Any = Model(harm)
    winners = [(record("a", 50.0), 1), (record("b", 99.0), 1), (record("c", 80.0), 1)]
    kept, proof = whole.settle(model, winners)
    return {r.kernel for r in kept}, proof is not None, model.asked


def test_winners_stay_where_the_model_gets_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle(set(), monkeypatch) == ({"a", "b", "c"}, True, [{"a", "b", "c"}])


def test_half_of_the_winners_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, proven, asked = settle({"b"}, monkeypatch)
    assert kept == {"a", "c"} and proven and asked[-1] == {"a", "c"}


def test_no_winner_stays_that_slows_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, proven, asked = settle({"a"}, monkeypatch)
    assert kept == set() and not proven and len(asked) == 3


def test_a_loser_in_the_model_is_logged_as_default() -> None:
    decision = job.Decision(task(), CPU, task().space()[1], 1.2, 50.0, 49.0, 51.0, 60.0, 5)
    kept, dropped = tune.record(decision), tune.record(decision, keep=False)
    assert kept.params != default() and kept.gain == 1.2 and kept.us == 50.0
    assert dropped.params == default() and dropped.gain == 1.0 and dropped.us == 60.0


def test_bounds_of_a_median() -> None:
    low, high = race.bounds(np.arange(101.0))
    assert 38 <= low < 50 < high <= 62
    assert race.bounds(np.array([1.0, 2.0, 3.0])) == (1.0, 3.0)


# ---- the command ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "mlp.onnx"
    graph = graphs.quantized_mlp((48, 32))
    path.write_bytes(graph.SerializeToString())
    return path


def command(model: Path, log: Path, *more: str) -> list[str]:
    fixed = ["tune", str(model), "--log", str(log), "--workers", "1", "--shape", "x:16x48"]
    return [sys.executable, "-m", "dccompile", *fixed, *more]


def lines(log: Path) -> list[dict[str, Any]]:
    """Whole lines of all journals."""
    found = []
    for path in log.glob("losers/*/*.jsonl"):
        text = path.read_text()
        found += [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
    return found


def begin(model: Path, log: Path, trials: int) -> subprocess.Popen[str]:
    """A job that has done some trials."""
    child = subprocess.Popen(
        command(model, log), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while len(lines(log)) < trials:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return child


def test_a_killed_job_goes_on(model: Path, tmp_path: Path) -> None:
    child = begin(model, tmp_path, 4)
    child.kill()
    child.communicate()
    before = lines(tmp_path)
    done = subprocess.run(command(model, tmp_path, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = lines(tmp_path)
    assert after[: len(before)] == before or Counter(map(str, before)) <= Counter(map(str, after))
    tried = Counter((e["key"], json.dumps(e["params"])) for e in after if not e.get("final"))
    assert set(tried.values()) == {1}
    report = json.loads(done.stdout)
    assert report["schema"] == "dccompile.tune/1" and report["failed"] == {}
    assert sum(t["tried"] for t in report["tasks"]) == len(tried)
    assert report["trials"] <= len(after) - len(before)
    _used(model, tmp_path, len(report["tasks"]))


def _used(model: Path, log: Path, count: int) -> None:
    """The logs of a job are what `compile` goes by."""
    shapes = {"x": (16, 48)}
    made = dc.compile(model, targets=["host"], shapes=shapes, tuning=log, require_tuned=True)
    kernels = made.manifest["variants"][0]["kernels"]
    assert {k["source"] for k in kernels} == {"exact"} and len(kernels) == count


def test_ctrl_c_finishes_the_trial_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    child = begin(model, tmp_path, 2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 7
    assert "error DC7001: tune: stopped after" in err
    assert f"resume: dccompile tune {model} --log {tmp_path}" in err
    assert all(e["status"] == "ok" for e in lines(tmp_path))


def test_two_jobs_on_one_log(model: Path, tmp_path: Path) -> None:
    jobs = [begin(model, tmp_path, 0) for _ in range(2)]
    for child in jobs:
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
    for path in tmp_path.glob("*/*.jsonl"):
        if path.parts[-2] != "losers":
            log = records.Log.read(path, path.stem, path.parts[-2])
            assert log.records and not log.broken
    assert main(["records", "verify", str(tmp_path)]) == 0


def test_dry_run_lists_tasks(model: Path, tmp_path: Path, capsys: Any) -> None:
    code = main([*command(model, tmp_path)[3:], "--dry-run"])
    text = capsys.readouterr().out
    assert code == 0 and "gemm_u8s8s32" in text and "1 tasks, about" in text
    assert not list(tmp_path.glob("*/*.jsonl"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "soon"], "--budget 'soon': neither a time nor a number of trials"),
        (["--workers", "many"], "--workers 'many': neither a number of processes nor"),
        (["--task", "no_such_*"], "no task matches --task 'no_such_*'"),
    ],
)
def test_wrong_options(
    model: Path, tmp_path: Path, capsys: Any, options: list[str], says: str
) -> None:
    assert main([*command(model, tmp_path)[3:], *options]) == 2
    assert says in capsys.readouterr().err


def test_no_model(capsys: Any) -> None:
    with pytest.raises(UsageError, match="no model"):
        dc.tune()


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main([*command(model, file / "logs")[3:]]) == 7
    err = capsys.readouterr().err
    assert "error DC701" in err and "--log" in err and os.fspath(file) in err


def test_a_search_begins_with_steps_from_the_default() -> None:
    found = tune.steps(task())
    assert 0 < len(found) <= 10 and len(set(found)) == len(found)
    for params in found:
        assert (
            sum(a != b for a, b in zip(default().values(), asdict(params).values(), strict=True))
            == 1
        )
