"""Every integer GEMM kernel for CUDA, run by the emulator, exact against the reference."""

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
from dccompile.schedules.cuda import _gemm_mma, _ir, _math

from dccompile import reference
from dccompile.cuda import device, toolchain
from dccompile.errors import Error
from dccompile.machine import GPUS
from dccompile.workload import INT8_LIMITS, NUMPY, Gemm, GemmWeights

MMA, DP4A = load_cuda("gemm_u8s8s32_mma"), load_cuda("gemm_u8s8s32_dp4a")
NAMES = listed_cuda("gemm_u8s8s32")
A100, H100 = GPUS["cuda:sm_80"], GPUS["cuda:sm_90"]


# ---- data ----
def _weights(work, seed):
    """Random weights with many extremes; outputs saturate at times but not mostly."""
    rng = np.random.default_rng(seed)
    b = rng.integers(-128, 128, (work.k, work.n))
    b = np.where(rng.random(b.shape) < 0.3, rng.choice([-128, 127], b.shape), b)
    spread = 110.0 * INT8_LIMITS[work.a][1] * np.sqrt(work.k)
    scale = rng.uniform(0.05, 1.0, work.n) * 100 / spread
    if work.out == "f32":
        scale = scale / 20
    bias = None
    if work.bias == "s32":
        bias = rng.integers(-spread, spread, work.n).astype(np.int32)
        bias[:1] = 2**31 - 1  # the accumulator wraps
    if work.bias == "f32":
        bias = rng.normal(0, 3, work.n).astype(np.float32)
    return GemmWeights(
        b.astype(np.int8),
        None if work.out == "s32" else scale.astype(np.float32),
        bias,
        0 if work.runtime else int(rng.integers(*INT8_LIMITS[work.a], endpoint=True)),
        rng.integers(-128, 128, work.n).astype(np.int32) if work.b_zero else None,
    )


def _inputs(work, m, seed):
    rng = np.random.default_rng(seed + m)
    low, high = INT8_LIMITS[work.a]
    a = rng.integers(low, high + 1, (m, work.k))
    a = np.where(rng.random(a.shape) < 0.3, rng.choice([low, high], a.shape), a)
    inputs = [a.astype(NUMPY[work.a])]
    if work.runtime:
        inputs.append(np.array([rng.integers(low, high + 1)], NUMPY[work.a]))
        if work.out != "s32":
            inputs.append(rng.uniform(0.5, 2, 1).astype(np.float32))
    return inputs


def _run(kernel, work, params, m=None, order="forward", machine=A100, scale=None):
    """Runs the kernel on the emulator and compares; a `scale` replaces that of A."""
    what, m = f"{work} {params}", work.m or m
    seed = zlib.crc32(repr((work, params)).encode())
    weights, inputs = _weights(work, seed), _inputs(work, m, seed)
    if scale is not None:
        inputs[2][0] = scale
    function = kernel.build(work, params, machine)
    out = np.full(m * work.n * np.dtype(NUMPY[work.out]).itemsize, 0x5A, np.uint8)
    out = out.view(NUMPY[work.out]).reshape(m, work.n)
    arrays = [inputs[0], kernel.pack(work, weights, params), *inputs[1:], out]
    assert emulate.run(function, arrays, machine, order=order) is None
    expected = reference.gemm(work, weights, *inputs)
    if work.activation in ("sigmoid", "tanh"):
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-37, err_msg=what)
    else:
        np.testing.assert_array_equal(out, expected, err_msg=what)


# ---- classes ----
OPERANDS = {
    "u8": {},
    "s8": {"a": "s8"},
    "b_zero": {"b_zero": True},
    "runtime": {"runtime": True},
    "s8_runtime_b_zero": {"a": "s8", "runtime": True, "b_zero": True},
}
OUTPUTS = {
    "to_u8": {"out": "u8", "zero_point": 121},
    "to_u8_relu": {"out": "u8", "zero_point": 3, "clamp": (3, 255), "bias": "s32"},
    "to_u8_f32_bias": {"out": "u8", "zero_point": 255, "bias": "f32"},
    "to_u8_bounded": {"out": "u8", "bounded": True, "clamp": (0, 200)},
    "to_s8": {"out": "s8", "zero_point": -7},
    "to_s8_clamp": {"out": "s8", "zero_point": 5, "clamp": (-100, 90), "bias": "f32"},
    "to_s32": {"out": "s32"},
    "to_s32_bias": {"out": "s32", "bias": "s32"},
    "to_f32": {"out": "f32"},
    "to_f32_relu": {"out": "f32", "activation": "relu", "bias": "f32"},
    "to_f32_clip": {"out": "f32", "activation": "clip", "clip": (-0.5, 6.0), "bias": "s32"},
    "to_f32_sigmoid": {"out": "f32", "activation": "sigmoid", "bias": "f32"},
    "to_f32_tanh": {"out": "f32", "activation": "tanh"},
}
PAIRS = dict(zip(OUTPUTS, 3 * list(OPERANDS), strict=False))  # every output, every operand form


def _work(m, n, k, out="to_u8", **more):
    return Gemm(m, n, k, **{"a": "u8", "b": "s8", **OUTPUTS[out], **more})


def _mma(*values):
    return MMA.Params(*values)


TILE = _mma(16, 16, 2, 2, 1, 3)  # 32 x 32, 64 of K a stage
MMA_SHAPES = {
    "one_tile": (_work(32, 32, 64), TILE),
    "tile_minus_1": (_work(31, 31, 63, "to_s8", b_zero=True), TILE),
    "tile_plus_1": (_work(33, 33, 65, "to_f32", a="s8"), TILE),
    "many_tiles": (_work(80, 100, 260), TILE),
    "k_is_1": (_work(5, 8, 1, b_zero=True), TILE),
    "k_is_3": (_work(5, 7, 3, "to_s32", a="s8", b_zero=True), TILE),
    "k_is_17": (_work(17, 17, 17, runtime=True), TILE),
    "k_is_31": (_work(16, 1, 31, "to_s8", b_zero=True), TILE),
    "k_is_36": (_work(9, 4, 36, b_zero=True), TILE),
    "k_is_80": (_work(9, 2, 80, b_zero=True), TILE),
    "k_is_4096": (_work(16, 32, 4096, a="s8"), TILE),
    "one_row": (_work(1, 48, 256), TILE),
    "open_m": (_work(None, 100, 100, a="s8", runtime=True, b_zero=True), TILE),
    "open_m_words": (_work(None, 36, 129, "to_f32"), TILE),
    "warp_64x64": (_work(70, 72, 144), _mma(64, 64, 1, 1, 1, 2)),
    "warp_32x64_words": (_work(40, 72, 144, "to_s32"), _mma(32, 64, 1, 1, 1, 4)),
    "warp_16x8": (_work(20, 40, 200, a="s8", b_zero=True), _mma(16, 8, 2, 4, 1, 4)),
    "warp_16x8_words": (_work(20, 41, 200, "to_s32"), _mma(16, 8, 1, 2, 1, 3)),
    "split_2": (_work(30, 40, 500, "to_f32", b_zero=True), _mma(32, 32, 1, 1, 2, 3)),
    "split_4": (_work(12, 40, 448, a="s8"), _mma(16, 16, 1, 2, 4, 2)),
    "split_8": (_work(9, 24, 1100, runtime=True, bias="s32"), _mma(16, 8, 1, 1, 8, 2)),
    "split_wider_than_k": (_work(9, 24, 72), _mma(16, 16, 1, 1, 4, 3)),
    "dynamic_shared": (_work(130, 260, 320), _mma(64, 64, 2, 4, 1, 3)),
}
D = DP4A.Params
DP4A_SHAPES = {
    "one_row": (_work(1, 40, 256), D(8, 4, 1)),
    "most_rows": (_work(8, 33, 512, "to_s8", b_zero=True), D(32, 8, 4)),
    "n_is_1": (_work(2, 1, 96, "to_f32"), D(8, 2, 2)),
    "n_is_7": (_work(5, 7, 144, a="s8", b_zero=True), D(8, 2, 2)),
    "n_is_17": (_work(3, 17, 40, "to_s32", b_zero=True), D(16, 1, 2)),
    "k_is_1": (_work(4, 8, 1, b_zero=True), D(8, 1, 1)),
    "k_is_3": (_work(4, 9, 3, b_zero=True), D(16, 1, 1)),
    "k_is_31": (_work(3, 9, 31, runtime=True), D(32, 1, 2)),
    "k_is_100": (_work(7, 24, 100, a="s8", b_zero=True), D(8, 4, 1)),
    "k_is_1037": (_work(2, 24, 1037, a="s8", b_zero=True), D(8, 16, 4)),
    "more_warps_than_k": (_work(1, 16, 32), D(32, 16, 4)),
    "more_numbers_than_threads": (_work(8, 70, 256), D(32, 4, 1)),
}


@pytest.mark.parametrize("label", MMA_SHAPES)
def test_mma(label):
    work, params = MMA_SHAPES[label]
    for m in (None,) if work.m else (0, 1, 5, 32, 65):
        _run(MMA, work, params, m)


@pytest.mark.parametrize("m", [256, 330])
def test_rows_in_groups(monkeypatch, m):
    """The order of blocks for large B, whose last group of rows may be smaller."""
    monkeypatch.setattr(_gemm_mma, "_LARGE", 0)
    _run(MMA, _work(m, 70, 64), TILE)
    _run(MMA, _work(None, 70, 64), TILE, m)


@pytest.mark.parametrize("label", DP4A_SHAPES)
def test_dp4a(label):
    _run(DP4A, *DP4A_SHAPES[label])


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs(name, out):
    """Every output with some operand form; tails of rows, columns and K."""
    work = _work(7, 20, 100, out, **OPERANDS[PAIRS[out]])
    params = D(16, 2, 2) if "dp4a" in name else _mma(16, 16, 1, 1, 1, 2)
    _run(load_cuda(name), work, params)


@pytest.mark.parametrize("out", ["to_u8", "to_s8_clamp", "to_f32_relu", "to_f32_clip"])
def test_overflow(out):
    """Results beyond 2**31, infinities and NaN end where the reference has them."""
    work = _work(5, 8, 33, out, runtime=True)
    for scale in (1e12, -1e30, np.inf, -np.inf, np.nan, 0.0):
        _run(DP4A, work, D(8, 1, 1), scale=scale)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_math(name):
    """Relative errors within what `_math` states, where results are normal; NaN stays NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), rng.normal(0, 8, 156_000).astype(np.float32)])
    x[:4] = np.nan, np.inf, -np.inf, -0.0
    y = np.zeros_like(x)
    with _ir.prim_func("f") as builder:
        given = _ir.T.arg("x", _ir.T.buffer(x.shape, "float32"))
        made = _ir.T.arg("y", _ir.T.buffer(x.shape, "float32"))
        with _ir.launch((x.size // 256,), (256,)) as (block, thread):
            at = _ir.T.Bind(block * 256 + thread)
            _ir.T.buffer_store(made, getattr(_math, name)(_ir.T.Bind(given[at])), [at])
    emulate.run(builder.get().with_attr("dcc.kernel", "f"), [x, y], check=False)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(np.float64)
        sigmoid = 1 / (1 + np.exp(-wide))
        expected = {"exp": np.exp(wide), "sigmoid": sigmoid, "tanh": np.tanh(wide)}[name]
        rounded = expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(y[~np.isfinite(rounded)], rounded[~np.isfinite(rounded)])
    normal = np.isfinite(rounded) & (np.abs(rounded) >= np.finfo(np.float32).tiny)
    error = np.abs(y[normal] / expected[normal] - 1).max()
    assert error <= {"exp": 0.9e-7, "sigmoid": 1.5e-7, "tanh": 1.8e-7}[name], error


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_order_of_threads(order):
    for label in ("tile_plus_1", "split_4"):
        _run(MMA, *MMA_SHAPES[label], order=order)
    _run(DP4A, *DP4A_SHAPES["most_rows"], order=order)


# ---- choices ----
SHAPES = {
    "one row": Gemm(1, 1024, 1024, "u8", "s8", "u8"),
    "few rows": Gemm(16, 1024, 1024, "u8", "s8", "u8"),
    "some rows": Gemm(64, 512, 512, "u8", "s8", "u8"),
    "model:small": Gemm(10, 512, 512, "s8", "s8", "f32", activation="tanh", bias="f32"),
    "model:odd": Gemm(102, 323, 255, "u8", "s8", "u8", b_zero=True),
    "large": Gemm(4096, 4096, 4096, "u8", "s8", "u8"),
    "wide words": Gemm(1024, 1024, 1024, "u8", "s8", "s32", runtime=True, b_zero=True),
    "open": Gemm(None, 1024, 1024, "u8", "s8", "u8"),
    "open odd": Gemm(None, 1000, 1001, "s8", "s8", "f32", activation="sigmoid", b_zero=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_points(name):
    """Distinct, within the space, each of an effect of its own, the default first; all fit."""
    kernel = load_cuda(name)
    for machine in (A100, H100, GPUS["cuda:sm_86"]):
        whole = set(kernel.candidates(machine))
        for work in SHAPES.values():
            if kernel.refuses(work):
                continue
            points = list(kernel.candidates(machine, work))
            assert points[0] == kernel.default(work, machine)
            assert len({kernel.effect(work, p) for p in points}) == len(points)
            assert set(points) <= whole
            for params in points:
                assert kernel.registers(params) <= 255
                if "mma" in name:
                    assert params.shared <= machine.shared


def test_refuses():
    work = Gemm(4, 16, 16, "u8", "s8", "u8")
    for kernel in (MMA, DP4A):
        assert kernel.refuses(work) is None
        assert kernel.refuses(replace(work, a="s8")) is None
        assert kernel.refuses(replace(work, a="f32", b="f32", out="f32")) is not None
    assert "tensor cores" in DP4A.refuses(replace(work, m=None))
    assert "9 rows" in DP4A.refuses(replace(work, m=9))
    assert MMA.refuses(replace(work, m=None)) is None
    assert NAMES.index(DP4A.name) < NAMES.index(MMA.name)


def _compiler():
    try:
        return toolchain.find()
    except Error as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("machine", [A100, H100], ids=lambda m: m.arch)
@pytest.mark.parametrize("label", SHAPES)
def test_machine_code(label, machine, tmp_path):
    """Defaults compile; all of a thread's numbers stay in registers."""
    work, compiler = SHAPES[label], _compiler()
    for kernel in (DP4A, MMA):
        if kernel.refuses(work):
            continue
        params = kernel.default(work, machine)
        function = kernel.build(work, params, machine)
        code = compiler.compile(device.split({"k": function}, machine).source, machine.arch)
        assert b".local" not in code.ptx, params
        if shutil.which("ptxas") is None:
            continue
        (tmp_path / "k.ptx").write_bytes(code.ptx.rstrip(b"\0"))
        command = ["ptxas", "-v", "-arch", machine.arch, str(tmp_path / "k.ptx"), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        assert "0 bytes spill stores" in said, (params, said)
        used = int(re.search(r"Used (\d+) registers", said)[1])
        assert used <= kernel.registers(params), (params, used, kernel.registers(params))
