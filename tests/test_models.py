"""The recommendation models: the same everywhere, valid, and all of their layers recovered."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from dccompile import models
from dccompile.frontend.gate import read
from dccompile.frontend.recover import recover

NAMES = [
    name
    for name, _ in models.names()
    if name.startswith("dlrm") and models.size(name) < models.LARGE
]
LAYERS = {"dlrm-small": 7, "dlrm-clicks": 5, "dlrm-mlp": 4}
TRAINED = "dlrm-clicks"


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
    assert (other == model) is name.startswith(TRAINED)
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
        assert [w.activation for w in floats] == ["relu"] * (graph != "dlrm-mlp") + ["sigmoid"]
        assert all(w.bias == "s32" for w in works)


def test_tables_and_interaction_are_recovered(exported):
    name, model = exported
    found = recover(read(model).model)
    graph = name.removesuffix("-int8")
    tables = {"dlrm-small": (1000,) * 26, "dlrm-clicks": (500,) * 8}.get(graph)
    if tables is None:
        assert not found.bags and not found.interactions
        return
    (bag,) = found.bags.values()
    (interaction,) = found.interactions.values()
    assert bag.workload.rows == tables and interaction.inputs[1] == bag.output
    left = {node.op_type for node in found.model.graph.node if node.domain != "dccompile"}
    assert left <= {"QuantizeLinear"}, "no tensor manipulation is left"


def test_large_models_are_written_piece_by_piece(tmp_path, monkeypatch):
    """The same weights, whether they are made in memory or written outside."""
    inside = models.export("dlrm-small-int8", 3)
    monkeypatch.setattr(models, "LARGE", 1)
    files = models.save("dlrm-small-int8", tmp_path / "m.onnx", 3)
    assert [f.name for f in files] == ["m.onnx", "m.onnx.data"]
    assert files[0].stat().st_size < 1 << 20 < files[1].stat().st_size
    onnx.checker.check_model(str(files[0]), full_check=True)
    outside = onnx.load(files[0])
    for a, b in zip(inside.graph.initializer, outside.graph.initializer, strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
    assert not list(tmp_path.glob(".*"))


def test_sizes_of_the_large_models():
    from dccompile.models.dlrm import CONFIGS

    assert models.size("dlrm") == 26 * 100_000 * 64 * 4
    config = CONFIGS["dlrm-1g"]
    assert 0.99e9 < config.tables * config.rows * (64 + 8) < 1.01e9
    assert models.shapes("dlrm-1g") == {"dense": ("1..256", 13), "sparse": ("1..256", 26, 20)}
    with pytest.raises(MemoryError, match="more than an ONNX file holds"):
        models.export("dlrm-1g")


@pytest.mark.parametrize("name", LAYERS)
def test_checked_in_graph_is_what_torch_exports(name):
    torch = pytest.importorskip("torch")
    from dccompile.models import dlrm

    path = dlrm.path(dlrm.CONFIGS[name].graph)
    stored = onnx.ModelProto.FromString(path.read_bytes())
    if stored.producer_version != torch.__version__.split("+")[0]:
        pytest.skip(f"exported by PyTorch {stored.producer_version}")
    assert dlrm.trace(name) == stored
    assert path.stat().st_size < 65536


def test_trained_weights_are_small():
    from dccompile.models.clicks import WEIGHTS

    assert WEIGHTS.stat().st_size < 1 << 20
