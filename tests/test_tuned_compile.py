"""Compiling with tuning logs: which parameters kernels get, what is told, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

import dccompile as dc
from dccompile import fingerprint, lookup, records, registry
from dccompile.cli.main import main
from dccompile.machine import TARGETS, cpu_type
from dccompile.runtime.artifact import read
from dccompile.workload import from_json

SHAPES = {"x": (10, 13)}
TARGET = "x86-64-v3"
COMPILE = {"targets": [TARGET], "shapes": SHAPES}


def kernels(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["variants"][0]["kernels"])


def record(said: dict[str, Any], cpu: str = "intel-6-143") -> records.Record:
    """A record for a kernel of a manifest, of parameters that are not the default."""
    kernel = next(k for k in registry.kernels() if k.name == said["name"])
    work = from_json(said["workload"]).representative()
    shape, form = records.split(work)
    params = {**said["params"], "mr": 1 if said["params"]["mr"] > 1 else 2}
    version = fingerprint.schedule(kernel)
    times = (41.7, 41.2, 42.9, 44.0, 1.056)
    about = (1, 16, cpu, "0.27.0.post1", version, "2026-11-23")
    return records.Record(kernel.name, TARGET, shape, form, params, *times, *about)


@pytest.fixture(scope="module")
def model() -> Any:
    return graphs.quantized_mlp((13, 100, 36, 3))


@pytest.fixture(scope="module")
def plain(model: Any) -> dict[str, Any]:
    return dc.compile(model, **COMPILE, tuning="none").manifest


@pytest.fixture(scope="module")
def logs(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs in which the last kernel has no record: none is of its form."""
    folder = tmp_path_factory.mktemp("logs") / "mine"
    first, second, _ = map(record, kernels(plain))
    records.update(folder, TARGET, first.kernel, [first, second])
    return folder


def test_records_decide_and_the_default_stands_elsewhere(
    model: Any, plain: dict[str, Any], logs: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("tuned.dcm", "again.dcm")]
    for path in paths:
        dc.compile(model, **COMPILE, tuning=logs).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    manifest = read(paths[0]).manifest
    before, after = kernels(plain), kernels(manifest)
    assert [k["source"] for k in before] == ["default"] * 3
    assert [k["source"] for k in after] == ["exact", "exact", "default"]
    assert [a["params"] == b["params"] for a, b in zip(after, before, strict=True)] == [
        False,
        False,
        True,
    ]
    found = record(before[0])
    assert (after[0]["record"], after[0]["gain"]) == (found.id, 1.056)
    assert after[0]["params"] == found.params
    assert "2026-11-23" in after[0]["why"]
    assert "record" not in after[2] and "no tuning record" in after[2]["why"]
    assert manifest["tuning"] == {"logs": "mine", "warnings": []}
    assert str(logs.parent) not in json.dumps(manifest)


@pytest.mark.avx2
def test_tuned_kernels_compute_the_same(model: Any, logs: Path) -> None:
    x = np.random.default_rng(3).normal(size=(10, 13)).astype(np.float32) * 3
    tuned, default = (
        dc.compile(model, **COMPILE, tuning=t).load().run(None, {"x": x}) for t in (logs, "none")
    )
    np.testing.assert_array_equal(tuned[0], default[0])


def test_require_tuned_lists_every_kernel_without_a_record(
    model: Any, plain: dict[str, Any], logs: Path, tmp_path: Path
) -> None:
    last = from_json(kernels(plain)[2]["workload"])
    for verb in (dc.compile, dc.check):
        with pytest.raises(dc.TuningError, match="1 kernel has no tuning record") as error:
            verb(model, **COMPILE, tuning=logs, require_tuned=True)
        text = str(error.value)
        assert last.describe() in text and f"dccompile tune MODEL --target {TARGET}" in text
        assert error.value.code == "DC7020"
    with pytest.raises(dc.TuningError, match="3 kernels have no tuning record"):
        dc.check(model, **COMPILE, tuning=tmp_path, require_tuned=True)
    records.update(tmp_path, TARGET, kernels(plain)[2]["name"], map(record, kernels(plain)))
    assert dc.check(model, **COMPILE, tuning=tmp_path, require_tuned=True).ok


def test_the_packaged_logs_are_the_default(
    model: Any, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "packaged", lambda: logs)
    report = dc.check(model, **COMPILE)
    assert [k["source"] for k in report.variants[0]["kernels"]] == ["exact", "exact", "default"]


def test_stale_and_broken_logs_are_warnings(
    model: Any, plain: dict[str, Any], tmp_path: Path
) -> None:
    first, second, third = map(record, kernels(plain))
    stale = replace(first, schedule="0" * 8)
    illegal = replace(second, params={**second.params, "mr": 1000})
    records.update(tmp_path, TARGET, first.kernel, [stale, illegal, third])
    path = tmp_path / TARGET / f"{first.kernel}.jsonl"
    path.write_text(path.read_text() + '{"cpu":"amd')
    report = dc.check(model, **COMPILE, tuning=tmp_path)
    assert [k["source"] for k in report.variants[0]["kernels"]] == ["default", "default", "exact"]
    assert len(report.warnings) == 3
    for word in ("1 of 3 records", "line 4 is no record", "mr=1000"):
        assert any(word in line for line in report.warnings)
    assert all(f"{TARGET}/{first.kernel}.jsonl" in line for line in report.warnings)


def test_records_of_other_cpus_are_the_last_resort_of_host_alone(
    model: Any, tmp_path: Path
) -> None:
    def checked(target: str) -> list[dict[str, Any]]:
        report = dc.check(model, targets=target, shapes=SHAPES, tuning=tmp_path)
        return list(report.variants[0]["kernels"])

    name = dc.check(model, shapes=SHAPES, tuning="none").variants[0]["target"]
    for said in checked("host"):
        records.update(tmp_path, name, said["name"], [replace(record(said), target=name)])
    assert [k["source"] for k in checked("host")] == ["family"] * 3
    assert [k["source"] for k in checked(name)] == ["exact"] * 3
    own = [replace(record(k, cpu_type()), gain=1.2) for k in checked("host")]
    for one in own:
        records.update(tmp_path, name, one.kernel, [one])
    assert [k["source"] for k in checked("host")] == ["exact"] * 3
    assert {k["gain"] for k in checked("host")} == {1.2}
    assert set(TARGETS) > {name}


def test_the_command_line_tells(
    model: Any,
    plain: dict[str, Any],
    logs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnx

    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    about = [str(path), "--target", TARGET, "--shape", "x:10x13"]
    made = ["compile", *about, "-o", str(tmp_path / "m.dcm")]

    assert main([*made, "--tuning", str(logs), "--explain"]) == 0
    out = capsys.readouterr().out
    assert "(2 tuned, 1 default)" in out
    for word in ("exact", "default", record(kernels(plain)[0]).id, "1.06x the default's speed"):
        assert word in out

    assert main([*made, "--tuning", str(logs), "--require-tuned"]) == 7
    assert "error DC7020: 'm' for x86-64-v3: 1 kernel has no" in capsys.readouterr().err
    assert main([*made, "--tuning", str(tmp_path / "absent")]) == 2
    assert "error DC2030" in capsys.readouterr().err

    name = kernels(plain)[0]["name"]
    (tmp_path / "torn" / TARGET).mkdir(parents=True)
    (tmp_path / "torn" / TARGET / f"{name}.jsonl").write_text('{"cpu"')
    assert main(["check", *about, "-q", "--tuning", str(tmp_path / "torn"), "--json"]) == 0
    streams = capsys.readouterr()
    assert streams.err.startswith(f"warning: tuning log {TARGET}/{name}.jsonl: line 1 is no record")
    assert len(json.loads(streams.out)["warnings"]) == 1
