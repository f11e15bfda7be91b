"""Tensors inside a model, as compiled code computes them."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dccompile import compiler
from dccompile.errors import InputError
from dccompile.frontend.gate import Value
from dccompile.quantization.observe import Observed, largest_batch, watch

Values = dict[str, list[np.ndarray]]


def convolutions() -> onnx.ModelProto:
    """x (N, 3, 8, 8) -> convolution, ReLU, depthwise convolution, sum, pooling, layer y (N, 5)."""
    g = graphs.Graph(4)
    x = g.input("x", ["N", 3, 8, 8])
    kernel = g.constant(g.random.normal(size=(6, 3, 3, 3)) * 0.3)
    value = g.op("Conv", x, kernel, g.constant(g.random.normal(size=6)), pads=[1] * 4)
    value = g.op("Relu", value)
    kernel = g.constant(g.random.normal(size=(6, 1, 3, 3)) * 0.3)
    value = g.op("Add", value, g.op("Conv", value, kernel, pads=[1] * 4, group=6))
    value = g.op("Flatten", g.op("GlobalAveragePool", value))
    g.op("Gemm", value, g.constant(g.random.normal(size=(6, 5))), out="y")
    return g.model("y")


def feeds(shape: tuple[int, ...], batches: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((n, *shape)).astype(np.float32)} for n in batches]


def observe(model: onnx.ModelProto, names: list[str], data: Any, **more: Any) -> Any:
    """(what watch returns, arrays by name in the order of the visits)."""
    seen: Values = {}
    result = watch(model, names, data, lambda n, a: seen.setdefault(n, []).append(a), **more)
    return result, seen


def expected(model: onnx.ModelProto, names: list[str], data: list[dict[str, Any]]) -> Values:
    """By ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.InferenceSession(copy.SerializeToString())
    rows = [session.run(names, feed) for feed in data]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def same(found: Values, wanted: Values) -> None:
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        for ours, theirs in zip(found[name], wanted[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def tensors(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output]


def test_all_tensors_of_a_network() -> None:
    model = convolutions()
    before = model.SerializeToString()
    data = feeds((3, 8, 8), (4, 4, 1))
    names = tensors(model)  # y, the output, among them
    result, seen = observe(model, [*reversed(names), "x", names[0]], iter(data), threads=1)
    same({n: seen[n] for n in names}, expected(model, names, data))
    assert all(a is feed["x"] for a, feed in zip(seen["x"], data, strict=True))
    assert list(seen) == ["x", *names]  # in the model's order
    assert (result.samples, result.runs) == (9, 3)
    assert 0 < result.compile_seconds < result.seconds
    assert model.SerializeToString() == before


def test_several_models_where_tensors_are_large() -> None:
    model = graphs.mlp((12, 40, 40, 6))
    data = [feed | {"label": np.zeros(9)} for feed in feeds((12,), (8, 3))]
    names = tensors(model)
    events: list[dict[str, Any]] = []
    result, seen = observe(model, names, data, budget=8 * 40 * 4 * 3, progress=events.append)
    same(seen, expected(model, names, feeds((12,), (8, 3))))
    assert list(seen) == names
    # six of 8 x 40 floats, three of 8 x 6: the first three, the next three, the rest
    assert result.runs == 3 * len(data)
    assert [e["done"] for e in events if e["step"] == "observe"] == [1, 2]


def test_only_inputs_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile", None)
    result, seen = observe(graphs.mlp((12, 6)), ["x"], feeds((12,), (2, 2)))
    assert len(seen["x"]) == 2 and result == Observed(4, result.seconds, 0.0, 0)


def test_shapes_are_passed_on() -> None:
    seen: list[tuple[int, ...]] = []
    data = feeds((12,), (4, 5))
    with pytest.raises(InputError, match=r"float32\[4,12\]"):
        watch(
            graphs.mlp((12, 6)),
            ["y"],
            data,
            lambda _, array: seen.append(array.shape),
            shapes={"x": (4, 12)},
        )
    assert seen == [(4, 6)]


def test_indices_and_aliases_of_inputs() -> None:
    model = graphs.mixed()
    random = np.random.default_rng(1)
    data = [
        {
            "x": random.standard_normal((4, 12)).astype(np.float32),
            "index": random.integers(0, 50, (4, 3)),
        }
    ]
    names = tensors(model)
    _, seen = observe(model, names, data)
    same(seen, expected(model, names, data))


def test_unknown_names_are_told() -> None:
    model = graphs.mlp((12, 6))
    weight = model.graph.initializer[0].name
    with pytest.raises(InputError, match=f"tensor '{weight}', 'nothing': neither an") as error:
        observe(model, ["y", "nothing", weight], feeds((12,), (1,)))
    assert error.value.code == "DC2130"


def test_no_feeds() -> None:
    with pytest.raises(InputError, match="no samples") as error:
        observe(graphs.mlp((12, 6)), ["y"], [])
    assert error.value.code == "DC2123"


def test_a_model_that_computes_nan() -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 2])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    nodes = [
        helper.make_node("Log", ["x"], ["log"]),
        helper.make_node("Add", ["log", "one"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    good = {"x": np.ones((2, 2), np.float32)}
    data = [good, {"x": np.array([[1, -1]], np.float32)}]
    with pytest.raises(InputError, match="tensor 'log': feed 1 makes it hold nan") as error:
        observe(model, ["log", "y"], data)
    assert error.value.code == "DC2131"


def test_infinite_inputs() -> None:
    data = [{"x": np.full((1, 12), -np.inf, np.float32)}]
    with pytest.raises(InputError, match="tensor 'x': feed 0 makes it hold -inf"):
        observe(graphs.mlp((12, 6)), ["x"], data)


def test_the_largest_batch_that_one_model_observes() -> None:
    model = graphs.mlp((12, 40, 40, 6))
    inputs = [Value("x", "float32", ("N", 12))]
    sample = (6 * 40 + 3 * 6) * 4
    assert largest_batch(model, tensors(model), inputs, budget=10 * sample + 5) == 10
    assert largest_batch(model, ["x", "y"], inputs, budget=10 * sample) == 32
    assert largest_batch(model, tensors(model), inputs, limit=4) == 4
    assert largest_batch(model, tensors(model), inputs, budget=1) == 1
