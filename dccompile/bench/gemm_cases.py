"""Gemm workloads to bench: what recommendation models run."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .. import reference
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
)


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
    )


def problem(work: Gemm, seed: int = 0) -> tuple[GemmWeights, np.ndarray]:
    """Weights and A (m, k) whose outputs fill the range of the output type."""
    assert work.m is not None
    rng = np.random.default_rng([seed, work.m, work.n, work.k])
    if work.a == "f32":
        a = rng.standard_normal((work.m, work.k)).astype(np.float32)
        return GemmWeights(rng.standard_normal((work.k, work.n)).astype(NUMPY[work.b])), a
    low, high = INT8_LIMITS[work.a]
    a = rng.integers(low, high + 1, (work.m, work.k)).astype(NUMPY[work.a])
    reach = 64 if work.b_bits == 7 else 127
    b = rng.integers(-reach, reach + 1, (work.k, work.n)).astype(np.int8)
    # |a| is about 140 (u8) and |b| 0.58 reach in the mean square: codes deviate by about 30
    spread = 30 / (140 * 0.58 * reach * np.sqrt(work.k))
    scale = (rng.uniform(0.5, 1.5, work.n) * spread).astype(np.float32)
    return GemmWeights(b, scale, a_zero=7 if work.a == "u8" else 0), a


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

    def peers(self, work: Gemm) -> list[str]:
        return gemm_peers.names(work)

    def prepare(
        self, peer: str, work: Gemm, weights: GemmWeights, a: np.ndarray, threads: int, layers: int
    ) -> Prepared:
        return gemm_peers.prepare(peer, work, weights, a, threads)

    def tiny(self, form: Form) -> Gemm:
        return workload(form, 1, 1, 1)

    def large(self, shape: Shape) -> bool:
        return shape[0] >= 10 and min(shape[1:]) >= 256

    def label(self, shape: Shape) -> str:
        return "x".join(map(str, shape))
