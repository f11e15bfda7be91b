"""Convolution kernels alone: random problems with many extremes, compiled and compared."""

from __future__ import annotations

import functools
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from memory import aligned, tensor

from dccompile import codegen, linker, reference
from dccompile.cache import Cache
from dccompile.kernel import Kernel
from dccompile.machine import Machine, available_cores
from dccompile.workload import INT8_LIMITS, NUMPY, Conv, ConvWeights, Residual, ResidualWeights


def conv(
    size: tuple[int, ...],
    channels: int,
    filters: int,
    kernel: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    pad: int | tuple[int, ...] | None = None,
    dilation: int = 1,
    batch: int | None = 1,
    **more: Any,
) -> Conv:
    """A Conv over one to three spatial dims; by default it pads as much as keeps the size."""
    rank = len(size)

    def full(value: int | tuple[int, ...], outer: int) -> tuple[int, int, int]:
        values = (value,) * rank if isinstance(value, int) else value
        d, h, w = (outer,) * (3 - rank) + values
        return d, h, w

    window = full(kernel, 1)
    reach = full(dilation, 1)
    around = tuple((k - 1) * d // 2 for k, d in zip(window, reach, strict=True))
    if pad is not None:
        around = full(pad, 0)
    return Conv(
        batch,
        full(size, 1),
        channels,
        filters,
        window,
        full(stride, 1),
        reach,
        tuple((p, p) for p in around),
        **more,
    )


def residual(work: Conv, kind: str, inner: str = "") -> Conv:
    return replace(work, residual=Residual(kind, inner, first=inner == "s8"))


def weights(work: Conv, seed: int) -> ConvWeights:
    """Random weights; with 8-bit outputs they saturate at times but not mostly."""
    rng = np.random.default_rng(seed)
    shape = (*work.kernel, work.group_channels, work.filters)
    depth = int(np.prod(shape[:-1]))
    if work.a == "f32":
        b = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(depth))
        bias = rng.standard_normal(work.filters).astype(np.float32)
        return ConvWeights(b, bias=bias if work.bias == "f32" else None)
    low, high = (-64, 64) if work.b_bits == 7 else (-128, 127)
    b = rng.integers(low, high + 1, shape)
    b = np.where(rng.random(shape) < 0.3, rng.choice([low, high], shape), b)
    spread = 110.0 * high * np.sqrt(depth)
    scale = rng.uniform(0.05, 1.0, work.filters) * 100 / spread
    bias = None
    if work.bias == "s32":
        bias = rng.integers(-spread, spread, work.filters).astype(np.int32)
    elif work.bias == "f32":
        bias = rng.normal(0, 30, work.filters).astype(np.float32)
    if work.out == "f32":
        scale = scale / 20
    out = ConvWeights(b.astype(np.int8), scale.astype(np.float32), bias)
    around = any(p for pair in work.pads for p in pair)
    out.a_zero = int(rng.integers(1, 256)) if work.padded or not around else 0
    if work.out == "s32":
        out.scale = None
    if work.out in INT8_LIMITS:
        low, high = INT8_LIMITS[work.out]
        if work.shifted:
            out.zero_point = int(rng.integers(low, high + 1))
        if work.clamped:
            out.clamp = (low + 3, high - 50)
    if work.residual is not None:
        inner = work.residual.inner
        low, high = INT8_LIMITS[inner or "s8"]
        shift = int(rng.integers(low, high + 1)) if inner else 0
        a, b_, c = rng.uniform(0.3, 1.2, 3).astype(np.float32)
        out.residual = ResidualWeights(float(a), float(b_), float(c * -99), shift, low, high)
    return out


def activations(work: Conv, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A and, with a residual, R."""
    rng = np.random.default_rng(seed + batch)

    def codes(kind: str, shape: tuple[int, ...]) -> np.ndarray:
        if kind == "f32":
            return rng.standard_normal(shape).astype(np.float32)
        low, high = INT8_LIMITS[kind]
        values = rng.integers(low, high + 1, shape)
        values = np.where(rng.random(shape) < 0.3, rng.choice([low, high], shape), values)
        return values.astype(NUMPY[kind])

    a = codes(work.a, (batch, *work.size, work.channels))
    if work.residual is None:
        return a, None
    return a, codes(work.residual.dtype, (batch, *work.outputs, work.filters))


class Case:
    """A workload on a kernel, with its weights, parameters and name in the compiled module."""

    def __init__(self, kernel: Kernel, machine: Machine, work: Conv, params: Any = None) -> None:
        self.kernel, self.machine, self.work = kernel, machine, work
        self.params = kernel.default(work, machine) if params is None else params
        self.seed = zlib.crc32(repr((work, self.params)).encode())
        self.weights = weights(work, self.seed)
        self.symbol = f"f{self.seed:x}"
        self.packed = tensor(kernel.pack(work, self.weights, self.params))

    def function(self) -> Any:
        built = self.kernel.build(self.work, self.params, self.machine)
        return built.with_attr("global_symbol", self.symbol)

    def run(self, library: Any, batch: int | None = None) -> None:
        """Computes a random problem and compares."""
        batch = batch if self.work.batch is None else self.work.batch
        assert batch is not None
        a, r = activations(self.work, batch, self.seed)
        out, _ = aligned((batch, *self.work.outputs, self.work.filters), NUMPY[self.work.out])
        inputs = [tensor(a), self.packed] + ([] if r is None else [tensor(r)])
        result = tvm.runtime.from_dlpack(out) if out.size else tvm.runtime.tensor(out)
        library[self.symbol](*inputs, result)
        check(self.work, out, reference.conv(self.work, self.weights, a, r), str(self.params))


def check(work: Conv, got: np.ndarray, expected: np.ndarray, what: str) -> None:
    what = f"{work.describe()} {what}"
    if work.a == "f32" or work.activation in ("sigmoid", "tanh"):
        reach = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * reach, err_msg=what)
    else:
        np.testing.assert_array_equal(got, expected, err_msg=what)


def build(cases: list[Case]) -> Any:
    """The cases of one machine as one library, compiled on all cores."""
    cores = available_cores()
    with tempfile.TemporaryDirectory() as folder:
        units = [
            codegen.Unit(f"part{i}", cases[0].machine, functools.partial(_functions, part))
            for i in range(4 * cores)
            if (part := cases[i :: 4 * cores])
        ]
        paths = codegen.objects(units, Path(folder), Cache(None), cores)
        library = Path(folder) / "kernels.so"
        linker.link(list(paths.values()), library)
        return tvm_ffi.load_module(str(library))


def _functions(cases: list[Case]) -> dict[str, Any]:
    return {case.symbol: case.function() for case in cases}
