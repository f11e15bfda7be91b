"""Every float GEMM kernel for CUDA, run by the emulator, against float64."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest
from kernels import listed_cuda, load_cuda

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate

from dccompile import reference
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS
from dccompile.workload import NUMPY, Gemm, GemmWeights

NAMES = listed_cuda("gemm_f32")
KERNELS = pytest.mark.parametrize("name", NAMES)
A100, H100 = GPUS["cuda:sm_80"], GPUS["cuda:sm_90"]
EPSILON = 2.0**-24  # half the distance of 1 to the next f32
SMALL = {  # the smallest block of each kind of tile, 16 or 8 of columns for few rows
    "f32": (1, 1, 4, 4, 16, 1, 8, 8),
    "s8": (1, 1, 4, 4, 16, 1, 8, 16),
    "f16": (1, 1, 1, 1, 16, 2, 8, 16),
}


class Case:
    """A workload on a kernel, with its weights and parameters."""

    def __init__(self, name, shape, params=None, machine=A100, **more):
        self.kernel, self.machine = load_cuda(name), machine
        self.work = Gemm(*shape, "f32", self.kernel.weights, "f32", **more)
        chosen = self.kernel.default(self.work, machine) if params is None else params
        self.params = self.kernel.Params(*chosen) if isinstance(chosen, tuple) else chosen
        self.seed = zlib.crc32(repr((self.work, self.params)).encode())
        rng = np.random.default_rng(self.seed)
        work = self.work
        column = 2.0 ** rng.integers(-9, 2, work.n)
        b, scale = rng.normal(0, 1, (work.k, work.n)) * column, None
        if work.b == "s8":
            b, scale = rng.integers(-128, 128, b.shape), (column / 100).astype(np.float32)
        b = b.astype(NUMPY[work.b])
        if work.b == "f16":
            b[rng.random(b.shape) < 0.05] = 2.0**-24  # subnormal
        bias = None if work.bias == "none" else rng.normal(0, 1, work.n).astype(np.float32)
        self.weights = GemmWeights(b, scale, bias)

    def a(self, m):
        return np.random.default_rng(self.seed + m).normal(0, 1, (m, self.work.k)).astype("f4")

    def call(self, a, **options):
        """C of A, from memory that is checked."""
        out = np.full((len(a), self.work.n), np.nan, np.float32)
        function = self.kernel.build(self.work, self.params, self.machine)
        packed = self.kernel.pack(self.work, self.weights, self.params)
        assert emulate.run(function, [a, packed, out], self.machine, **options) is None
        return out

    def run(self, m=None, **options):
        a = self.a(m if self.work.m is None else self.work.m)
        self.check(a, self.call(a, **options))

    def check(self, a, out):
        """|error| <= (k + 2) eps (sum |a||b| + |bias|): Higham's bound for sums in any order.

        Sums of products with a split A stay within it too: the split leaves 2 eps |a||b|.
        """
        wide = np.abs(self.weights.b.astype(np.float64))
        if self.weights.scale is not None:
            wide = wide * self.weights.scale
        bound = np.abs(a.astype(np.float64)) @ wide
        if self.weights.bias is not None:
            bound = bound + np.abs(self.weights.bias)
        expected = reference.gemm(self.work, self.weights, a).astype(np.float64)
        bound = (self.work.k + 2) * EPSILON * bound + 8 * EPSILON * np.abs(expected)
        error = np.abs(out - expected)
        worst = np.max(error / (bound + 1e-38), initial=0.0)
        assert (error <= bound).all(), f"{self.work} {self.params}: worst {worst} of the bound"


EPILOGUES = (
    {},
    {"bias": "f32"},
    {"bias": "f32", "activation": "relu"},
    {"activation": "relu"},
    {"bias": "f32", "activation": "clip", "clip": (-0.5, 6.0)},
    {"activation": "sigmoid"},
    {"bias": "f32", "activation": "tanh"},
)

# ---- shapes; blocks of the smallest kind have 16 rows, 16 (f16) or 32 columns ----
SHAPES = {
    "one_tile": (16, 32, 64),
    "tile_minus_1": (15, 31, 63),
    "tile_plus_1": (17, 33, 65),
    "many_tiles": (50, 101, 39),
    "one_row": (1, 48, 32),
    "few_rows": (8, 40, 100),
    "few_rows_odd": (5, 37, 259),
    "one_row_long": (1, 9, 2051),
    **{f"k_is_{k}": (18, 23, k) for k in (1, 2, 3, 7)},
    **{f"k_is_{k}_few": (3, 23, k) for k in (1, 5)},
    "n_is_1": (9, 1, 33),
    "n_is_7": (9, 7, 18),
    "n_is_8": (21, 8, 36),
    "n_is_24": (4, 24, 256),
    "model_10x512x512": (10, 128, 512),
    "model_1x128x2876": (1, 128, 2876),
    "model_102x323x256": (102, 67, 256),
    "model_999x8x36": (299, 8, 36),
}


@KERNELS
@pytest.mark.parametrize("label", SHAPES)
def test_shape(name, label):
    """Each with another epilogue, by blocks of the smallest kind, which meet all of their ends."""
    index = list(SHAPES).index(label)
    small = SMALL[load_cuda(name).weights]
    Case(name, SHAPES[label], small, **EPILOGUES[index % len(EPILOGUES)]).run()


@KERNELS
def test_shape_by_default(name):
    for machine, shape in ((A100, (37, 70, 39)), (H100, (130, 68, 100)), (H100, (9, 300, 64))):
        Case(name, shape, machine=machine, bias="f32").run()


@KERNELS
def test_open_rows(name):
    """Few rows, more, and none at all, by one function."""
    for shape, params in (((None, 41, 30), SMALL[load_cuda(name).weights]), ((None, 24, 64), None)):
        case = Case(name, shape, params, bias="f32")
        for m in (0, 1, 2, 4, 5, 8, 9, 33, 192, 193):
            case.run(m)


PARAMS = {
    "f32": (
        {"wm": 4, "wn": 2, "tm": 8, "tn": 8},
        {"wm": 2, "wn": 1, "tm": 8, "tn": 4, "slices": 2},
        {"wm": 1, "wn": 2, "tm": 4, "tn": 8, "bk": 32, "slices": 4},
    ),
    "f16": (
        {"fm": 4, "fn": 2, "bk": 32, "stages": 2},
        {"wm": 4, "wn": 1, "fm": 1, "fn": 4, "stages": 4},
        {"wm": 1, "wn": 4, "fm": 2, "fn": 1, "bk": 32, "stages": 3},
    ),
}
PARAMS["s8"] = PARAMS["f32"]


@KERNELS
@pytest.mark.parametrize("index", range(3))
def test_params(name, index):
    """Blocks of every form, in other orders of their threads; steps of k more than stages."""
    kernel = load_cuda(name)
    params = kernel.Params(**PARAMS[kernel.weights][index])
    assert kernel.fits(params)
    for k, order in ((132, "reverse"), (67, "random")):
        Case(name, (61, 75, k), params, bias="f32").run(order=order)


@KERNELS
@pytest.mark.parametrize("columns", (8, 16, 32, 64))
def test_columns_of_few_rows(name, columns):
    kernel = load_cuda(name)
    if columns not in kernel.SPACE["columns"]:
        pytest.skip(f"{name} has blocks of {kernel.SPACE['columns']} columns")
    wide = {"wn": 2} if kernel.weights != "f16" else {}
    for m in (1, 16):
        params = kernel.Params(few=16, columns=columns, **wide)
        Case(name, (m, 2 * columns + 5, 300), params, bias="f32").run(order="random")


@KERNELS
@pytest.mark.parametrize("m", (3, 11))
def test_activations(name, m):
    for epilogue in EPILOGUES[m % 2 :: 2]:
        Case(name, (m, 43, 19), SMALL[load_cuda(name).weights], **epilogue).run()


# ---- NaN, infinities ----
SPECIALS = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, -0.0, 1e-45], np.float32)


@KERNELS
@pytest.mark.parametrize("few", (8, 0))
def test_special_values(name, few):
    """A NaN survives every activation, infinities meet the activations' limits."""
    small = load_cuda(name).Params(*SMALL[load_cuda(name).weights])
    for epilogue in EPILOGUES[3:5] if few else EPILOGUES[5:]:
        case = Case(name, (len(SPECIALS), 21, 3), replace(small, few=few), **epilogue)
        case.weights.b[...] = np.arange(3 * 21).reshape(3, 21) % 5 - 2
        if case.weights.scale is not None:
            case.weights.scale[...] = 1
        if case.weights.bias is not None:
            case.weights.bias[...] = 0
        a = np.ones((len(SPECIALS), 3), np.float32)
        a[:, 1] = SPECIALS
        out = case.call(a)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = reference.gemm(case.work, case.weights, a)
        np.testing.assert_allclose(out, expected, rtol=1e-6, err_msg=str(case.work))
        assert np.isnan(out[0]).all()


@pytest.mark.parametrize("name", [n for n in NAMES if "f32s8" not in n])
@pytest.mark.parametrize("few", (8, 0))
def test_special_weights(name, few):
    """Infinite and NaN weights reach their own column only, not those padded or beside it."""
    small = load_cuda(name).Params(*SMALL[load_cuda(name).weights])
    case = Case(name, (5, 19, 4), replace(small, few=few), activation="relu")
    case.weights.b[1, 3], case.weights.b[2, 18] = np.inf, np.nan
    a = np.abs(case.a(5))
    a[0, 1], a[1, 1] = 1, 1 + 2.0**-12  # without a low half, and with a negative one
    out = case.call(a)
    assert np.isinf(out[:, 3]).all() and np.isnan(out[:, 18]).all()
    rest = np.delete(np.arange(19), [3, 18])
    assert np.isfinite(out[:, rest]).all()


def test_largest_numbers_of_a_split_stay_finite():
    """2**128 - 2**104, which 11 bits would round to infinity, and numbers near it."""
    case = Case("gemm_f32f16f32_mma", (16, 16, 8), SMALL["f16"])
    case.weights.b[...] = 0
    case.weights.b[0] = 2.0**-14
    a = np.zeros((16, 8), np.float32)
    a[:, 0] = np.nextafter(np.float32(np.inf), np.float32(0)) * (1 - np.arange(16) / 2**14)
    expected = a[:, :1].astype(np.float64) * 2.0**-14
    assert np.abs(case.call(a) / expected - 1).max() < 2.0**-19


def test_split_is_accurate_to_a_unit_in_the_last_place():
    """One product: no sum hides what the split of A leaves."""
    case = Case("gemm_f32f16f32_mma", (512, 16, 1), SMALL["f16"])
    case.weights.b[...] = np.linspace(1, 2, 16, dtype=np.float16)
    a = np.random.default_rng(5).uniform(1, 2, (512, 1)).astype("f4")
    a[:8, 0] = 1 + np.arange(8) * 2.0**-23
    exact = a.astype(np.float64) * case.weights.b.astype(np.float64)
    assert (np.abs(case.call(a) - exact) / exact).max() <= 2.0**-23 + 2.0**-24


# ---- the contract ----
@KERNELS
def test_default_is_a_candidate(name):
    kernel = load_cuda(name)
    for machine in (A100, H100):
        every = set(kernel.candidates(machine))
        for shape in (*SHAPES.values(), (1, 1, 1), (None, 4096, 8192), (156800, 8, 36)):
            work = Gemm(*shape, "f32", kernel.weights, "f32")
            assert kernel.default(work, machine) in every
        work = Gemm(512, 1024, 1024, "f32", kernel.weights, "f32")
        found = list(kernel.candidates(machine, work))
        assert found[0] == kernel.default(work, machine) and set(found) <= every


@KERNELS
def test_refuses(name):
    kernel = load_cuda(name)
    work = Gemm(4, 16, 16, "f32", kernel.weights, "f32")
    assert kernel.refuses(work) is None
    assert kernel.refuses(replace(work, m=None, bias="f32", activation="tanh")) is None
    for other in {"f32", "f16", "s8"} - {kernel.weights}:
        assert kernel.refuses(replace(work, b=other)) is not None
    assert kernel.refuses(replace(work, a="u8", b="s8", out="u8")) is not None


@KERNELS
@pytest.mark.parametrize("machine", (A100, H100), ids=("sm_80", "sm_90"))
def test_machine_code(name, machine, monkeypatch):
    """NVRTC makes code of every form, with all sums in registers."""
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    try:
        compiler = toolchain.find()
    except Error as error:
        pytest.skip(str(error))
    kernel = load_cuda(name)
    shapes = ((4096, 1024, 1024), (8, 1024, 1024)), ((None, 1000, 1023),)
    for shape in shapes[machine is H100]:
        work = Gemm(*shape, "f32", kernel.weights, "f32", bias="f32", activation="tanh")
        function = kernel.build(work, kernel.default(work, machine), machine)
        code = compiler.compile(device.split({"k": function}, machine).source, machine.arch)
        assert code.cubin and b".local" not in code.ptx
        if name.endswith("mma") and shape[0] != 8:
            assert b"mma.sync.aligned.m16n8k8" in code.ptx


@KERNELS
def test_no_register_is_spilled(name, tmp_path):
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas here")
    compiler = toolchain.find()
    if compiler.kind != "nvcc":
        pytest.skip("ptxas may be older than NVRTC")
    kernel = load_cuda(name)
    work = Gemm(4096, 4096, 1024, "f32", kernel.weights, "f32", bias="f32")
    function = kernel.build(work, kernel.default(work, A100), A100)
    path = tmp_path / "k.ptx"
    path.write_bytes(compiler.compile(device.split({"k": function}, A100).source, "sm_80").ptx)
    command = ["ptxas", "-v", "-arch", "sm_80", str(path), "-o", str(tmp_path / "k.cubin")]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill", said)
    assert spills and set(spills) == {"0"}, said
