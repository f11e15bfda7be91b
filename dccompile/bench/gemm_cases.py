"""Gemm workloads to bench: what recommendation models run."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from .. import outliers, reference, registry
from ..columns import quantize_columns
from ..kernel import Kernel
from ..machine import Machine
from ..workload import INT8_LIMITS, NUMPY, Gemm, GemmWeights
from . import gemm_peers
from .peers import Prepared
from .suite import Form, Shape, Suite, deployed

# Requantized products, then the float forms.
FORMS = (
    Form("u8", "s8", "u8"),
    Form("u8", "s8", "u8", b_bits=7),
    Form("s8", "s8", "s8"),
    Form("f32", "f32", "f32"),
    Form("f32", "f16", "f32"),
    Form("f32", "s8", "f32"),
)
# Of the kernels with 16-bit sums. Weights (k, n) of trained layers, in units of a column's scale,
# are nearly a Student's t of 8 degrees: of 79 layers of 5 public models (text detection and
# recognition, file types, object detection) quantized per channel, 0.5 % of the codes beyond +-64
# leave a deviation of 19.2 in the median layer, of this 19.3. L2-optimal scales leave 4.7 % beyond
# +-64 and a deviation of 30. `calibrated` has activations as after a ReLU, whose sums stay small.
_SPREAD = {"trained": 16.7, "trained-l2": 26.5, "calibrated": 16.7}
_CALIBRATED = 8  # k-steps
SPLIT_FORMS = tuple(Form("u8", "s8", "u8", weights=made) for made in _SPREAD)


def shapes() -> list[Shape]:
    """The deployed (m, n, k)."""
    return deployed("gemm")


def workload(form: Form, m: int, n: int, k: int) -> Gemm:
    """A requantized product or a plain float one."""
    return Gemm(
        m,
        n,
        k,
        form.a,
        form.b,
        form.out,
        b_bits=form.b_bits,
        zero_point=3 if form.out == "u8" else 0,
        bounded=form.a != "f32",  # scales of `problem` keep |y| far below 2**31
        outliers=_outliers(form.weights, n, k) if _large((m, n, k)) else (),
        spill=_CALIBRATED if form.weights == "calibrated" and _large((m, n, k)) else 0,
    )


def _large(shape: Shape) -> bool:
    return shape[0] >= 10 and min(shape[1:]) >= 256


@lru_cache(maxsize=2)
def _trained(made: str, n: int, k: int) -> np.ndarray:
    """Weights (k, n) s8 as trained ones are distributed."""
    rng = np.random.default_rng([8, n, k])
    codes = np.rint(rng.standard_t(8, (k, n)) * _SPREAD[made])
    return np.clip(codes, -128, 127).astype(np.int8)


@lru_cache(maxsize=64)
def _outliers(made: str, n: int, k: int) -> tuple[int, ...]:
    return outliers.counts(_trained(made, n, k)) if made in _SPREAD else ()


def problem(work: Gemm, seed: int = 0) -> tuple[GemmWeights, np.ndarray]:
    """Weights and A (m, k) whose outputs fill the range of the output type."""
    assert work.m is not None
    rng = np.random.default_rng([seed, work.m, work.n, work.k])
    if work.a == "f32":
        a = rng.standard_normal((work.m, work.k)).astype(np.float32)
        b = rng.standard_normal((work.k, work.n)).astype(np.float32)
        if work.b == "s8":
            columns = quantize_columns(b)
            return GemmWeights(columns.codes, columns.scale), a
        return GemmWeights(b.astype(NUMPY[work.b])), a
    low, high = INT8_LIMITS[work.a]
    a = rng.integers(low, high + 1, (work.m, work.k)).astype(NUMPY[work.a])
    if work.spill:
        a = np.minimum(np.abs(rng.normal(0, 40, a.shape)), 255).astype(np.uint8)
    reach = 64 if work.b_bits == 7 else 127
    b = rng.integers(-reach, reach + 1, (work.k, work.n)).astype(np.int8)
    if work.outliers:
        b = _trained(_made(work), work.n, work.k)
        reach = 20  # of uniform weights with this deviation
    # |a| is about 140 (u8) and |b| 0.58 reach in the mean square: codes deviate by about 30
    spread = 30 / (140 * 0.58 * reach * np.sqrt(work.k))
    scale = (rng.uniform(0.5, 1.5, work.n) * spread).astype(np.float32)
    return GemmWeights(b, scale, a_zero=7 if work.a == "u8" else 0), a


def _made(work: Gemm) -> str:
    """Of which kind the weights of a workload with outliers are."""
    if work.spill:
        return "calibrated"
    return next(m for m in _SPREAD if _outliers(m, work.n, work.k) == work.outliers)


class Gemms(Suite):
    """Products of activations and constant weights."""

    op = "gemm"
    forms = FORMS
    families: ClassVar = ("gemm",)

    def shapes(self, family: str) -> list[Shape]:
        return shapes()

    def workload(self, form: Form, shape: Shape) -> Gemm:
        return workload(form, *shape)

    def problem(self, work: Gemm) -> tuple[GemmWeights, np.ndarray]:
        return problem(work)

    def reference(self, work: Gemm, weights: GemmWeights, a: np.ndarray) -> np.ndarray:
        return reference.gemm(work, weights, a)

    def forms_of(self, kernel: Kernel) -> tuple[Form, ...]:
        return SPLIT_FORMS if "split" in kernel.name else self.forms

    def rival(self, work: Gemm, kernel: Kernel, machine: Machine) -> Kernel | None:
        if not work.outliers:
            return None
        return registry.select(replace(work, outliers=(), spill=0), machine).kernel

    def peers(self, work: Gemm) -> list[str]:
        return gemm_peers.names(work)

    def prepare(
        self, peer: str, work: Gemm, weights: GemmWeights, a: np.ndarray, threads: int, layers: int
    ) -> Prepared:
        return gemm_peers.prepare(peer, work, weights, a, threads)

    def tiny(self, form: Form) -> Gemm:
        return workload(form, 1, 1, 1)

    def large(self, shape: Shape) -> bool:
        return _large(shape)

    def label(self, shape: Shape) -> str:
        return "x".join(map(str, shape))
