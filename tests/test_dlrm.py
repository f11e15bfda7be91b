"""The recommendation model end to end, and what storing its tables smaller costs."""

from __future__ import annotations

import numpy as np
import pytest
from dccompile.models import clicks
from recovery import session

import dccompile as dc
from dccompile import models
from dccompile.runtime import artifact

SAMPLES = 40_000
AUC_LOSS = {"int8": 0.0005, "int4": 0.002}


@pytest.fixture(scope="module")
def small():
    model = models.export("dlrm-small-int8")
    return model, dc.compile(
        model, targets="host", embedding="int8", shapes=models.shapes("dlrm-small-int8")
    )


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_one_artifact_for_every_batch(small, batch):
    model, compiled = small
    feeds = models.sample_inputs("dlrm-small-int8", batch, seed=4)
    got = compiled.load(threads=2)(feeds)[0]
    want = session(model).run(None, feeds)[0]
    assert got.shape == want.shape == (batch, 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=0.06)  # steps of int8 rows and layers
    assert np.abs(got - want).mean() < 0.01


def test_nothing_but_kernels_is_left(small):
    manifest = small[1].manifest
    (variant,) = manifest["variants"]
    kernels = {k["symbol"] for k in variant["kernels"]}
    left = [step for step in variant["steps"] if step not in kernels]
    assert {name.split("_")[0] for name in kernels} == {"gemm", "embedding", "interaction"}
    assert all("quantize" in step for step in left), left
    precisions = {n["precision"] for n in manifest["nodes"] if n["op"] == "Gather"}
    assert precisions <= {"int8-rows", "float32", "folded"} and "int8-rows" in precisions
    assert manifest["symbols"] == [{"name": "N", "min": 1, "max": 256}]


def test_batches_beyond_the_range_are_refused(small):
    with pytest.raises(dc.InputError, match="256"):
        small[1].load(threads=1)(models.sample_inputs("dlrm-small-int8", 257))


def test_bad_index_is_named(small):
    feeds = models.sample_inputs("dlrm-small-int8", 4)
    feeds["sparse"][2, 11, 7] = 1000
    place = r"'tables.11' of 1000 rows: index 1000 at \[2, 11, 7\]"
    with pytest.raises(dc.InputError, match=place):
        small[1].load(threads=1)(feeds)


@pytest.fixture(scope="module")
def measured():
    """AUC and normalized entropy of the trained model: ONNX Runtime's float, then ours."""
    feeds, truth = clicks.samples(SAMPLES, seed=9)
    model = models.export("dlrm-clicks")
    scores = {"float": session(model).run(None, feeds)[0]}
    for embedding in ("keep", *AUC_LOSS):
        shapes = models.shapes("dlrm-clicks", f"1..{SAMPLES}")
        compiled = dc.compile(model, targets="host", embedding=embedding, shapes=shapes)
        scores[embedding] = compiled.load(threads=2)(feeds)[0]
    return {
        name: (clicks.auc(truth, y[:, 0]), clicks.normalized_entropy(truth, y[:, 0]))
        for name, y in scores.items()
    }


def test_the_trained_model_ranks_clicks(measured):
    area, entropy = measured["float"]
    assert 0.75 < area < 0.85 and entropy < 0.9
    np.testing.assert_allclose(measured["keep"], measured["float"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("embedding", AUC_LOSS)
def test_smaller_rows_cost_little(measured, embedding, record_property):
    area, entropy = (a - b for a, b in zip(measured[embedding], measured["float"], strict=True))
    record_property("auc_change", area)
    record_property("normalized_entropy_change", entropy)
    print(f"{embedding}: AUC {area:+.6f}, normalized entropy {entropy:+.6f}")
    assert -area < AUC_LOSS[embedding]
    assert entropy < 10 * AUC_LOSS[embedding]
    assert measured[embedding] != measured["keep"], "the rows were stored as they are"


def test_area_and_entropy():
    truth = np.array([0, 0, 1, 1, 0], np.float32)
    assert clicks.auc(truth, np.array([0.1, 0.2, 0.8, 0.9, 0.3])) == 1
    assert clicks.auc(truth, np.array([0.5, 0.5, 0.5, 0.5, 0.5])) == 0.5
    assert clicks.auc(truth, np.array([0.1, 0.8, 0.8, 0.9, 0.3])) == pytest.approx(5.5 / 6)
    assert clicks.normalized_entropy(truth, np.full(5, 0.4)) == pytest.approx(1)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_table_files_are_named(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(models, "LARGE", 1)
    path, data = models.save("dlrm-clicks", tmp_path / "m.onnx")
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-5])
    with pytest.raises(dc.ModelError, match=r"'tables\.\d'.*m\.onnx\.data") as error:
        dc.compile(path, targets="host")
    assert len(error.value.problems) == (8 if damage == "missing" else 1)


def test_command_line(tmp_path, capsys):
    from dccompile.cli.main import main

    path = tmp_path / "clicks.dcm"
    given = ["dlrm-clicks-int8", "--embedding", "int4", "-q", "-o", str(path)]
    assert main(["compile", *given, "--target", "host", "--target", "x86-64-v3"]) == 0
    assert main(["inspect", str(path), "--json"]) == 0
    shown = capsys.readouterr().out
    assert '"int4-rows"' in shown and '"relative_error"' in shown
    with artifact.read(path) as file:
        tables = file.manifest["tables"]
        assert file.manifest["symbols"] == [{"name": "N", "min": 1, "max": 256}]
    assert [t["name"] for t in tables] == [f"tables.{t}" for t in range(8)]
    assert all(0.01 < t["relative_error"] < 0.15 and t["bytes"] == 500 * 12 for t in tables)
    feeds, _ = clicks.samples(64, seed=5)
    best, least = (dc.load(path, target=target)(feeds)[0] for target in (None, "x86-64-v3"))
    np.testing.assert_allclose(best, least, rtol=0, atol=0.01)
