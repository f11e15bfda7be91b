"""The vision models: small graphs of the right size, weights that keep them alive, int8 forms."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from dccompile.models import qdq, vision
from onnx import TensorProto, helper, numpy_helper

from dccompile import models

SMALL = "mobilenet-v2"
# Millions of parameters, 10**9 products of one sample; of detection with one proposal.
COUNTS = {
    "resnet50": (25.5, 4.09),
    "resnext101-32x4d": (44.1, 7.97),
    "mobilenet-v2": (3.49, 0.301),
    "shufflenet-trunk": (3.24, 4.52),
    "shufflenet-frcnn": (3.88, 4.80),
    "resnext3d101": (22.2, 48.0),
}


def session(model, outputs=None):
    ort = pytest.importorskip("onnxruntime")
    if outputs is not None:
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        del probe.graph.output[:]
        probe.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in outputs
        )
        model = probe
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def products(name):
    """Multiplications of the layers for one sample, and those of them in grouped 1x1 layers."""
    model = onnx.shape_inference.infer_shapes(vision.graph(name))
    values = (*model.graph.value_info, *model.graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    total = grouped = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            kernel = weights[node.input[1]][1:]
            count = int(np.prod(shapes[node.output[0]][1:]) * np.prod(kernel))
            total += count
            groups = {a.name: a.i for a in node.attribute}.get("group", 1)
            grouped += count if groups > 1 and kernel[1:] == (1, 1) else 0
    return total, grouped


@pytest.mark.parametrize("name", vision.CONFIGS)
def test_graphs_are_small_and_hold_no_weights(name):
    assert vision.path(name).stat().st_size < 300_000
    assert vision.path(name, "json").stat().st_size < 50_000
    tensors = vision.graph(name).graph.initializer
    assert all(t.data_type == TensorProto.FLOAT and not t.raw_data for t in tensors)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_products(name):
    parameters, billions = COUNTS[name]
    tensors = vision.graph(name).graph.initializer
    assert sum(np.prod(t.dims) for t in tensors) / 1e6 == pytest.approx(parameters, rel=3e-3)
    total, grouped = products(name)
    assert total / 1e9 == pytest.approx(billions, rel=3e-3)
    if name == "shufflenet-trunk":
        assert grouped / 1e9 == pytest.approx(4.11, rel=3e-3)


def test_every_model_is_counted_and_described():
    assert set(COUNTS) == set(vision.CONFIGS)
    described = dict(models.names())
    assert all(described[name] and described[f"{name}-int8"] for name in COUNTS)


def test_shapes_and_inputs():
    assert models.shapes("resnet50", 1) == {"x": (1, 3, 224, 224)}
    assert models.default_shapes("resnet50-int8") == {"x": (1, 3, 224, 224)}
    assert models.default_shapes("resnet50", [1, 8]) == {"x": ("1..8", 3, 224, 224)}
    assert models.default_shapes("resnext3d101") == {"x": (1, 3, 32, 112, 112)}
    assert models.default_shapes("shufflenet-frcnn", [1, 8]) == {"x": (1, 3, 600, 800)}
    assert models.default_shapes("dlrm-small") == models.shapes("dlrm-small", "1..256")
    assert models.default_shapes("dlrm-mlp") is None
    x = models.sample_inputs("shufflenet-trunk-int8", 2, 5)["x"]
    assert x.shape == (2, 3, 600, 800) and x.dtype == np.float32
    np.testing.assert_array_equal(x, models.sample_inputs("shufflenet-trunk", 2, 5)["x"])


@pytest.fixture(scope="module")
def small():
    return models.export(SMALL), models.export(f"{SMALL}-int8")


def test_the_seed_decides_the_weights(small):
    again = models.export(SMALL).SerializeToString(deterministic=True)
    assert again == small[0].SerializeToString(deterministic=True)
    assert models.export(SMALL, 1) != small[0]


def test_int8_stays_near_float(small):
    """Scores depend on the image, and int8 follows what depends on it."""
    feeds = [models.sample_inputs(SMALL, 1, seed) for seed in range(10, 16)]
    exact, rough = (
        np.concatenate([run.run(None, feed)[0] for feed in feeds]) for run in map(session, small)
    )
    assert exact.shape == (6, 1000) and 0.5 < exact.std() < 5
    assert exact.std(axis=0).mean() > 0.05 * exact.std()
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(exact, rough, strict=True)) > 0.99
    pair = [(y - y.mean(axis=0)).ravel() for y in (exact, rough)]
    assert np.corrcoef(*pair)[0, 1] > 0.95


def test_any_batch_runs(small):
    feed = models.sample_inputs(SMALL, 3)
    whole = session(small[0]).run(None, feed)[0]
    first = session(small[0]).run(None, {"x": feed["x"][:1]})[0]
    np.testing.assert_allclose(whole[:1], first, rtol=1e-4, atol=1e-4)


def test_layers_use_most_codes(small):
    names = [n.output[0] for n in small[1].graph.node if n.op_type == "QuantizeLinear"]
    found = session(small[1], names).run(None, models.sample_inputs(SMALL, 1, 3))
    used = {name: len(np.unique(value)) for name, value in zip(names, found, strict=True)}
    assert min(used.values()) > 128, used


@pytest.mark.parametrize("name", vision.CONFIGS)
def test_int8_forms_are_integer_throughout(name):
    """Every layer, sum, concatenation and pool reads codes and writes codes."""
    model = models.export(f"{name}-int8")
    onnx.checker.check_model(model)
    floats = vision.CONFIGS[name].floats
    makers = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, set()).add(node.op_type)
    pools = ("MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "RoiAlign")
    for node in model.graph.node:
        if node.name.startswith(("proposals/", "boxes/")) and node.op_type != "RoiAlign":
            continue
        assert node.op_type not in ("Relu", "Clip"), node.name
        if node.op_type not in ("Conv", "Gemm", "Add", "Concat", "Transpose", *pools):
            continue
        data = node.input[: 1 if node.op_type == "RoiAlign" else None]
        assert {makers[value].op_type for value in data} == {"DequantizeLinear"}, node.name
        if node.output[0] not in floats:
            assert readers[node.output[0]] == {"QuantizeLinear"}, node.name
    constants = {t.name: t for t in model.graph.initializer}
    weights = [t for t in constants.values() if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    for tensor in weights:
        codes = numpy_helper.to_array(tensor)
        zeros = constants[tensor.name.replace("_quantized", "_zero_point")]
        assert zeros.dims == tensor.dims[:1] and not numpy_helper.to_array(zeros).any()
        assert np.all(np.abs(codes.reshape(len(codes), -1).astype(int)).max(axis=1) == 127)
    assert len(weights) == sum(n.op_type in ("Conv", "Gemm") for n in model.graph.node)


def test_an_activation_is_dropped_only_where_codes_saturate():
    x, y, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xyz")
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
        helper.make_node("Add", ["y", "y"], ["b"]),
        helper.make_node("Clip", ["b"], ["z"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y, z]))
    scales = {"x": [0.1, 128], "y": [0.1, 0], "z": [0.1, 3]}
    made = qdq.quantize(model, scales).graph.node
    kinds = [n.op_type for n in made if not n.op_type.endswith("Linear")]
    assert kinds == ["Add", "Add", "Clip"]
    assert [n.output[0] for n in made if n.op_type == "DequantizeLinear"][1:] == ["y", "z"]


@pytest.mark.parametrize("form", ["", "-int8"])
def test_detection_finds_0_to_100_regions(form):
    run = session(models.export(f"shufflenet-frcnn{form}"))
    feed = models.sample_inputs("shufflenet-frcnn", 1, 1)
    boxes, scores = run.run(["boxes", "scores"], feed)
    assert 10 < len(boxes) <= 100 and boxes.shape == (len(scores), 4)
    assert scores.shape[1] == 2
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    assert boxes.min() >= 0 and np.all(boxes.max(axis=0) <= [800, 600, 800, 600])
    assert np.all(boxes[:, 2:] >= boxes[:, :2])
    boxes, scores = run.run(["boxes", "scores"], {"x": 0 * feed["x"]})
    assert boxes.shape == (0, 4) and scores.shape == (0, 2)


def test_detections_are_paired():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 600, (20, 4)).astype(np.float32)
    scores = rng.random((20, 2), np.float32)
    order = rng.permutation(20)[:18]
    theirs = [boxes[order] + 1, scores[order]]
    ours, others = models.matched("shufflenet-frcnn-int8", [boxes, scores], theirs)
    assert len(ours[0]) == 18
    np.testing.assert_allclose(others[0], ours[0] + 1)
    np.testing.assert_array_equal(others[1], ours[1])
    for count in (0, 5):
        few = [value[:count] for value in theirs]
        kept = models.matched("shufflenet-frcnn", [boxes, scores], few)
        assert kept == ([boxes, scores], few)
    assert models.matched("resnet50", [boxes], [scores]) == ([boxes], [scores])


def test_torch_definition_has_the_same_weights(small):
    torch = pytest.importorskip("torch")
    feed = models.sample_inputs(SMALL, 1)
    with torch.inference_mode():
        y = models.definition(SMALL)(torch.from_numpy(feed["x"])).numpy()
    np.testing.assert_allclose(y, session(small[0]).run(None, feed)[0], rtol=1e-3, atol=1e-4)
    assert models.definition(f"{SMALL}-int8") is None
    assert models.definition("shufflenet-frcnn") is None


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("resn")) for n in vision.CONFIGS],
)
def test_checked_in_graph_is_what_torch_exports(name):
    torch = pytest.importorskip("torch")
    stored = vision.graph(name)
    if stored.producer_version != torch.__version__.split("+")[0]:
        pytest.skip(f"exported by PyTorch {stored.producer_version}")
    assert vision.trace(name) == stored
