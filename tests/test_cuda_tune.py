"""Tuning on a GPU: trials and how they fail, records, the compiler's use of them, replay."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
from gpu_child import Child, layer

from dccompile import lookup, records, registry
from dccompile.cli.main import main
from dccompile.errors import IncompatibleError, UsageError
from dccompile.machine import GPUS, TARGETS
from dccompile.tuning import gpu_engine, maintain, tasks, tune
from dccompile.tuning.gpu_trial import mismatch
from dccompile.tuning.job import Decision
from dccompile.tuning.replay import replay
from dccompile.tuning.tasks import Peaks, Task
from dccompile.workload import Gemm

GPU = GPUS["cuda:sm_90"]
WORK = Gemm(4, 16, 24, "f32", "f32", "f32")
KIND = "emulated-gpu-sm-90"

# A trial as a server's child runs it.
TRIAL = """
import sys, tempfile
from pathlib import Path
from dccompile import registry
from dccompile.machine import GPUS
from dccompile.bench import problems
from dccompile.tuning import server, trial
from dccompile.workload import Gemm
target, status = sys.argv[1:3]
machine, work = GPUS[target], Gemm(4, 16, 24, "f32", "f32", "f32")
choice = registry.select(work, machine)
points = list(choice.kernel.candidates(machine, work))
asked = server.request(choice.kernel, target, work, points[1], points[0], seconds=0.01)
task = trial.Task(choice.kernel, machine, work, problems.make(work))
if status == "wrong":
    problems.Problem.check = lambda *_: "off by one"
found = trial.run(asked, task, Path(tempfile.mkdtemp()))
assert found["status"] == status, found
print(found["reason"])
"""


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulate.toolkit(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def child(toolkit: Any) -> Child:
    return Child(toolkit)


def gemm(work: Gemm = WORK) -> Task:
    choice = registry.select(work, GPU)
    return Task(choice.kernel, GPU, work, {"model": 1}, {"model": 10.0})


def logged(folder: Path, work: Gemm = WORK, cpu: str = KIND) -> records.Record:
    """A record whose second point of the space won."""
    task = gemm(work)
    params = task.space()[1]
    record = tune.record(Decision(task, cpu, params, 1.5, 10.0, 9.0, 11.0, 15.0, 4))
    records.update(folder, GPU.name, task.kernel.name, [record])
    return record


def test_tune_compile_replay(child: Child, tmp_path: Path) -> None:
    """A record is made, is the compiler's exact choice, and still holds."""
    model, logs = layer(tmp_path / "layer.onnx"), tmp_path / "logs"
    common = ("--target", GPU.name)
    budget = ("--budget", "2trials", "--workers", "1", "--log", logs)
    found = child.json("tune", model, *common, *budget)
    (task,) = found["tasks"]
    assert task["cpu"] == KIND and task["target"] == GPU.name and task["tried"] == 2
    assert found["failures"] == {}
    (path,) = (logs / "cuda_sm_90").glob("*.jsonl")
    assert json.loads(path.read_text())["cpu"] == KIND
    assert (logs / "losers" / "cuda_sm_90" / path.name).is_file()
    compiled = ("compile", model, *common, "--tuning", logs, "-o", tmp_path / "m.dcm", "--explain")
    assert " exact " in child.cli(*compiled)[0]
    assert main(["records", "verify", str(logs)]) == 0
    again = child.json("records", "replay", logs, *common, "--duration", "10ms")
    (row,) = again["records"]
    assert row["state"] in ("holds", "level") and row["target"] == GPU.name


@pytest.mark.parametrize(
    ("target", "arch", "status", "fail", "reason"),
    (
        ("cuda:sm_90", 90, "wrong", "", "off by one"),
        ("cuda:sm_90", 90, "error", "cuModuleLoadData:1:209", "does not load"),
        ("cuda:sm_90", 80, "refused", "", "cuda:sm_90 does not run on this GPU, which is sm_80"),
    ),
)
def test_trials(toolkit: Any, target: str, arch: int, status: str, fail: str, reason: str) -> None:
    settings = {"fail": fail} if fail else {}
    out, _ = Child(toolkit, arch).run(TRIAL, target, status, **settings)
    assert reason in out


def test_a_lost_context_costs_its_trial_alone(child: Child) -> None:
    """Also the trial after it is a process of its own; the server never starts the driver."""
    child.run(
        """
from dccompile import registry
from dccompile.machine import GPUS
from dccompile.tuning import server
from dccompile.workload import Gemm
work = Gemm(4, 16, 24, "f32", "f32", "f32")
choice = registry.select(work, GPUS["cuda:sm_90"])
with server.Server() as own:
    for again in range(2):
        both = choice.params, choice.params
        asked = server.request(choice.kernel, "cuda:sm_90", work, *both, seconds=0.01)
        found = own.run(asked)
        assert found["status"] == "crash" and "ILLEGAL_ADDRESS (700)" in found["reason"], found
""",
        fail="cuCtxSynchronize:1:700",
    )


def test_which_gpus_run_a_target() -> None:
    assert mismatch(GPUS["cuda:sm_80"], 86) is None and mismatch(GPU, 90) is None
    assert mismatch(GPUS["cuda:sm_86"], 80) and mismatch(GPUS["cuda:sm_80"], 90)
    assert mismatch(TARGETS["x86-64-v3"], 90)


def test_tasks_of_deployed_shapes() -> None:
    found = tasks.from_shapes("gemm", GPU)
    assert found and all(t.kernel.features[0].startswith("sm_") for t in found)
    peaks = Peaks.measure(GPU)
    assert peaks == Peaks.nominal(GPU) and 5e5 < peaks.int8 < 2e6 and peaks.memory == GPU.bandwidth
    assert all(t.floor_us(peaks) <= t.estimate_us() for t in found)


def test_a_dry_run_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = layer(tmp_path / "layer.onnx")
    options = ["--target", GPU.name, "--dry-run", "--log", str(tmp_path)]
    assert main(["tune", str(model), *options]) == 0
    assert "cuda:sm_90  gemm_f32f32f32_simt 4x16x24 -> f32" in capsys.readouterr().out
    assert main(["tune", "--kernels", "--task", "gemm_u8*mma 64x512x512*", *options]) == 0
    assert "gemm_u8s8s32_mma" in capsys.readouterr().out


def test_what_cannot_measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for machines, workers, wrong in (
        ([GPU, TARGETS["x86-64-v3"]], None, "CPUs and GPUs in one job"),
        ([GPU], "tcp://host:8786", "on this machine alone"),
    ):
        with pytest.raises(UsageError, match=wrong):
            gpu_engine.engine(workers, machines)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(IncompatibleError, match=r"no NVIDIA driver|no GPU is visible|not start"):
        gpu_engine.probe()
    logged(tmp_path)
    options = ["--target", GPU.name]
    assert main(["records", "replay", str(tmp_path), *options]) == 4
    assert main(["tune", "--kernels", "gemm_f32f32*", *options, "--log", str(tmp_path)]) == 4
    assert "error DC40" in capsys.readouterr().err
    older = gpu_engine.Found(KIND, 80)
    monkeypatch.setattr(gpu_engine, "probe", lambda: older)
    with pytest.raises(UsageError, match="does not run on this GPU, which is sm_80"):
        gpu_engine.engine(1, [GPU])


def test_records_of_gpus_are_found_and_left_to_them(tmp_path: Path) -> None:
    record = logged(tmp_path)
    assert records.folder_name(GPU.name) == "cuda_sm_90"
    for target in (*TARGETS, *GPUS):
        assert records.target_name(records.folder_name(target)) == target
    (file,) = maintain.scan(tmp_path)
    assert (file.target, file.problems, file.counts["ok"]) == (GPU.name, [], 1)
    for cpu, own in ((None, "exact"), (KIND, "exact"), ("nvidia-h200", "family")):
        tuning = lookup.Tuning(tmp_path, GPU.name, cpu)
        found = tuning.find(gemm().kernel, WORK, GPU)
        assert found is not None and found.source == own and not tuning.warnings
        assert asdict(found.params) == record.params
    near = lookup.Tuning(tmp_path, GPU.name, None).find(gemm().kernel, replace(WORK, n=20), GPU)
    assert near is not None and near.source == "nearest"
    far = lookup.Tuning(tmp_path, GPU.name, None).find(gemm().kernel, replace(WORK, n=900), GPU)
    assert far is None

    class Here:
        def machines(self) -> dict[str, list[str]]:
            return {"amd-25-17": ["core 0"]}

    (verdict,) = replay(tmp_path, Here())  # type: ignore[arg-type]
    assert verdict.state == "skipped" and f"of GPU {KIND}, measured on amd-25-17" in verdict.reason
