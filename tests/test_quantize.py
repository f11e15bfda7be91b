"""`quantize`: the QDQ model, its report, the techniques off against on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from whole import Graph, Whole

import dccompile as dc
from dccompile import errors
from dccompile.quantization import weights
from dccompile.quantization.quantize import KEY
from dccompile.quantization.report import Report

RNG = np.random.default_rng(5)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def network() -> bytes:
    """Depthwise and dense convolutions with batch norms, a residual sum, pools, a head."""
    g = Graph(x=("float32", ["N", 3, 12, 12]))

    def block(x: str, o: int, c: int, k: int, **more: Any) -> str:
        sizes = normal(o, scale=1.2)  # filters of very different sizes, as after training
        w = normal(o, c, k, k, scale=0.3) * np.exp(sizes)[:, None, None, None]
        y = g("Conv", x, w, pads=[k // 2] * 4, **more)
        norm = (normal(o), normal(o), normal(o), np.exp(normal(o)))
        return str(g("BatchNormalization", y, np.abs(norm[0]) + 0.5, *norm[1:]))

    a = g("Relu", block("x", 16, 3, 3))
    b = g("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    c = g("HardSwish", block(b, 16, 1, 3, group=16))
    d = g("Relu", g("Add", block(c, 16, 16, 1), b))
    e = g("Concat", d, g("Relu", block(d, 8, 16, 1)), axis=1)
    f = g("Flatten", g("GlobalAveragePool", e))
    g.out(g("Conv", e, normal(8, 24, 1, 1)), g("Gemm", f, normal(24, 10, scale=0.3), normal(10)))
    return g.model()


def samples(count: int = 24, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.standard_normal((4, 3, 12, 12)).astype(np.float32)} for _ in range(count // 4)
    ]


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options)


def sqnr(model: bytes, quantized: onnx.ModelProto) -> float:
    """At the first output, over samples that were not calibrated on, in dB."""
    signal = noise = 0.0
    first, second = session(model), session(quantized.SerializeToString())
    for feed in samples(32, seed=1):
        want, got = first.run(None, feed)[0], second.run(None, feed)[0]
        signal += float(np.square(want).sum())
        noise += float(np.square(want - got).sum())
    return float(10 * np.log10(signal / noise))


@pytest.fixture(scope="module")
def model() -> bytes:
    return network()


@pytest.fixture(scope="module")
def default(model: bytes) -> tuple[onnx.ModelProto, Report]:
    reports: list[Report] = []
    return dc.quantize(model, samples(), report=reports.append), reports[0]


def test_the_model_is_standard_and_says_how_it_was_made(
    default: tuple[onnx.ModelProto, Report],
) -> None:
    model, report = default
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    made = {p.key: json.loads(p.value) for p in model.metadata_props}[KEY]
    assert made["method"] == "l2" and made["samples"] == 24 == report.samples
    assert [row["precision"] for row in report.layers] == ["int8"] * 6


def test_onnx_runtime_computes_the_same_bits(default: tuple[onnx.ModelProto, Report]) -> None:
    data = default[0].SerializeToString()
    whole, reference = Whole(data), session(data)
    for feed in samples(8, seed=2):
        for got, want in zip(whole(**feed), reference.run(None, feed), strict=True):
            # Outputs are float: two operations on equal integers. HardSwish is a table.
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_between_the_layers_is_float(default: tuple[onnx.ModelProto, Report]) -> None:
    report = dc.check(default[0])
    assert report.ok
    layers = [n for n in report.nodes if n["op"] in ("Conv", "Gemm")]
    assert len(layers) == 6 and {n["precision"] for n in layers} == {"int8"}


def test_a_node_keeps_its_name_and_a_tensor_its_own(
    model: bytes, default: tuple[onnx.ModelProto, Report]
) -> None:
    names = {node.name for node in onnx.load_from_string(model).graph.node}
    kept = {node.name for node in default[0].graph.node} & names
    assert len(kept) == len(names) - 4  # the batch norms


def test_the_same_data_in_other_feeds_give_the_same_model(
    model: bytes, default: tuple[onnx.ModelProto, Report]
) -> None:
    joined = np.concatenate([feed["x"] for feed in samples()])
    again = dc.quantize(model, [{"x": joined[:3]}, {"x": joined[3:]}])
    tables = ({t.name: t.raw_data for t in m.graph.initializer} for m in (default[0], again))
    first, second = tables
    assert first.keys() == second.keys()
    # means of channels are sums of floats, in another order: biases may differ by a code
    assert all(first[n] == second[n] for n in first if n.endswith(("_scale", "_zero_point")))


# ---- every technique: off against on, at the output ----
def test_fine_grain_scales_gain(model: bytes, default: tuple[onnx.ModelProto, Report]) -> None:
    coarse = dc.quantize(model, samples(), granularity="tensor")
    assert sqnr(model, default[0]) > sqnr(model, coarse) + 1.5


def test_net_aware_ranges_gain(model: bytes, default: tuple[onnx.ModelProto, Report]) -> None:
    blind = dc.quantize(model, samples(), net_aware=False)
    assert sqnr(model, default[0]) > sqnr(model, blind) + 1


def test_fused_sums_round_once_less(model: bytes) -> None:
    reports: list[Report] = []
    fused = dc.quantize(model, samples(), fuse_sums=True, report=reports.append)
    plain = dc.quantize(model, samples(), report=reports.append)
    pairs = [sum(n.op_type == "QuantizeLinear" for n in m.graph.node) for m in (fused, plain)]
    assert pairs[1] == pairs[0] + 1


def test_bias_correction_takes_out_the_mean_error(model: bytes) -> None:
    """Coarse weights, so that their error is seen, on inputs whose mean is not zero."""
    feeds = [{"x": feed["x"] + 2} for feed in samples()]
    shifts = []
    for corrected in (True, False):
        made = dc.quantize(model, feeds, granularity="tensor", bias_correction=corrected)
        first, second = session(model), session(made.SerializeToString())
        gaps = [second.run(None, f)[0] - first.run(None, f)[0] for f in feeds]
        shifts.append(float(np.abs(np.concatenate(gaps).mean(axis=0)).mean()))
    assert shifts[0] < shifts[1] / 2


def test_the_bias_behind_a_matmul_is_corrected() -> None:
    g = Graph(x=("float32", ["N", 4, 16]))
    a = g("Relu", g("Add", g("MatMul", "x", normal(16, 16)), normal(16)))
    g.out(g("Add", normal(16), g("MatMul", a, normal(16, 16))))
    feeds = [{"x": normal(32, 4, 16) + 2} for _ in range(4)]
    gaps = []
    for corrected in (True, False):
        options = {"granularity": "tensor", "bias_correction": corrected}
        made = dc.quantize(g.model(), feeds, **options)
        first, second = session(g.model()), session(made.SerializeToString())
        both = [second.run(None, f)[0] - first.run(None, f)[0] for f in feeds]
        gaps.append(float(np.abs(np.concatenate(both).mean(axis=(0, 1))).mean()))
    assert gaps[0] < gaps[1] / 2


def test_l2_ranges_gain(model: bytes, default: tuple[onnx.ModelProto, Report]) -> None:
    widest = dc.quantize(model, samples(), method="minmax")
    assert sqnr(model, default[0]) > sqnr(model, widest) + 0.2


def test_outliers_are_as_few_as_asked(model: bytes) -> None:
    reports: list[Report] = []
    dc.quantize(model, samples(), outliers=0.01, report=reports.append)
    dc.quantize(model, samples(), report=reports.append)
    few, many = ([row["outliers"] for row in r.layers] for r in reports)
    # at most 1 % of a filter: of filters with fewer than 100 weights none
    assert max(few) <= 0.01 and max(many) > 0.05


def test_facts_on_16_bit_accumulation() -> None:
    g = Graph(x=("float32", ["N", 64]))
    a = g("Relu", g("Gemm", "x", normal(64, 64, scale=0.1), normal(64)))
    g.out(g("Gemm", a, normal(64, 8, scale=0.1)))
    reports: list[Report] = []
    feeds = [{"x": normal(64, 64)} for _ in range(4)]
    made = dc.quantize(g.model(), feeds, outliers=0.01, acc16=True, report=reports.append)
    spills = reports[0].spills
    assert [*spills] == ["Gemm_0", "Gemm_2"]
    assert spills["Gemm_2"]["period"] >= 1
    assert spills["Gemm_2"]["largest"] * spills["Gemm_2"]["margin"] < 2**15
    targets = ["x86-64-v3"]
    exact, short = (
        dc.compile(made, targets=targets, accumulation=how).load()
        for how in ("exact", "calibrated")
    )
    np.testing.assert_array_equal(exact(feeds[0])[0], short(feeds[0])[0])


def test_selective_leaves_the_worst_layer_in_float() -> None:
    """One layer has weights that 8 bits a tensor cannot hold."""
    g = Graph(x=("float32", ["N", 16]))
    bad = normal(16, 16)
    bad[0, 0] = 500.0
    a = g("Relu", g("Gemm", "x", normal(16, 16), normal(16)))
    b = g("Relu", g("Gemm", a, bad, normal(16)))
    g.out(g("Gemm", b, normal(16, 4), normal(4)))
    feeds = [{"x": normal(32, 16)} for _ in range(4)]
    reports: list[Report] = []
    made = dc.quantize(
        g.model(),
        feeds,
        granularity="tensor",
        selective=True,
        max_drop=0.02,
        report=reports.append,
    )
    chosen = reports[0].selective
    assert chosen is not None and chosen["reached"] and chosen["excluded"][0] == "Gemm_2"
    rows = {row["node"]: row["precision"] for row in reports[0].layers}
    assert rows["Gemm_0"] == "int8" and rows["Gemm_2"] == "float32"
    assert sum(n.op_type == "QuantizeLinear" for n in made.graph.node) < 3


def test_a_drop_that_cannot_be_reached_keeps_the_best_model(model: bytes) -> None:
    with pytest.raises(dc.AccuracyError, match="1 - relative error") as caught:
        dc.quantize(model, samples(), selective=True, max_drop=0, metric=_shrinking())
    assert caught.value.code == "DC5001" and caught.value.exit_code == 5
    assert isinstance(caught.value.model, onnx.ModelProto)


def _shrinking() -> Any:
    """A metric that no model but the first reaches."""
    calls = iter(range(1000))

    def metric(outputs: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> float:
        return 1.0 - 0.01 * (next(calls) > 0)

    metric.__name__ = "1 - relative error"
    return metric


# ---- structure ----
def test_layers_that_share_weights_go_on_sharing_them() -> None:
    g = Graph(x=("float32", ["N", 8]))
    w, b = normal(8, 8, scale=0.3), normal(8)
    for name, value in (("w", w), ("b", b)):
        g.constants.append(onnx.numpy_helper.from_array(value, name))
    a = g("Tanh", g("Gemm", "x", "w", "b"))
    g.out(g("Gemm", a, "w", "b"))
    data = g.model()
    x = normal(16, 8)
    made = dc.quantize(data, [{"x": x}])
    assert sum(t.name.startswith("w_q") for t in made.graph.initializer) == 1
    want = session(made.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(Whole(made.SerializeToString())(x=x)[0], want, atol=1e-5)
    assert np.abs(want - session(data).run(None, {"x": x})[0]).max() < 0.1


def test_a_quantized_output_keeps_its_name() -> None:
    g = Graph(x=("float32", [1, 4, 5, 5]))
    a = g("Relu", g("Conv", "x", normal(4, 4, 1, 1)))
    g.out(a, g("Conv", a, normal(4, 4, 1, 1)))
    data = g.model()
    x = normal(1, 4, 5, 5)
    made = dc.quantize(data, [{"x": x}])
    assert [o.name for o in made.graph.output] == g.outputs
    want = session(data).run(None, {"x": x})
    for value, reference in zip(Whole(made.SerializeToString())(x=x), want, strict=True):
        assert np.abs(value - reference).max() < 0.2


def test_names_that_the_model_has_already() -> None:
    g = Graph(x_quantized=("float32", [1, 4, 5, 5]), x=("float32", [1, 4, 5, 5]))
    g.out(
        g("Conv", g("Add", "x", "x_quantized"), normal(4, 4, 1, 1)),
        g("Conv", "x", normal(4, 4, 1, 1)),
    )
    feeds = [{"x": normal(1, 4, 5, 5), "x_quantized": normal(1, 4, 5, 5)}]
    made = dc.quantize(g.model(), feeds)
    onnx.checker.check_model(made, full_check=True)
    session(made.SerializeToString()).run(None, feeds[0])


def test_old_opsets_are_raised() -> None:
    g = Graph(opset=11, x=("float32", [1, 4, 5, 5]))
    g.out(g("Conv", g("Relu", g("Conv", "x", normal(4, 4, 1, 1))), normal(4, 4, 1, 1)))
    made = dc.quantize(g.model(), [{"x": normal(1, 4, 5, 5)}])
    assert made.opset_import[0].version == 13
    session(made.SerializeToString()).run(None, {"x": normal(1, 4, 5, 5)})


def test_a_filter_of_zeros_and_a_dead_tensor() -> None:
    g = Graph(x=("float32", [1, 4, 5, 5]))
    w = normal(4, 4, 1, 1)
    w[1] = 0
    dead = g("Relu", g("Conv", "x", -np.abs(w), -np.full(4, 50, np.float32)))
    live = g("Relu", g("Conv", "x", w))
    g.out(g("Add", g("Conv", dead, normal(4, 4, 1, 1)), g("Conv", live, w)))
    reports: list[Report] = []
    x = normal(1, 4, 5, 5)
    made = dc.quantize(g.model(), [{"x": x}], report=reports.append)
    assert any(f"'{dead}' is 0 in all samples" in note for note in reports[0].notes)
    want = session(g.model()).run(None, {"x": x})[0]
    assert np.abs(Whole(made.SerializeToString())(x=x)[0] - want).max() < 0.2


# ---- weights ----
@pytest.mark.parametrize("granularity", weights.GRANULARITIES)
def test_scales_of_weights(granularity: str) -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    w = normal(8, 3, 3, 3) * np.exp(normal(8))[:, None, None, None]
    found = weights.quantize(node, w, granularity)
    assert len(np.unique(found.scale)) == {"channel": 8, "group": 2, "tensor": 1}[granularity]
    assert found.codes.shape == w.shape and np.abs(found.codes).max() <= 127
    # off by half a scale, but for what is clipped
    inside = np.abs(found.codes) < 127
    assert (np.abs(found.values() - w) <= 0.5001 * found.scale[:, None, None, None])[inside].all()


def test_best_scales_are_no_worse_than_the_widest() -> None:
    rows = np.concatenate([normal(50, 400), RNG.standard_t(3, (50, 400)).astype(np.float32)])
    widest = np.abs(rows).max(axis=1) / 127

    def errors(scale: np.ndarray) -> np.ndarray:
        values = weights.round_to(rows, scale) * scale[:, None]
        return np.asarray(np.square(values - rows).sum(axis=1))

    gain = errors(widest) / errors(weights.least_error_scales(rows))
    assert gain.min() >= 1


# ---- what is refused ----
def test_a_quantized_model_comes_back_as_it_is(default: tuple[onnx.ModelProto, Report]) -> None:
    reports: list[Report] = []
    again = dc.quantize(default[0], samples(), report=reports.append)
    assert again.SerializeToString() == default[0].SerializeToString()
    assert "quantized already" in reports[0].notes[0]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"method": "kl"}, "DC2040", "method 'kl'"),
        ({"granularity": "row"}, "DC2040", "granularity 'row'"),
        ({"activations": "static8"}, "DC2040", "activations 'static8'"),
        ({"max_drop": -1}, "DC2044", "max_drop -1"),
        ({"outliers": 2.0}, "DC2049", "outliers 2.0"),
        ({"metric": "no_such_module:f"}, "DC2042", "cannot be imported"),
        ({"metric": "numpy"}, "DC2042", "MODULE:FUNCTION"),
        ({"metric": "numpy:pi"}, "DC2042", "not a function"),
        ({"exclude": "Conv_99"}, "DC2046", "'Conv_99': the model has no such node"),
        ({"exclude": ["Conv*", "Gemm*"]}, "DC2046", "leaves no layer"),
        ({"calib": None}, "DC2045", "calib: none given"),
    ],
)
def test_wrong_options(model: bytes, options: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(errors.UsageError, match=says) as caught:
        dc.quantize(model, **{"calib": samples(4), **options})
    assert caught.value.code == code


def test_a_metric_that_raises_is_named(model: bytes) -> None:
    def accuracy(outputs: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> float:
        return float(data["labels"][0])

    with pytest.raises(errors.UsageError, match="'accuracy': raised KeyError: 'labels'") as caught:
        dc.quantize(model, samples(4), selective=True, metric=accuracy)
    assert caught.value.code == "DC2043"


def test_nothing_to_quantize() -> None:
    g = Graph(x=("float32", [1, 4]))
    g.out(g("Relu", "x"))
    with pytest.raises(errors.ModelError, match="no Conv, Gemm or MatMul") as caught:
        dc.quantize(g.model(), [{"x": normal(1, 4)}])
    assert caught.value.code == "DC3203"


@pytest.mark.parametrize("activations", ["dynamic", "dynamic-rows", "float"])
def test_without_samples_only_products_are_quantized(activations: str) -> None:
    g = Graph(x=("float32", [2, 4, 5, 5]))
    a = g("Flatten", g("Relu", g("Conv", "x", normal(4, 4, 1, 1))))
    g.out(g("Gemm", a, normal(100, 8, scale=0.1), normal(8)))
    reports: list[Report] = []
    made = dc.quantize(g.model(), activations=activations, report=reports.append)
    assert [row["precision"] for row in reports[0].layers] == ["float32", activations]
    x = normal(2, 4, 5, 5)
    want = session(g.model()).run(None, {"x": x})[0]
    got = Whole(made.SerializeToString())(x=x)[0]
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_without_samples_convolutions_alone_are_refused() -> None:
    g = Graph(x=("float32", [1, 4, 5, 5]))
    g.out(g("Conv", "x", normal(4, 4, 1, 1)))
    with pytest.raises(errors.ModelError, match="no Gemm or MatMul") as caught:
        dc.quantize(g.model(), activations="dynamic")
    assert caught.value.code == "DC3203"


def test_weights_that_are_not_finite() -> None:
    g = Graph(x=("float32", [1, 4]))
    w = normal(4, 4)
    w[1, 2] = np.nan
    g.out(g("Gemm", g("Relu", g("Gemm", "x", normal(4, 4))), w))
    with pytest.raises(errors.Error, match=r"NaN") as caught:
        dc.quantize(g.model(), [{"x": normal(1, 4)}])
    assert caught.value.code in ("DC3204", "DC2131")


# ---- the command ----
def dccompile(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dccompile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_command_line(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(model)
    np.savez(tmp_path / "calib.npz", x=np.concatenate([f["x"] for f in samples()]))
    done = dccompile("quantize", "net.onnx", "--calib", "calib.npz", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["schema"] == "dccompile.quantize/1" and body["samples"] == 24
    assert body["output"] == "net-int8.onnx"
    onnx.checker.check_model(tmp_path / "net-int8.onnx")


def test_command_line_names_a_folder_that_is_missing(tmp_path: Path) -> None:
    done = dccompile("quantize", "dlrm-mlp", "--calib", "random:1", "-o", "a/b.onnx", cwd=tmp_path)
    assert done.returncode == 2 and "there is no folder 'a'" in done.stderr


def test_command_line_of_a_missed_drop(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(model)
    np.savez(tmp_path / "calib.npz", x=np.concatenate([f["x"] for f in samples()]))
    (tmp_path / "score.py").write_text(
        "calls = iter(range(99))\n"
        "def score(outputs, data):\n"
        "    return 1 - 0.01 * (next(calls) > 0)\n"
    )
    options = ("--selective", "--metric", "score:score", "--max-drop", "0.001", "-o", "best.onnx")
    done = dccompile("quantize", "net.onnx", "--calib", "calib.npz", *options, cwd=tmp_path)
    assert done.returncode == 5 and "best.onnx" in done.stderr and "DC5001" in done.stderr
    onnx.checker.check_model(tmp_path / "best.onnx")


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"y": np.zeros((4, 3, 12, 12), np.float32)}, "DC2121"),
        ({"x": np.zeros((4, 3, 12, 11), np.float32)}, "DC2122"),
        ({"x": np.zeros((4, 3, 12, 12))}, "DC2122"),
        ({"x": np.full((4, 3, 12, 12), np.nan, np.float32)}, "DC2124"),
        ({"x": np.zeros((0, 3, 12, 12), np.float32)}, "DC2123"),
    ],
)
def test_bad_calibration_data(
    tmp_path: Path, model: bytes, arrays: dict[str, np.ndarray], code: str
) -> None:
    (tmp_path / "net.onnx").write_bytes(model)
    np.savez(tmp_path / "calib.npz", **arrays)
    done = dccompile("quantize", "net.onnx", "--calib", "calib.npz", cwd=tmp_path)
    assert done.returncode == 2 and code in done.stderr and "Traceback" not in done.stderr
    assert [*tmp_path.glob("*int8*")] == []


def test_bench_against_onnx_runtime(tmp_path: Path) -> None:
    done = dccompile("bench", "--quantize", "dlrm-mlp", "--samples", "4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["samples"] == 4 and row["steps"] < 1e-3
    assert 30 < row["ours"] < 80 and row["gain"] == pytest.approx(row["ours"] - row["best"])
    assert set(row["peer"]) == {"MinMax", "Percentile", "Entropy"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("bench", "--quantize", "resnet"), "no such float model"),
        (("bench", "dlrm-mlp", "--quantize", "dlrm-mlp"), "MODEL together with another"),
    ],
)
def test_bench_of_wrong_names(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    done = dccompile(*options, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr
