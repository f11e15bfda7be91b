"""Generic functions on an emulated GPU against ONNX Runtime: NaN, odd sizes, open dims, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
import onnx_cases
from gpu_graphs import A100, Graph, compare
from onnx_cases import Case, special
from tvm import ir, relax, tirx

import dccompile as dc
from dccompile import models, pipeline, registry
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.frontend import convert
from dccompile.generic import legalize
from dccompile.machine import GPUS, TARGETS
from dccompile.runtime import device as runtime_device
from dccompile.runtime import driver

onnx_cases.CODES.setdefault(np.dtype("float16"), TensorProto.FLOAT16)
ORDERS = ("forward", "reverse", "random")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng().standard_normal(shape).astype(np.float32)


# Elementwise


def test_pointwise() -> None:
    """NaN and infinities, sizes that are no multiple of a vector, an open batch."""
    x = special(rng(), 5, 33)
    case = Case(x=x)
    for op in ("Relu", "Sigmoid", "Exp", "Tanh", "Erf", "Round", "Sqrt", "Softplus"):
        case.add(op, "x")
    case.add("Clip", "x", np.float32(-1), np.float32(2))
    case.add("Max", "x", special(rng(), 33)[::-1].copy()).add("Min", "x", special(rng(), 1, 1))
    others = [{"x": special(rng(), n, 33)} for n in (1, 4, 40)]
    compare(case, others=others)


def test_rounding_to_codes() -> None:
    odd = [0.5, 1.5, 2.5, -0.5, -1.5, np.nan, np.inf, -np.inf, 3e9, -3e9, 1e20, 0.49999997]
    x = np.concatenate([np.float32(odd), special(rng(), 52)])[None]
    case = Case(x=x).add("QuantizeLinear", "x", np.float32(0.5), np.uint8(3))
    case.add("QuantizeLinear", "x", np.float32(1), np.int8(-1)).add("Round", "x")
    compare(case, symbolic=False)


def test_halves() -> None:
    x = special(rng(), 4, 40).astype(np.float16)
    case = Case(x=x)
    for op in ("Exp", "Relu", "Softmax"):
        case.add(op, "x")
    case.add("Add", "x", x[:1]).add("ReduceMax", "x", [1]).add("Max", "x", x[1:2])
    case.add("Cast", "x", to=TensorProto.FLOAT).add("ReduceMean", "x", [0])
    compare(case, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["uint8", "int64", "bool"])
def test_moves(kind: str) -> None:
    x = (normal(3, 19, 35) * 50).astype(np.int64).astype(kind)
    case = Case(x=x).add("Transpose", "x", perm=[0, 2, 1]).add("Concat", "x", "x", axis=2)
    case.add("Tile", "x", np.array([1, 2, 3])).add("Gather", "x", np.array([3, 1]), axis=2)
    compare(case, others=[{"x": x[:1]}])


def test_look_ups_side_by_side() -> None:
    """Tables of codes, concatenated: 8 codes with one access where these stay aligned."""
    codes = rng().integers(0, 256, (2, 3, 40)).astype(np.uint8)
    nodes, parts = [], []
    for i, op in enumerate(("Sigmoid", "Tanh")):
        scale, zero = [f"s{i}", "z"], [f"t{i}", "z"]
        nodes.append(helper.make_node("DequantizeLinear", [f"x{i}", *scale], [f"a{i}"]))
        nodes.append(helper.make_node(op, [f"a{i}"], [f"b{i}"]))
        nodes.append(helper.make_node("QuantizeLinear", [f"b{i}", *zero], [f"c{i}"]))
        parts.append(f"c{i}")
    nodes.append(helper.make_node("Concat", parts, ["y"], axis=2))
    values = {"s0": 0.05, "s1": 0.1, "t0": 0.004, "t1": 0.008}
    constants = [numpy_helper.from_array(np.float32(v), n) for n, v in values.items()]
    constants.append(numpy_helper.from_array(np.uint8(100), "z"))
    value = helper.make_tensor_value_info
    inputs = [value(f"x{i}", TensorProto.UINT8, ["N", 3, w]) for i, w in enumerate((24, 40))]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", 2, ["N", 3, 64])], constants)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feeds = {"x0": codes[:, :, :24].copy(), "x1": codes}
    lowered = Graph(model)
    (got,) = lowered.run(*feeds.values())
    session = onnx_cases.onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_array_equal(got, session.run(None, feeds)[0])
    assert len(lowered.names()) == 1


# Reductions


@pytest.mark.parametrize("n", [1, 31, 32, 1000, 100_000])
def test_reductions(n: int) -> None:
    x = normal(1 if n > 5000 else 3, n)
    case = Case(x=x)
    for op in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean"):
        case.add(op, "x", [1])
    case.add("Softmax", "x", axis=1).add("ArgMax", "x", axis=1).add("ReduceSum", "x", [0])
    compare(case, rtol=2e-4, atol=2e-4, others=[{"x": x[:1]}])


@pytest.mark.parametrize("order", ORDERS)
def test_reductions_of_nan(order: str) -> None:
    x = special(rng(), 3, 1000)
    case = Case(x=x).add("ReduceMax", "x", [1]).add("ReduceMin", "x", [0]).add("Softmax", "x")
    case.add("ReduceMin", "x")  # in two steps
    compare(case, order=order)


def test_images() -> None:
    x = normal(2, 16, 20, 24)
    case = Case(x=x).add("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    case.add("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    case.add("GlobalAveragePool", "x").add("Transpose", "x", perm=[0, 2, 3, 1])
    case.add("InstanceNormalization", "x", normal(16), normal(16))
    case.add("Pad", "x", np.array([0, 0, 1, 2, 0, 0, 3, 0]), np.float32(7))
    case.add("Resize", "x", "", np.float32([1, 1, 2, 1.5]), mode="linear")
    case.add("LayerNormalization", "x", normal(24)).add("MatMul", "x", normal(2, 16, 24, 5))
    compare(case, rtol=1e-4, atol=1e-5, symbolic=False)


def test_open_sizes() -> None:
    """A batch of 1 and more through kernels in rows, tiles and columns."""
    x = normal(5, 7, 33)
    case = Case(x=x).add("ReduceMean", "x", [2]).add("ReduceMax", "x", [0])
    case.add("Softmax", "x", axis=1).add("Transpose", "x", perm=[2, 0, 1])
    case.add("LayerNormalization", "x", normal(33))
    compare(case, others=[{"x": normal(n, 7, 33)} for n in (1, 32)], rtol=1e-4, atol=1e-5)


def test_tensors_between_kernels() -> None:
    """What a function needs for itself comes from the caller: more outputs."""
    case = Case(x=normal(1, 70_000)).add("LogSoftmax", "x", axis=1)
    graph = compare(case, symbolic=False, rtol=1e-4, atol=1e-4)
    values = [b.value for block in graph.mod["main"].body.blocks for b in block.bindings]
    types = [v.ty_args[0] for v in values if isinstance(v, relax.Call)]
    assert any(isinstance(t, relax.TupleType) for t in types)
    for func in graph.mod.functions.values():
        assert not isinstance(func, tirx.PrimFunc) or "alloc_buffer" not in str(func)


# Indices and errors


def test_indices() -> None:
    d = normal(7, 12)
    at = np.array([[0, -1, 6], [3, -7, 2]], np.int64)
    pairs = np.array([[5, 1], [-1, -12]], np.int64)
    case = Case(d=d, i=at, j=pairs).add("Gather", "d", "i").add("GatherND", "d", "j")
    case.add("GatherElements", "d", "i", axis=0)
    model = case.model(False)
    compare(case, symbolic=False)
    graph = Graph(model)
    bad = at.copy()
    bad[0, 2] = 7
    with pytest.raises(ValueError, match="DC2110: Gather 'Gather_0': an index is outside 7 rows"):
        graph.run(d, bad, pairs)
    with pytest.raises(ValueError, match="DC2110: GatherND 'GatherND_1'"):
        graph.run(d, at, np.array([[5, 1], [-8, 0]], np.int64))


def test_division() -> None:
    a = rng().integers(-50, 50, (3, 1, 8)).astype(np.int32)
    b = rng().integers(1, 9, (4, 8)).astype(np.int32) * np.int32([[-1], [1], [1], [-1]])
    case = Case(a=a, b=b).add("Div", "a", "b").add("Mod", "a", "b").add("Mod", "a", "b", fmod=1)
    graph = compare(case, symbolic=False)
    b[0, 0] = 0
    with pytest.raises(ValueError, match="DC2111: Div 'Div_0': integer division by zero"):
        graph.run(a, b)


def test_scatter() -> None:
    x = special(rng(), 6, 50)
    at = rng().integers(0, 50, (6, 9))
    case = Case(x=x, i=at, u=normal(6, 9), v=normal(4, 50))
    case.add("ScatterElements", "x", "i", "u", axis=1, reduction="add")
    case.add("ScatterElements", "x", at % 6, "u", axis=0, reduction="max")
    case.add("ScatterND", "x", np.array([[1], [3], [1], [5]]), "v", reduction="add")
    compare(case, symbolic=False)


def test_loops_that_are_no_nest() -> None:
    """A scatter as TVM writes it: statements become kernels, serial ones of one thread."""
    builder = relax.BlockBuilder()
    ty = [relax.TensorType(s, t) for s, t in (((6, 50), "float32"), ((6, 9), "int64"))]
    x, at = relax.Var("x", ty[0]), relax.Var("at", ty[1])
    u = relax.Var("u", relax.TensorType((6, 9), "float32"))
    with builder.function("main", [x, at, u]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.scatter_elements(x, at, u, axis=1))
        builder.emit_func_output(y)
    graph = Graph.__new__(Graph)
    graph.mod, graph.left = legalize.fuse(builder.get(), A100)
    graph.bounds, graph.outputs = {}, 1
    assert list(graph.left) == ["scatter_elements"]
    values, places, updates = normal(6, 50), np.argsort(normal(6, 50))[:, :9], normal(6, 9)
    want = values.copy()
    np.put_along_axis(want, places, updates, 1)
    (got,) = graph.run(values, np.ascontiguousarray(places), updates)
    np.testing.assert_array_equal(got, want)


# Orders and counts


@pytest.mark.parametrize("order", ORDERS)
def test_topk(order: str) -> None:
    """Ties, NaN, both zeros; k of every size."""
    x = rng().integers(-3, 4, (3, 700)).astype(np.float32)
    x[0, :7] = [np.nan, np.inf, -np.inf, 0, -0.0, np.nan, 1]
    case = Case(x=x)
    for k, largest in ((5, 1), (300, 0), (700, 1)):
        case.add("TopK", "x", np.array([k]), outputs=2, axis=1, largest=largest)
    compare(case, others=[{"x": x[:1]}], order=order)


def test_running_sums() -> None:
    x = rng().integers(-9, 9, (3, 40, 5))
    case = Case(x=x).add("CumSum", "x", np.array(1))
    case.add("CumSum", "x", np.array(2), exclusive=1, reverse=1)
    compare(case)


def boxes(batches: int, count: int) -> np.ndarray:
    corner, size = rng().uniform(0, 10, (batches, count, 2)), rng().uniform(1, 4, (1, count, 2))
    return np.concatenate([corner, corner + size], 2).astype(np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nan", [False, True])
def test_suppression(nan: bool, order: str) -> None:
    """Equal scores, and NaN, whose order is that of a heap's steps."""
    scores = normal(2, 3, 300).round(1)
    if nan:
        scores[0, 1, 5] = scores[1, 2, 7:9] = np.nan
    case = Case(b=boxes(2, 300), s=scores)
    case.add("NonMaxSuppression", "b", "s", np.array([20]), np.float32([0.4]))
    most, limits = np.array([7]), (np.float32([0.3]), np.float32([0.1]))
    case.add("NonMaxSuppression", "b", "s", most, *limits, center_point_box=1)
    compare(case, symbolic=False, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_places(order: str) -> None:
    x = rng().integers(0, 2, (3, 5, 200)).astype(np.float32)
    x[0, 0, 1] = np.nan
    case = Case(x=x, f=np.array([1, 0, 1, 1, 0], bool)).add("NonZero", "x")
    compare(case.add("Compress", "x", "f", axis=1), symbolic=False, order=order)
    compare(Case(x=np.zeros((3, 4), np.float32)).add("NonZero", "x"), order=order)


@pytest.mark.parametrize("more", [{}, {"mode": "max"}, {"sampling_ratio": 2}], ids=str)
def test_boxes(more: dict[str, Any]) -> None:
    x = normal(2, 20, 13, 9)
    rois = np.float32([[0, 0, 5, 7], [1, 2, 3, 4], [-3, -2, 20, 40], [5, 5, 5, 5]])
    case = Case(x=x, r=rois, b=np.array([0, 1, 1, 0]))
    case.add("RoiAlign", "x", "r", "b", output_height=3, output_width=4, **more)
    graph = compare(case, symbolic=False, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="DC2110: RoiAlign 'RoiAlign_0': a batch index"):
        graph.run(x, rois, np.array([0, 2, 1, 0]))
    if not more:
        with pytest.raises(ValueError, match="DC2114: RoiAlign 'RoiAlign_0': a box asks"):
            graph.run(x, rois * np.float32(1e6), np.array([0, 1, 1, 0]))


def test_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that kernels compute, and an error that one finds, through the driver."""
    toolkit = emulate.toolkit(tmp_path)
    toolkit.patch(monkeypatch, late=1, check=1)
    monkeypatch.setattr(driver, "_driver", None)
    monkeypatch.setattr(runtime_device, "_devices", {})
    monkeypatch.setattr(driver, "LIBRARY", str(toolkit.libcuda))
    x = np.maximum(normal(2, 40), 0)
    case = Case(x=x, i=np.array([1, 2])).add("NonZero", "x").add("Gather", "x", "i", axis=1)
    model = case.model()
    dc.compile(model, targets=[A100.name]).save(tmp_path / "m.dcc")
    module = dc.load(tmp_path / "m.dcc", device="cuda")
    places, rows = module(x, case.feeds["i"])
    np.testing.assert_array_equal(places, np.nonzero(x))
    np.testing.assert_array_equal(rows, x[:, [1, 2]])
    with pytest.raises(dc.InputError, match="an index is outside 40 rows"):
        module(x, np.array([1, 40]))


# Machine code


def compiler() -> toolchain.Compiler:
    try:
        return toolchain.find()
    except Error as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["dlrm-clicks-int8", "mobilenet-v2-int8", "shufflenet-frcnn-int8"])
def test_reference_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every generic function is kernels that compile, without memory of their own."""
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    made = compiler()
    kernel = registry.select  # only stubs of hand-written kernels are in the module
    monkeypatch.setattr(registry, "select", lambda w, m, t: kernel(w, TARGETS["x86-64-v3"]))
    front = pipeline.front(models.export(name).SerializeToString(), None, "high")
    imported = convert.to_relax(front.recovered, A100, front.graph.symbols)
    mod, left = legalize.fuse(imported.mod, A100)
    assert not left
    for func in mod.functions.values():
        if _generic(func):
            for arch in ("sm_80", "sm_90"):
                split = device.split({"k": func}, GPUS[f"cuda:{arch}"])
                code = made.compile(split.source, arch)
                assert split.kernels and b"local_depot" not in code.ptx


def _generic(func: ir.BaseFunc) -> bool:
    attrs = dict(func.attrs or {}) if isinstance(func, tirx.PrimFunc) else {}
    return "dcc.kernel" in attrs and "dcc.digest" not in attrs


def test_vectors() -> None:
    """Contiguous work goes in accesses of 16 bytes."""
    value = helper.make_tensor_value_info
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value("x", 1, ["N", 64])], [value("y", 1, ["N", 64])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    (func,) = (f for f in Graph(model).mod.functions.values() if isinstance(f, tirx.PrimFunc))
    source = device.split({"k": func}, A100).source
    assert "dcc_take16(" in source and "dcc_put16(" in source.split("__global__")[-1]
