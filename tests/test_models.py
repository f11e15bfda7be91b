"""The reference models: the same everywhere, valid, and all of their layers recovered."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from dccompile import models
from dccompile.frontend.gate import read
from dccompile.frontend.recover import recover

NAMES = [name for name, _ in models.names()]
LAYERS = {"dlrm": 7, "dlrm-mlp": 4}


@pytest.fixture(scope="module", params=NAMES)
def exported(request):
    return request.param, models.export(request.param)


def run(model, feeds):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, feeds)
    return y


def test_every_model_is_valid_and_described(exported):
    name, model = exported
    onnx.checker.check_model(model, full_check=True)
    assert dict(models.names())[name]
    dims = [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input]
    assert set(dims) == {"N"}


def test_the_seed_decides_the_weights(exported):
    name, model = exported
    again, other = models.export(name, 0), models.export(name, 1)
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )
    assert other != model
    feeds = models.sample_inputs(name, 3, seed=5)
    for key, value in models.sample_inputs(name, 3, seed=5).items():
        np.testing.assert_array_equal(value, feeds[key])


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_runtime_runs_every_model(exported, batch):
    name, model = exported
    y = run(model, models.sample_inputs(name, batch))
    assert y.shape == (batch, 1) and y.dtype == np.float32
    assert np.all((y > 0) & (y < 1))


@pytest.mark.parametrize("graph", LAYERS)
def test_int8_stays_near_float(graph):
    feeds = models.sample_inputs(graph, 256, seed=3)
    exact = run(models.export(graph), feeds)
    rough = run(models.export(f"{graph}-int8"), feeds)
    assert exact.std() > 0.05, "the outputs say nothing"
    assert np.abs(rough - exact).mean() < 0.02
    assert np.corrcoef(rough[:, 0], exact[:, 0])[0, 1] > 0.99


def test_every_layer_is_recovered(exported):
    name, model = exported
    graph = name.removesuffix("-int8")
    works = [site.workload for site in recover(read(model).model).gemms.values()]
    assert len(works) == LAYERS[graph]
    assert {w.a for w in works} == ({"u8"} if name.endswith("-int8") else {"f32"})
    if name.endswith("-int8"):
        floats = [w for w in works if w.out == "f32"]
        # the last layer of each MLP
        assert [w.activation for w in floats] == ["relu"] * (graph == "dlrm") + ["sigmoid"]
        assert all(w.bias == "s32" for w in works)


@pytest.mark.parametrize("graph", LAYERS)
def test_checked_in_graph_is_what_torch_exports(graph):
    torch = pytest.importorskip("torch")
    from dccompile.models import dlrm

    stored = onnx.ModelProto.FromString(dlrm.path(graph).read_bytes())
    if stored.producer_version != torch.__version__.split("+")[0]:
        pytest.skip(f"exported by PyTorch {stored.producer_version}")
    assert dlrm.trace(graph) == stored
    assert dlrm.path(graph).stat().st_size < 65536
