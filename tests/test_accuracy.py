"""Errors of layers: against ONNX Runtime and numpy, in the cases that have no ratio, as command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import Graph, mlp, quantized_mlp
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from shell import Shell

from dccompile import models
from dccompile.errors import Error, InputError, ModelError, UsageError
from dccompile.quantization import compare, observe
from dccompile.quantization.accuracy import Report, accuracy
from dccompile.quantization.noise import SILENT, Noise, Pairs, decibels

Feed = dict[str, np.ndarray]


def feeds(count: int, batch: int, *shape: int) -> list[Feed]:
    random = np.random.default_rng(count)
    return [{"x": random.normal(size=(batch, *shape)).astype(np.float32)} for _ in range(count)]


def convnet() -> onnx.ModelProto:
    """Convolutions with a Relu, a residual sum, x * sigmoid(x), a matrix product; y and label."""
    g = Graph(1)

    def weights(*shape: int) -> str:
        return g.constant(g.random.normal(size=shape) / np.sqrt(np.prod(shape[1:])))

    x = g.input("x", ["N", 3, 12, 12])
    bias = g.constant(g.random.normal(size=8) * 0.1)
    v = g.op("Relu", g.op("Conv", x, weights(8, 3, 3, 3), bias, pads=[1] * 4))
    v = g.op("Relu", g.op("Add", g.op("Conv", v, weights(8, 8, 3, 3), bias, pads=[1] * 4), v))
    v = g.op("Conv", v, weights(8, 8, 1, 1))
    v = g.op("Mul", v, g.op("Sigmoid", v))
    v = g.op("Flatten", g.op("GlobalAveragePool", g.op("MaxPool", v, kernel_shape=[2, 2])))
    v = g.op("MatMul", v, weights(8, 5))
    v = g.op("Add", v, g.constant(g.random.normal(size=5) * 0.1))
    g.op("Softmax", v, out="y")
    g.op("ArgMax", v, out="label", axis=1)
    return g.model("y", "label")


class Reader(CalibrationDataReader):
    def __init__(self, data: Iterable[Feed]) -> None:
        self.data = iter(data)

    def get_next(self) -> Feed | None:
        return next(self.data, None)


def quantized_by_ort(
    model: onnx.ModelProto, data: Iterable[Feed], folder: Path, kind: QuantType, **options: Any
) -> onnx.ModelProto:
    onnx.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx",
        folder / "quantized.onnx",
        Reader(data),
        activation_type=kind,
        weight_type=QuantType.QInt8,
        **options,
    )
    return onnx.load(folder / "quantized.onnx")


def ort_values(model: onnx.ModelProto, names: list[str], data: list[Feed]) -> dict[str, np.ndarray]:
    """Tensors of a model as ONNX Runtime computes them without its optimizations, joined."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = [session.run(None, feed) for feed in data]
    joined = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return dict(zip(names, joined, strict=True))


def ratio(want: np.ndarray, got: np.ndarray) -> float:
    want, got = want.astype(np.float64), got.astype(np.float64)
    return 10 * math.log10(np.square(want).sum() / np.square(got - want).sum())


def rows(report: Report) -> dict[str, compare.Layer]:
    return {layer.tensor: layer for layer in report.layers}


# ---- figures ----
def check_whole(
    report: Report, models: tuple[onnx.ModelProto, onnx.ModelProto], data: list[Feed]
) -> None:
    """The whole error of every inner tensor is the one in ONNX Runtime."""
    found = rows(report)
    names = [name for name in found if name not in ("x", "y")]
    wanted = ort_values(models[0], names, data)
    got = ort_values(models[1], [f"{name}_DequantizeLinear_Output" for name in names], data)
    for name in names:
        theirs = got[f"{name}_DequantizeLinear_Output"]
        assert found[name].sqnr == pytest.approx(ratio(wanted[name], theirs), abs=0.5), name
        ends = found[name].low, found[name].high
        assert ends[0] * (1 + 1e-6) <= theirs.min() and theirs.max() <= ends[1] * (1 + 1e-6)


def test_a_convolutional_model_of_onnx_runtime(tmp_path: Path) -> None:
    """Codes u8, weights by channel: names, the errors of all tensors, and the outputs."""
    reference, calibration = convnet(), feeds(8, 2, 3, 12, 12)
    model = quantized_by_ort(reference, calibration, tmp_path, QuantType.QUInt8, per_channel=True)
    data = feeds(3, 2, 3, 12, 12)
    report = accuracy(model, data, reference=tmp_path / "float.onnx")
    found = rows(report)
    made = {layer.node: layer.tensor for layer in report.layers if layer.layer}
    assert made == {"conv0": "v1", "conv2": "v2", "conv5": "v5", "matmul11": "v11"}
    assert all(layer.precision == "u8s8" for layer in report.layers if layer.layer)
    assert found["v4"].op == "Add" and found["v4"].precision == "u8"
    assert found["x"].op == "input" and found["x"].flag == ""
    assert found["v1"].flag == "--exclude conv0"
    assert report.samples == 6 and report.unmatched == () and report.notes == ()
    check_whole(report, (reference, model), data)
    y, label = report.outputs
    assert y.sqnr == found["y"].sqnr and y.dtype == "float32" and y.cosine > 0.999
    assert (label.dtype, label.sqnr, label.equal) == ("int64", None, 1.0)


def test_signed_codes(tmp_path: Path) -> None:
    reference, data = mlp((16, 32, 8)), feeds(4, 8, 16)
    model = quantized_by_ort(reference, data, tmp_path, QuantType.QInt8)
    report = accuracy(model, data, reference=reference)
    assert {layer.precision for layer in report.layers} == {"s8", "s8s8"}
    check_whole(report, (reference, model), data)


def test_own_whole_and_inherited_against_numpy() -> None:
    """Two layers: what the second costs alone is computed from the float model's hidden tensor."""
    model = quantized_mlp((16, 32, 8))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}

    def dequantized(name: str) -> np.ndarray:
        values, scale = (constants[n].astype(np.float64) for n in made[name].input[:2])
        return values * scale

    def rounded(x: np.ndarray, name: str) -> np.ndarray:
        node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and
                    n.input[0] == name)  # fmt: skip
        scale, zero = (float(constants[n]) for n in node.input[1:])
        return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale

    gemms = [n for n in model.graph.node if n.op_type == "Gemm"]
    (w0, b0), (w1, b1) = ([dequantized(name) for name in n.input[1:]] for n in gemms)
    random = np.random.default_rng(0)
    noise = [w * random.normal(1, 0.01, w.shape) for w in (w0, w1)]  # the float model's weights
    g = Graph()
    hidden = g.op("Gemm", g.input("x", ["N", 16]), g.constant(noise[0]), g.constant(b0))
    relu = next(n for n in model.graph.node if n.op_type == "Relu").output[0]
    g.op("Gemm", g.op("Relu", hidden, out=relu), g.constant(noise[1]), g.constant(b1), out="y")
    reference = g.model("y")

    x = random.normal(size=(64, 16)).astype(np.float32)
    found = rows(accuracy(model, [{"x": x}], reference=reference))
    float_hidden = np.maximum(x.astype(np.float64) @ noise[0] + b0, 0)
    float_y = float_hidden @ noise[1] + b1
    whole_hidden = rounded(np.maximum(rounded(x, "x") @ w0 + b0, 0), relu)
    last = gemms[1].output[0]
    whole = rounded(whole_hidden @ w1 + b1, last)
    alone = rounded(rounded(float_hidden, relu) @ w1 + b1, last)
    assert found[relu].own == pytest.approx(ratio(float_hidden, whole_hidden), abs=0.01)
    assert found[relu].own == found[relu].sqnr and found[relu].inherited == math.inf
    layer = found["y"]
    assert layer.sqnr == pytest.approx(ratio(float_y, whole), abs=0.01)
    assert layer.own == pytest.approx(ratio(float_y, alone), abs=0.01)
    signal, noises = (
        np.square(float_y).sum(),
        [np.square(float_y - y).sum() for y in (whole, alone)],
    )
    inherited = 10 * math.log10(signal / (noises[0] - noises[1]))
    assert layer.inherited == pytest.approx(inherited, abs=0.02)
    assert layer.max_error == pytest.approx(np.abs(float_y - whole).max(), rel=1e-3)
    cosine = (float_y * whole).sum() / np.linalg.norm(float_y) / np.linalg.norm(whole)
    assert layer.cosine == pytest.approx(cosine, abs=1e-6)
    assert (layer.scale, layer.low, layer.high) == pytest.approx((0.02, -2.0, 3.1))
    beyond = np.mean((float_y < -2.01) | (float_y > 3.11))
    assert beyond > 0 and layer.clipped == pytest.approx(beyond, abs=1e-3)


def test_a_spoilt_layer_is_the_worst_and_those_behind_inherit() -> None:
    model = models.export("dlrm-mlp-int8")
    weights = next(t for t in model.graph.initializer if t.name.endswith("2.weight_quantized"))
    codes = numpy_helper.to_array(weights)
    weights.CopyFrom(numpy_helper.from_array((codes // 32 * 32).astype(np.int8), weights.name))
    data = [models.sample_inputs("dlrm-mlp", 8, seed) for seed in range(2)]
    reference = models.export("dlrm-mlp")
    report = accuracy(model, data, reference=reference)
    worst, *others = report.layers
    assert worst.node == "/2/Gemm" and worst.flag == "--exclude /2/Gemm" and worst.own < 20
    assert all(layer.own > 35 for layer in others)
    behind = next(layer for layer in others if layer.node == "/4/Gemm")
    assert behind.sqnr == pytest.approx(behind.inherited, abs=0.3)
    ranked = compare.own_errors(reference, model, data)
    assert [layer.node for layer in ranked] == [n.node for n in report.layers if n.layer]
    with pytest.raises(
        Error, match=r"output 'y' has .* dB; at least 60 dB.*--exclude /2/Gemm"
    ) as e:
        report.gate(60)
    assert e.value.code == "DC5002" and e.value.exit_code == 5
    report.gate(5)


def test_parts_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short the tensors come from several compiled models, pair by pair."""
    model, data = quantized_mlp((16, 32, 8)), feeds(2, 4, 16)
    whole = accuracy(model, data)
    calls: list[int] = []
    waiting: list[int] = []
    visit = Pairs.visit

    def watch(*args: Any, **options: Any) -> observe.Observed:
        seen = original(*args, **options, budget=2000)
        calls.append(seen.runs // len(data))
        return seen

    def counted(self: Pairs, name: str, value: np.ndarray) -> None:
        visit(self, name, value)
        waiting.append(len({id(v) for v in self._waiting.values()}))

    original = observe.watch
    monkeypatch.setattr(observe, "watch", watch)
    monkeypatch.setattr(Pairs, "visit", counted)
    parts = accuracy(model, data)
    assert calls[0] >= 2
    assert parts.layers == whole.layers and parts.outputs == whole.outputs
    assert max(waiting) <= 2 and waiting[-1] == 0


# ---- references ----
def test_without_a_reference_dropped_activations_are_no_error() -> None:
    """The int8 form of the reference models has no Relu where codes saturate instead."""
    model = models.export("dlrm-mlp-int8")
    assert "Relu" not in {node.op_type for node in model.graph.node}
    data = [models.sample_inputs("dlrm-mlp", 16, 0)]
    report = accuracy(model, data)
    known = rows(accuracy(model, data, reference=models.export("dlrm-mlp")))
    assert any("Errors of weights and of clipping are not seen" in note for note in report.notes)
    assert {layer.tensor for layer in report.layers} == set(known)
    for layer in report.layers:
        assert layer.clipped is None and layer.own > 35
        assert layer.own >= known[layer.tensor].own  # there errors of weights are seen too
    assert rows(report)["x"].own == known["x"].own
    assert [layer.node for layer in report.layers if layer.layer] != []


def test_weights_alone() -> None:
    """Layers with quantized weights and float inputs; their results have no range."""
    g = Graph(2)
    x = g.input("x", ["N", 12])
    codes = g.constant(g.random.integers(-127, 128, (12, 6)), "int8")
    weights = g.op("DequantizeLinear", codes, g.constant(np.full(6, 0.01)), axis=1)
    g.op("Sigmoid", g.op("MatMul", x, weights, out="product"), out="y")
    model = g.model("y")
    g = Graph(2)
    values = g.random.integers(-127, 128, (12, 6)) * 0.01 + 0.01
    g.op("Sigmoid", g.op("MatMul", g.input("x", ["N", 12]), g.constant(values), out="product"),
         out="y")  # fmt: skip
    (layer,) = accuracy(model, feeds(1, 9, 12), reference=g.model("y")).layers
    assert (layer.tensor, layer.precision, layer.scale) == ("product", "f32s8", None)
    assert 20 < layer.own < 45 and layer.own == layer.sqnr


def test_integer_operators(tmp_path: Path) -> None:
    """Ranges found when called, as quantize_dynamic of ONNX Runtime writes it."""
    reference = mlp((16, 32, 8))
    onnx.save(reference, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "quantized.onnx", per_channel=True)
    data = feeds(2, 8, 16)
    report = accuracy(tmp_path / "quantized.onnx", data, reference=reference)
    found = rows(report)
    assert {layer.flag for layer in report.layers} == {"--exclude matmul0", "--exclude matmul3"}
    assert set(found) == {"v0", "v3"} and found["v0"].precision == "u8s8"
    wanted = ort_values(reference, ["v0", "v3"], data)
    got = ort_values(onnx.load(tmp_path / "quantized.onnx"), ["v0", "v3"], data)
    for name in found:
        assert found[name].sqnr == pytest.approx(ratio(wanted[name], got[name]), abs=0.5)
    assert found["v0"].own == found["v0"].sqnr and found["v3"].own > found["v3"].sqnr
    with pytest.raises(UsageError, match="reference: none given, and MatMulInteger") as e:
        accuracy(tmp_path / "quantized.onnx", data)
    assert e.value.code == "DC2050"


def test_float_layers_in_front_have_no_error() -> None:
    """A model whose first layer stayed in float: the second begins from the same values."""
    g = Graph(3)
    weights = [g.random.normal(size=s) / 4 for s in ((10, 16), (16, 4))]
    first = g.op("MatMul", g.input("x", ["N", 10]), g.constant(weights[0]), out="h")
    g.op("MatMul", first, g.constant(weights[1]), out="y")
    reference = g.model("y")
    g = Graph(3)
    first = g.op("MatMul", g.input("x", ["N", 10]), g.constant(weights[0]), out="h")
    pair = g.constant(np.float32(0.03)), g.constant(128, "uint8")
    codes = g.op("QuantizeLinear", first, *pair)
    step = np.float32(0.01)
    table = g.constant(np.clip(np.rint(weights[1] / step), -127, 127), "int8")
    g.op("MatMul", g.op("DequantizeLinear", codes, *pair),
         g.op("DequantizeLinear", table, g.constant(step)), out="y")  # fmt: skip
    found = rows(accuracy(g.model("y"), feeds(2, 8, 10), reference=reference))
    assert set(found) == {"h", "y"}
    assert found["y"].own == found["y"].sqnr < 50 and found["y"].inherited == math.inf
    assert found["h"].node == "matmul0" and found["h"].precision == "f32f32"


def test_an_older_opset_of_the_reference() -> None:
    data = [{"x": np.arange(8, dtype=np.float32)[:, None]}]
    (output,) = accuracy(grid(2), data, reference=product(2.0, opset=12)).outputs
    assert output.sqnr == math.inf


# ---- cases without a ratio ----
def grid(weight: int, bias: int = 0) -> onnx.ModelProto:
    """y = clamp(round(x)) * weight + bias, all scales 1: whole numbers are exact."""
    g = Graph()
    one, zero = g.constant(np.float32(1)), g.constant(0, "uint8")
    pair = one, zero
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", g.input("x", ["N", 1]), *pair), *pair)
    w = g.op("DequantizeLinear", g.constant([[weight]], "int8"), one)
    b = g.op("DequantizeLinear", g.constant([bias], "int32"), one)
    codes = g.op("QuantizeLinear", g.op("Gemm", x, w, b, out="h"), *pair)
    g.op("DequantizeLinear", codes, *pair, out="y")
    return g.model("y")


def product(weight: float, opset: int = 17) -> onnx.ModelProto:
    g = Graph()
    x = g.input("x", ["N", 1])
    g.op("Gemm", x, g.constant([[weight]]), g.constant([0.0]), out="y")
    return g.model("y", opset=opset)


def test_what_is_exact(tmp_path: Path) -> None:
    data = [{"x": np.arange(64, dtype=np.float32)[:, None]}, {"x": np.ones((3, 1), np.float32)}]
    report = accuracy(grid(2), data, reference=product(2.0))
    assert {layer.own for layer in report.layers} == {math.inf}
    assert {layer.sqnr for layer in report.layers} == {math.inf}
    (output,) = report.outputs
    assert (output.sqnr, output.cosine, output.max_error, output.equal) == (math.inf, 1.0, 0.0, 1.0)
    report.gate(1000)


def test_a_signal_that_is_zero() -> None:
    zeros = [{"x": np.zeros((4, 1), np.float32)}]
    (output,) = accuracy(grid(2, bias=3), zeros, reference=product(2.0)).outputs
    assert (output.sqnr, output.cosine, output.max_error) == (SILENT, 0.0, 3.0)
    assert (output.relative_max, output.equal) == (1.0, 0.0)
    (output,) = accuracy(grid(2), zeros, reference=product(2.0)).outputs
    assert (output.sqnr, output.cosine, output.relative_max) == (math.inf, 1.0, 0.0)


def test_a_quantized_model_that_divides_by_zero() -> None:
    """x / w: 0.2 is code 0. The quantized tensor is no number, the float one must be."""
    g = Graph()
    pair = g.constant(np.float32(1)), g.constant(0, "uint8")
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", g.input("x", ["N", 3]), *pair), *pair)
    g.op("Div", g.constant(1.0), x, out="y")
    plain = Graph()
    plain.op("Div", plain.constant(1.0), plain.input("x", ["N", 3]), out="y")
    data = [{"x": np.array([[0.2, 1, 2]], np.float32)}]
    (output,) = accuracy(g.model("y"), data, reference=plain.model("y")).outputs
    assert (output.sqnr, output.cosine, output.max_error) == (SILENT, 0.0, math.inf)
    with pytest.raises(InputError, match="the float model itself") as e:
        accuracy(g.model("y"), [{"x": np.zeros((1, 3), np.float32)}], reference=plain.model("y"))
    assert e.value.code == "DC2131"


def test_ratios_of_powers() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(0.0, 0.0) == decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == decibels(1.0, math.inf) == decibels(1.0, math.nan) == SILENT
    assert decibels(1e-300, 1e300) == SILENT


def test_values_that_are_no_numbers_are_infinitely_wrong() -> None:
    for value in (math.nan, math.inf, -math.inf):
        noise = Noise()
        noise.add(np.ones(9, np.float32), np.array([1] * 8 + [value], np.float32))
        assert (noise.sqnr, noise.largest_error, noise.cosine) == (SILENT, math.inf, 0.0)
        assert noise.share(noise.equal) == pytest.approx(8 / 9)


def test_feeds_add_up() -> None:
    random = np.random.default_rng(0)
    want = random.normal(size=(40, 1000)).astype(np.float32)
    got = want + random.normal(size=want.shape).astype(np.float32) / 100
    whole, parts = Noise(low=-1, high=1), Noise(low=-1, high=1)
    whole.add(want, got)
    for index in range(40):
        parts.add(want[index : index + 1], got[index : index + 1])
    assert parts.sqnr == pytest.approx(whole.sqnr) == pytest.approx(ratio(want, got))
    assert parts.cosine == pytest.approx(whole.cosine)
    assert (parts.count, parts.beyond, parts.equal) == (whole.count, whole.beyond, whole.equal)
    assert parts.largest_error == whole.largest_error == pytest.approx(np.abs(got - want).max())
    assert parts.beyond == np.count_nonzero(np.abs(want) > 1)


def test_tensors_of_different_shapes_have_no_error() -> None:
    noise = Noise()
    noise.add(np.ones((2, 3)), np.ones((3, 3)))
    assert noise.misshapen and noise.count == 0
    empty = Noise()
    empty.add(np.ones((0, 3)), np.ones((0, 3)))
    assert (empty.sqnr, empty.cosine, empty.share(empty.equal)) == (math.inf, 1.0, 0.0)


def test_detections_may_differ_in_number() -> None:
    """Rows of NonZero depend on the values: the outputs have no ratio, and the gate says so."""
    output = compare.Output("boxes", "float32", None, None, None, None, None)
    report = Report((), 0, (output,), (), (), 1, 0.0, 0.0)
    with pytest.raises(Error, match="'boxes' has another shape"):
        report.gate(1)
    labels = compare.Output("label", "int64", None, None, None, None, 0.5)
    with pytest.raises(Error, match="'label' is int64, which has no SQNR"):
        Report((), 0, (labels,), (), (), 1, 0.0, 0.0).gate(1)


# ---- errors ----
def test_a_float_model_is_not_quantized() -> None:
    for reference in (None, mlp((8, 4))):
        with pytest.raises(ModelError, match="Fix: give the result of dccompile quantize") as e:
            accuracy(mlp((8, 4)), feeds(1, 2, 8), reference=reference)
        assert e.value.code == "DC3201" and e.value.exit_code == 3


def other(what: str) -> onnx.ModelProto:
    g = Graph()
    if what == "names":
        value = g.op("Relu", g.input("x", ["N", 16]), out="somewhere")
        g.op("Identity", value, out="y")
    elif what == "input":
        g.op("Relu", g.input("image", ["N", 16]), out="y")
    else:
        g.op("Cast", g.input("x", ["N", 16]), out="y", to=TensorProto.DOUBLE)
    return g.model("y")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("input", "its inputs are image float32, those of the model x float32"),
        ("output", "its outputs are y float64, those of the model y float32"),
    ],
)
def test_a_reference_of_another_model(what: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as e:
        accuracy(quantized_mlp((16, 8)), feeds(1, 2, 16), reference=other(what))
    assert e.value.code == "DC2050"


def test_tensors_that_the_reference_does_not_name() -> None:
    model = quantized_mlp((16, 32, 8))
    report = accuracy(model, feeds(1, 2, 16), reference=other("names"))
    assert set(rows(report)) == {"x", "y"} and report.unmatched == ("v5",)
    assert report.notes[-1:] == ("not compared, the float model has no tensor of that name: 'v5'",)
    g = Graph()
    codes = g.op("QuantizeLinear", g.op("Tanh", g.input("x", ["N", 4])), g.constant(0.1),
                 g.constant(0, "uint8"))  # fmt: skip
    g.op("Relu", g.op("DequantizeLinear", codes, g.constant(0.1), g.constant(0, "uint8")), out="y")
    plain = Graph()
    plain.op("Relu", plain.op("Tanh", plain.input("x", ["N", 4]), out="t"), out="y")
    with pytest.raises(UsageError, match="none of the model's 1 quantized tensors by name") as e:
        accuracy(g.model("y"), feeds(1, 2, 4), reference=plain.model("y"))
    assert e.value.code == "DC2050"


def test_data_that_do_not_fit() -> None:
    model = quantized_mlp((16, 8))
    with pytest.raises(InputError, match="--data"):
        accuracy(model, feeds(1, 2, 15))
    with pytest.raises(InputError, match="--data"):
        accuracy(model, [{"z": np.ones((1, 16), np.float32)}])
    with pytest.raises(InputError, match="--data"):
        accuracy(model, "nowhere.npz")


# ---- command line ----
@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """exact.onnx and floats.onnx, which agree on data.npz; biased.onnx, which does not."""
    folder = tmp_path_factory.mktemp("files")
    onnx.save(grid(2, bias=3), folder / "biased.onnx")
    onnx.save(grid(2), folder / "exact.onnx")
    onnx.save(product(2.0), folder / "floats.onnx")
    np.savez(folder / "data.npz", x=np.arange(50, dtype=np.float32)[:, None])
    return folder


def document(text: str) -> Any:
    """Of JSON as the standard has it, without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(word))


def test_command_prints_the_worst_layers_and_the_outputs(shell: Shell) -> None:
    out, err = shell(
        "accuracy", "dlrm-mlp-int8", "--reference", "dlrm-mlp", "--data", "random:3", "--top", 2
    )
    head, first, second, count, empty, ends, output, last = out.splitlines()
    assert head.split()[:6] == ["tensor", "op", "codes", "own", "dB", "whole"]
    assert first.split()[1:3] == second.split()[1:3] == ["Gemm", "u8s8"]
    assert first.endswith("--exclude /0/Gemm") and empty == ""
    assert count == "worst 2 of 5 quantized tensors and layers, by their own error"
    assert ends.split()[:3] == ["output", "dtype", "dB"] and output.split()[:2] == ["y", "float32"]
    assert last.startswith("3 samples in ")
    assert "compare, feed 1" in err


def test_command_says_what_is_exact_and_writes_json(shell: Shell, files: Path) -> None:
    given = ("--reference", files / "floats.onnx", "--data", files / "data.npz", "-q")
    out, err = shell("accuracy", files / "exact.onnx", *given)
    assert out.count("exact") == 2 * 2 + 1 and err == ""
    body = document(shell("accuracy", files / "exact.onnx", *given, "--json")[0])
    assert body["schema"] == "dccompile.accuracy/1" and body["samples"] == 50
    assert [(row["own"], row["max_error"]) for row in body["layers"]] == [(None, 0.0)] * 2
    assert body["layers"][1].keys() >= {"node", "tensor", "sqnr", "clipped", "low", "flag"}


def test_command_fails_below(shell: Shell, files: Path) -> None:
    command = ("accuracy", files / "biased.onnx", "--reference", files / "floats.onnx")
    given = (*command, "--data", files / "data.npz")
    line = shell.fails(5, *given, "--fail-below", "60dB", after_output=True)
    assert line.startswith("error DC5002: --fail-below 60dB: output 'y' has ")
    shell(*given, "--fail-below", "10")
    for wrong in (("--fail-below", "loud"), ("--fail-below", "-3dB"), ("--top", "0")):
        assert "DC2051" in shell.fails(2, *given, f"{wrong[0]}={wrong[1]}")


def test_command_without_reference_warns(shell: Shell, files: Path) -> None:
    err = shell("accuracy", files / "exact.onnx", "--data", "random:2", "-q")[1]
    assert err.startswith("warning: no float model given")
    assert "DC3201" in shell.fails(3, "accuracy", files / "floats.onnx", "--data", "random:2", "-q")
    assert "DC21" in shell.fails(2, "accuracy", files / "exact.onnx", "--data", "none.npz")
