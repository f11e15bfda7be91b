"""Every integer GEMM kernel of the list, exact against the reference, over classes of shapes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from kernels import listed, load, marked
from memory import aligned, before_a_hole, tensor

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm

from dccompile import outliers, reference
from dccompile.workload import INT8_LIMITS, NUMPY, Gemm, GemmWeights

NAMES = listed("gemm_u8s")
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 24, 25, 129)  # of calls with a symbolic m
KERNELS = pytest.mark.parametrize("name", marked(NAMES))


# ---- data ----
def _weights(work, seed):
    """Random weights with many extremes; outputs saturate at times but not mostly."""
    rng = np.random.default_rng(seed)
    low, high = (-64, 64) if work.b_bits == 7 else (-128, 127)
    b = rng.integers(low, high + 1, (work.k, work.n))
    b = np.where(rng.random(b.shape) < 0.3, rng.choice([low, high], b.shape), b)
    spread = 110.0 * high * np.sqrt(work.k)
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


class Case:
    """A workload with its weights, parameters and name in the compiled module."""

    def __init__(self, kernel, target, work, params):
        self.seed = zlib.crc32(repr((work, params)).encode())
        self.weights = _weights(work, self.seed)
        if "split" in kernel.name:
            if work.m is None:
                self.weights.b //= 8  # none is an outlier
            work = replace(work, outliers=outliers.counts(self.weights.b))
        self.work, self.params = work, params
        self.symbol = f"f{self.seed:x}"
        self.function = kernel.build(work, params, target).with_attr("global_symbol", self.symbol)
        self.packed = tensor(kernel.pack(work, self.weights, params))

    def run(self, library, m=None):
        m = self.work.m or m
        inputs = _inputs(self.work, m, self.seed)
        out, _ = aligned((m, self.work.n), NUMPY[self.work.out])
        a, *scalars = [tensor(array) for array in inputs]
        library[self.symbol](a, self.packed, *scalars, tvm.runtime.from_dlpack(out))
        _check(out, reference.gemm(self.work, self.weights, *inputs), f"{self.work} {self.params}")


def _check(got, expected, what):
    if "activation='sigmoid'" in what or "activation='tanh'" in what:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-37, err_msg=what)
    else:
        np.testing.assert_array_equal(got, expected, err_msg=what)


def _compile(cases, target):
    functions = {case.symbol: case.function for case in cases}
    config = {"kind": "llvm", "mcpu": target.mcpu, "mattr": list(target.mattr)}
    return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(config))


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
# Every output, and every operand form with outputs of each kind; test_shape() adds other pairs.
PAIRS = list(zip(3 * list(OPERANDS), OUTPUTS, strict=False))
OTHER_PAIRS = list(zip(3 * list(OPERANDS)[::-1], OUTPUTS, strict=False))
MODEL_SHAPES = [(10, 512, 512), (16, 256, 512), (1, 128, 2876), (102, 323, 256), (999, 8, 36)]


def _shapes(mr, columns):
    return {
        "one_tile": (mr, columns, 64),
        "tile_minus_1": (max(1, mr - 1), columns - 1, 63),
        "tile_plus_1": (mr + 1, columns + 1, 65),
        "many_tiles": (3 * mr + 2, 3 * columns + 5, 39),
        "one_row": (1, columns + 16, 32),
        **{f"k_is_{k}": (mr + 2, 23, k) for k in (1, 2, 3, 4, 5)},
        "n_is_1": (9, 1, 33),
        "n_is_7": (9, 7, 18),
        "n_is_8": (21, 8, 36),
        "n_is_16": (11, 16, 12),
        "symbolic": (None, 137, 1101),  # with both a branch for few rows and one for threads
        "symbolic_one_column": (None, 1, 64),
        "symbolic_threads": (None, 4 * columns, 4096),
        **{"model_{}x{}x{}".format(*s): s for s in MODEL_SHAPES},
    }


@cache
def _shape_cases(name):
    kernel, target = load(name)
    bits = 7 if kernel.seven_bits else 8
    cases = {}
    probe = kernel.default(Gemm(64, 512, 512, "u8", "s8", "u8", b_bits=bits), target)
    classes = _shapes(probe.mr, probe.nr * kernel.bits // 32)
    for (label, shape), options in zip(classes.items(), 2 * OTHER_PAIRS, strict=False):
        mixed = {**OPERANDS[options[0]], **OUTPUTS[options[1]]}
        work = Gemm(*shape, **{"a": "u8", "b": "s8", "b_bits": bits, **mixed})
        params = kernel.default(work, target)
        if work.m is None:  # small tiles compile sooner
            params = replace(params, mr=3, nr=min(2, params.nr))
        cases[label] = Case(kernel, target, work, params)
    return _compile(cases.values(), target), cases


@KERNELS
@pytest.mark.parametrize("label", _shapes(2, 32))
def test_shape(name, label):
    library, cases = _shape_cases(name)
    case = cases[label]
    for m in (None,) if case.work.m else ROW_COUNTS:
        case.run(library, m)


@KERNELS
def test_options(name):
    """Operands x outputs on a shape with every kind of tail."""
    kernel, target = load(name)
    small = replace(next(iter(kernel.candidates(target))), mr=2, nr=2)
    bits = 7 if kernel.seven_bits else 8
    cases = [
        Case(
            kernel,
            target,
            Gemm(
                **{
                    **dict(m=2, n=43, k=150, a="u8", b="s8", b_bits=bits),
                    **OPERANDS[o],
                    **OUTPUTS[out],
                }
            ),
            small,
        )
        for o, out in PAIRS
    ]
    library = _compile(cases, target)
    for case in cases:
        case.run(library)


@KERNELS
def test_params(name):
    """Every point of the space that the machine has registers for, on two by two tiles."""
    kernel, target = load(name)
    bits = 7 if kernel.seven_bits else 8
    cases = []
    for params in kernel.candidates(target):
        if "split" in name and params.nr > 1:
            continue  # the same as with nr 1: of outliers a tile takes one vector of columns
        columns = params.nr * kernel.bits // 32
        work = Gemm(2 * params.mr, 2 * columns, 133, "u8", "s8", "u8", zero_point=90, b_bits=bits)
        cases.append(Case(kernel, target, work, params))
    assert cases
    library = _compile(cases, target)
    for case in cases:
        case.run(library)


@KERNELS
def test_overflow(name):
    """Results beyond 2**31, infinities and NaN end where ONNX Runtime and IEEE put them."""
    kernel, target = load(name)
    plain = {"m": 5, "n": 24, "k": 133, "b": "s8", "b_bits": 7 if kernel.seven_bits else 8}
    outs = ("to_u8", "to_s8_clamp", "to_f32", "to_f32_relu", "to_f32_clip")
    cases = []
    for out in outs:
        work = Gemm(a="u8", runtime=True, **plain, **OUTPUTS[out])
        cases.append(Case(kernel, target, work, kernel.default(work, target)))
    library = _compile(cases, target)
    for case in cases:
        a, a_zero, _ = _inputs(case.work, 5, case.seed)
        for scale in (1e12, -1e30, np.inf, -np.inf, np.nan, 0.0):
            a_scale = np.array([scale], np.float32)
            out, _ = aligned((5, 24), NUMPY[case.work.out])
            tensors = [tensor(a), case.packed, tensor(a_zero), tensor(a_scale)]
            library[case.symbol](*tensors, tvm.runtime.from_dlpack(out))
            expected = reference.gemm(case.work, case.weights, a, a_zero, a_scale)
            _check(out, expected, f"{case.work} {scale}")


# ---- memory ----
@KERNELS
def test_memory_bounds(name):
    """Nothing past A is read (that would be a segmentation fault), nothing around C is written."""
    kernel, target = load(name)
    bits = 7 if kernel.seven_bits else 8
    shapes = [(64, n, k) for n, k in ((1, 1), (5, 2), (9, 3), (19, 5), (45, 33), (70, 39))]
    shapes += [(1, 27, 64), (None, 13, 13)]
    outs = ("to_u8", "to_s8", "to_f32", "to_u8_relu", "to_s32")
    cases = []
    for i, shape in enumerate(shapes):
        work = Gemm(*shape, "u8", "s8", **OUTPUTS[outs[i % 5]], b_bits=bits)
        cases.append(Case(kernel, target, work, kernel.default(work, target)))
    library = _compile({case.symbol: case for case in cases}.values(), target)
    for case in cases:
        m = case.work.m or 64
        inputs = _inputs(case.work, m, case.seed)
        a, region = before_a_hole(inputs[0])
        out, raw = aligned((m, case.work.n), NUMPY[case.work.out], guard=256)
        library[case.symbol](a, case.packed, tvm.runtime.from_dlpack(out))
        _check(out, reference.gemm(case.work, case.weights, *inputs), str(case.work))
        out[...] = np.full(out.nbytes, 0x5A, np.uint8).view(out.dtype).reshape(out.shape)
        assert (raw == 0x5A).all(), f"{case.work}: bytes around C were written"
        del a, region


@KERNELS
def test_refuses(name):
    kernel, _ = load(name)
    work = Gemm(4, 16, 16, "u8", "s8", "u8", b_bits=7, outliers=(0, 0, 0, 0))
    assert kernel.refuses(work) is None
    assert kernel.refuses(replace(work, a="s8", m=None)) is None
    assert kernel.refuses(replace(work, a="f32", b="f32", out="f32")) is not None
    if kernel.seven_bits:
        assert "64" in kernel.refuses(replace(work, b_bits=8))
