"""From a model to a loaded artifact, through the public interface, against ONNX Runtime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import dccompile as dc
from dccompile.machine import TARGETS, missing_features

RUNNABLE = [t for t in TARGETS if not missing_features(TARGETS[t].features)]


def reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = graphs.quantized_mlp((13, 100, 36, 3))
    path = tmp_path_factory.mktemp("quantized") / "m.dcm"
    dc.compile(model, targets=list(TARGETS), shapes={"x": ("1..64", 13)}).save(path)
    return model, path


def test_quantized_mlp_gives_the_same_integers_on_every_isa(quantized: tuple[Any, Path]) -> None:
    model, path = quantized
    rng = np.random.default_rng(5)
    for rows in (1, 3, 10, 64):
        x = rng.normal(size=(rows, 13)).astype(np.float32) * 3
        (expected,) = reference(model, {"x": x})
        for target in RUNNABLE:
            (got,) = dc.load(path, target=target)(x)
            np.testing.assert_array_equal(got, expected, err_msg=f"{target} {rows}")


def test_every_multiplication_is_int8(quantized: tuple[Any, Path]) -> None:
    from dccompile.runtime.artifact import read

    manifest = read(quantized[1]).manifest
    precisions = {n["name"]: n["precision"] for n in manifest["nodes"] if n["op"] == "Gemm"}
    assert set(precisions.values()) == {"int8"}
    for variant in manifest["variants"]:
        isa = TARGETS[variant["target"]].isa
        assert [k["name"].rsplit("_", 1)[1] for k in variant["kernels"]] == [isa] * 3


def test_same_model_same_bytes(quantized: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = quantized
    again = tmp_path / "again.dcm"
    art = dc.compile(model, targets=list(TARGETS), shapes={"x": ("1..64", 13)})
    art.save(again)
    digest = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, again)]
    assert digest[0] == digest[1]


def test_batch_outside_the_range_is_refused(quantized: tuple[Any, Path]) -> None:
    module = dc.load(quantized[1])
    with pytest.raises(dc.InputError, match="64"):
        module(np.zeros((65, 13), np.float32))


@pytest.mark.parametrize("precision", ["keep", "fp16-weights"])
def test_float_mlp(precision: str) -> None:
    model = graphs.mlp((20, 33, 5))
    module = dc.compile(model, targets="host", precision=precision).load()
    tolerance = 1e-5 if precision == "keep" else 2e-3
    for rows in (1, 2, 17, 130):  # N is open: no bound was given
        x = np.random.default_rng(rows).normal(size=(rows, 20)).astype(np.float32)
        np.testing.assert_allclose(module(x)["y"], reference(model, {"x": x})[0], atol=tolerance)


def test_mixed_operators_with_an_open_batch() -> None:
    model = graphs.mixed()
    module = dc.compile(model, targets="host").load(threads=2)
    for rows in (1, 5, 40):
        rng = np.random.default_rng(rows)
        x = rng.normal(size=(rows, 12)).astype(np.float32)
        index = rng.integers(0, 50, (rows, 3))
        got = module(x=x, index=index)
        expected = reference(model, {"x": x, "index": index})
        for name, value in zip(("scores", "rows", "same"), expected, strict=True):
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_an_index_out_of_range_is_an_error() -> None:
    module = dc.compile(graphs.mixed(), targets="host").load()
    x, index = np.zeros((2, 12), np.float32), np.zeros((2, 3), np.int64)
    for bad in (50, -51, 1 << 40):
        index[1, 2] = bad
        with pytest.raises(dc.InputError, match="50"):
            module(x=x, index=index)


def test_nan_propagates_as_in_onnx_runtime() -> None:
    model = graphs.mlp((4, 6, 2))
    module = dc.compile(model, targets="host").load()
    x = np.array([[np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(module(x)["y"], reference(model, {"x": x})[0], atol=1e-6)


def test_problems_are_all_listed() -> None:
    g = graphs.Graph()
    x = g.input("x", [2, 2])
    model = g.model(g.op("Relu", x))
    for i in range(2):
        node = model.graph.node.add(op_type="Frobnicate", name=f"bad{i}", input=["x"])
        node.output.append(f"unused{i}")
    report = dc.check(model)
    assert not report.ok
    text = " ".join(map(str, report.problems))
    assert "bad0" in text and "bad1" in text
    with pytest.raises(dc.Error) as caught:
        dc.compile(model, targets="host")
    assert caught.value.exit_code == 3


def test_a_compiler_out_of_time_or_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.mlp((4, 2))
    with pytest.raises(dc.Error) as caught:
        dc.compile(model, targets="host", timeout=0.05)
    assert caught.value.code == "DC1004"
    monkeypatch.setenv("DCCOMPILE_MEMORY_LIMIT", "400")
    with pytest.raises(dc.Error) as caught:
        dc.compile(model, targets="host")
    assert caught.value.exit_code == 1


def test_wrong_arguments_are_usage_errors() -> None:
    model = graphs.mlp((4, 2))
    for arguments in ({"targets": "sparc"}, {"precision": "int3"}, {"targets": []}):
        with pytest.raises(dc.Error) as caught:
            dc.compile(model, **arguments)
        assert caught.value.exit_code == 2
