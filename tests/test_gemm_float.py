"""Every float GEMM kernel of the list against float64, over classes of shapes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
import pytest
from kernels import listed, load, marked
from memory import aligned, before_a_hole, tensor

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm

from dccompile import reference
from dccompile.workload import NUMPY, Gemm, GemmWeights

NAMES = listed("gemm_f32")
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 24, 25, 129)  # of calls with a symbolic m
EPSILON = 2.0**-24  # half the distance of 1 to the next f32
KERNELS = pytest.mark.parametrize("name", marked(NAMES))


class Case:
    """A workload with its weights, parameters and name in the compiled module."""

    def __init__(self, kernel, target, work, params=None):
        self.work = work
        self.params = kernel.default(work, target) if params is None else params
        self.seed = zlib.crc32(repr((work, self.params)).encode())
        rng = np.random.default_rng(self.seed)
        column = 2.0 ** rng.integers(-9, 2, work.n)
        b, scale = rng.normal(0, 1, (work.k, work.n)) * column, None
        if work.b == "s8":
            b, scale = rng.integers(-128, 128, b.shape), (column / 100).astype(np.float32)
        b = b.astype(NUMPY[work.b])
        if work.b == "f16":
            b[rng.random(b.shape) < 0.05] = 2.0**-24  # subnormal
        bias = None if work.bias == "none" else rng.normal(0, 1, work.n).astype(np.float32)
        self.weights = GemmWeights(b, scale, bias)
        self.symbol = f"f{self.seed:x}"
        self.function = kernel.build(work, self.params, target).with_attr(
            "global_symbol", self.symbol
        )
        self.kernel = kernel

    @cached_property
    def packed(self):
        return tensor(self.kernel.pack(self.work, self.weights, self.params))

    def wide(self):
        """The weights as numbers."""
        b = self.weights.b.astype(np.float64)
        return b if self.weights.scale is None else b * self.weights.scale

    def a(self, m):
        return np.random.default_rng(self.seed + m).normal(0, 1, (m, self.work.k)).astype("f4")

    def call(self, library, a, out):
        """C, in `out`, of A as an array or a tensor."""
        a = tensor(a) if isinstance(a, np.ndarray) else a
        library[self.symbol](a, self.packed, tvm.runtime.from_dlpack(out))

    def run(self, library, m=None):
        m = self.work.m or m
        a = self.a(m)
        out, _ = aligned((m, self.work.n), "f4")
        self.call(library, a, out)
        self.check(a, out)

    def check(self, a, out):
        """|error| <= (k + 2) eps (sum |a||b| + |bias|): Higham's bound for sums in any order.

        No activation steepens it; sigmoid and tanh add their own relative error.
        """
        bound = np.abs(a.astype(np.float64)) @ np.abs(self.wide())
        if self.weights.bias is not None:
            bound = bound + np.abs(self.weights.bias)
        expected = reference.gemm(self.work, self.weights, a).astype(np.float64)
        bound = (self.work.k + 2) * EPSILON * bound + 8 * EPSILON * np.abs(expected)
        error = np.abs(out - expected)
        what = f"{self.work} {self.params}: worst {np.max(error / (bound + 1e-38))} of the bound"
        assert (error <= bound).all(), what


def _compile(cases, target):
    functions = {case.symbol: case.function for case in cases}
    config = {"kind": "llvm", "mcpu": target.mcpu, "mattr": list(target.mattr)}
    return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(config))


# ---- shapes, epilogues, parameters ----
EPILOGUES = (
    {},
    {"bias": "f32"},
    {"bias": "f32", "activation": "relu"},
    {"activation": "relu"},
    {"bias": "f32", "activation": "clip", "clip": (-0.5, 6.0)},
    {"activation": "sigmoid"},
    {"bias": "f32", "activation": "tanh"},
)
CHEAP = EPILOGUES[:5]  # to compile
MODEL_SHAPES = [(10, 512, 512), (16, 256, 512), (1, 128, 2876), (102, 323, 256), (999, 8, 36)]
LONG = (128, 512, 700)  # enough work to be shared among threads


def _shapes(mr, columns):
    return {
        "one_tile": (mr, columns, 64),
        "tile_minus_1": (max(1, mr - 1), columns - 1, 63),
        "tile_plus_1": (mr + 1, columns + 1, 65),
        "many_tiles": (3 * mr + 2, 3 * columns + 5, 39),
        "one_row": (1, columns + 16, 32),
        **{f"k_is_{k}": (mr + 2, 23, k) for k in (1, 2, 3, 7)},
        "n_is_1": (9, 1, 33),
        "n_is_7": (9, 7, 18),
        "n_is_8": (21, 8, 36),
        "n_is_16": (11, 16, 12),
        "n_is_24": (4, 24, 256),
        "symbolic": (None, columns + 9, 30),
        "symbolic_one_column": (None, 1, 64),
        "symbolic_threads": (None, 2 * columns, 1600),
        "symbolic_always_threads": (None, 1024, 1536),
        "threads": LONG,
        "threads_and_tails": (131, 4 * columns + 3, 1100),
        **{"model_{}x{}x{}".format(*s): s for s in MODEL_SHAPES},
    }


@lru_cache(maxsize=len(NAMES))
def _shape_cases(name):
    kernel, target = load(name)
    probe = kernel.default(Gemm(64, 512, 512, "f32", kernel.weights, "f32"), target)
    cases = {}
    for i, (label, shape) in enumerate(_shapes(probe.mr, probe.nr * probe.lanes).items()):
        plain = Gemm(*shape, "f32", kernel.weights, "f32")
        cases[label] = Case(kernel, target, replace(plain, **CHEAP[i % len(CHEAP)]))
    library = _compile(cases.values(), target)
    return library, cases


@KERNELS
@pytest.mark.parametrize("label", _shapes(2, 32))
def test_shape(name, label):
    library, cases = _shape_cases(name)
    case = cases[label]
    for m in (None,) if case.work.m else ROW_COUNTS:
        case.run(library, m)


@KERNELS
def test_params(name):
    """A fourth of the points of the space, among them every value of every parameter."""
    kernel, target = load(name)
    work = Gemm(13, 75, 9, "f32", kernel.weights, "f32", bias="f32")
    points = list(kernel.candidates(target))
    chosen = points[::4] + points[-1:]
    for field, values in kernel.SPACE.items():
        missing = set(values) - {getattr(params, field) for params in chosen}
        chosen += [next(q for q in points if getattr(q, field) == value) for value in missing]
    cases = [Case(kernel, target, work, params) for params in dict.fromkeys(chosen)]
    library = _compile(cases, target)
    for case in cases:
        case.run(library)


@KERNELS
def test_activations(name):
    kernel, target = load(name)
    plain = Gemm(11, 43, 19, "f32", kernel.weights, "f32")
    small = replace(kernel.default(plain, target), mr=4, nr=1)
    cases = [Case(kernel, target, replace(plain, **e), small) for e in EPILOGUES]
    library = _compile(cases, target)
    for case in cases:
        case.run(library)


@KERNELS
def test_default_is_a_candidate(name):
    kernel, target = load(name)
    for shape in (*_shapes(6, 64).values(), (1, 1, 1), (None, 4096, 8192), (156800, 8, 36)):
        params = kernel.default(Gemm(*shape, "f32", kernel.weights, "f32"), target)
        assert params in set(kernel.candidates(target))


# ---- NaN, infinities ----
@KERNELS
def test_special_values(name):
    """A NaN survives every activation, infinities meet the activations' limits."""
    kernel, target = load(name)
    small = replace(
        kernel.default(Gemm(7, 21, 3, "f32", kernel.weights, "f32"), target), mr=4, nr=1
    )
    specials = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, -0.0, 1e-45], np.float32)
    cases = []
    for epilogue in EPILOGUES:
        work = Gemm(len(specials), 21, 3, "f32", kernel.weights, "f32", **epilogue)
        cases.append(Case(kernel, target, work, small))
    library = _compile(cases, target)
    for case in cases:
        case.weights.b[...] = np.arange(3 * 21).reshape(3, 21) % 5 - 2
        if case.weights.scale is not None:
            case.weights.scale[...] = 1
        if case.weights.bias is not None:
            case.weights.bias[...] = 0
        a = np.ones((len(specials), 3), np.float32)
        a[:, 1] = specials
        out, _ = aligned((len(specials), 21), "f4")
        case.call(library, a, out)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = reference.gemm(case.work, case.weights, a)
        np.testing.assert_allclose(out, expected, rtol=1e-6, err_msg=str(case.work))
        assert np.isnan(out[0]).all()


@pytest.mark.parametrize("name", marked([n for n in NAMES if "f32s8" not in n]))
def test_special_weights(name):
    """Infinite and NaN weights reach their own column only, not those padded or beside it."""
    kernel, target = load(name)
    case = Case(kernel, target, Gemm(5, 19, 4, "f32", kernel.weights, "f32", activation="relu"))
    case.weights.b[1, 3], case.weights.b[2, 18] = np.inf, np.nan
    a = np.abs(case.a(5))
    out, _ = aligned((5, 19), "f4")
    case.call(_compile([case], target), a, out)
    assert np.isinf(out[:, 3]).all() and np.isnan(out[:, 18]).all()
    rest = np.delete(np.arange(19), [3, 18])
    assert np.isfinite(out[:, rest]).all()


@KERNELS
def test_like_onnxruntime(name):
    """MatMul + Add + Relu and Clip of NaN, infinities and numbers, as ONNX Runtime has them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx").helper
    kernel, target = load(name)
    for epilogue in (EPILOGUES[2], EPILOGUES[4]):
        case = Case(kernel, target, Gemm(8, 20, 6, "f32", kernel.weights, "f32", **epilogue))
        b, bias = case.wide().astype(np.float32), case.weights.bias
        bounds = [np.array(x, np.float32) for x in case.work.clip or ()]
        constants = {"b": b, "bias": bias, **dict(zip(("low", "high"), bounds, strict=False))}
        nodes = [
            helper.make_node("MatMul", ["a", "b"], ["ab"]),
            helper.make_node("Add", ["ab", "bias"], ["y"]),
            helper.make_node("Clip", ["y", "low", "high"], ["c"])
            if bounds
            else helper.make_node("Relu", ["y"], ["c"]),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("a", 1, [8, 6])],
            [helper.make_tensor_value_info("c", 1, [8, 20])],
            [helper.make_tensor(k, 1, v.shape, v.reshape(-1)) for k, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        a = case.a(8)
        a[0, 0], a[1, 1], a[2, 2], a[3] = np.nan, np.inf, -np.inf, [np.inf, -np.inf, 0, 0, 1, 1]
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        expected = session.run(None, {"a": a})[0]
        out, _ = aligned((8, 20), "f4")
        case.call(_compile([case], target), a, out)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5, err_msg=str(epilogue))


# ---- memory ----
@KERNELS
def test_memory_bounds(name):
    """Nothing past A is read (that would be a segmentation fault), nothing around C is written."""
    kernel, target = load(name)
    shapes = [(16, n, k) for n, k in ((1, 1), (5, 2), (9, 3), (21, 5), (45, 33), (67, 39))]
    shapes += [(1, 19, 64), (None, 19, 13)]
    cases = [
        Case(kernel, target, Gemm(*shape, "f32", kernel.weights, "f32", **CHEAP[i % len(CHEAP)]))
        for i, shape in enumerate(shapes)
    ]
    library = _compile(cases, target)
    for case in cases:
        m = case.work.m or 16
        values = case.a(m)
        a, region = before_a_hole(values)
        out, raw = aligned((m, case.work.n), "f4", guard=256)
        case.call(library, a, out)
        case.check(values, out)
        out[...] = np.full(out.nbytes, 0x5A, np.uint8).view("f4").reshape(out.shape)
        assert (raw == 0x5A).all(), f"{case.work}: bytes around C were written"
        del a, region


@KERNELS
def test_refuses(name):
    kernel, _ = load(name)
    work = Gemm(4, 16, 16, "f32", kernel.weights, "f32")
    assert kernel.refuses(work) is None
    assert kernel.refuses(replace(work, m=None, bias="f32", activation="tanh")) is None
    for other in {"f32", "f16", "s8"} - {kernel.weights}:
        assert kernel.refuses(replace(work, b=other)) is not None
    assert kernel.refuses(replace(work, a="u8", b="s8", out="u8")) is not None
