"""Conv workloads to bench: what image and video models run."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import numpy as np

from .. import reference
from ..workload import NUMPY, Conv, ConvWeights
from . import conv_peers
from .peers import Prepared
from .suite import Form, Shape, Suite, deployed

# With an s32 or f32 bias in the sum.
FORMS = (
    Form("u8", "s8", "u8"),
    Form("u8", "s8", "u8", b_bits=7),
    Form("f32", "f32", "f32"),
)
ZERO = 7  # zero point of A and of C: one number, so that C can be the A of a next layer


def workload(form: Form, shape: Shape) -> Conv:
    """(batch, channels, filters, h, w, groups, k, stride, pad) or (batch, channels, filters,
    d, h, w, groups, kd, kh, kw, stride_d, stride_hw, pad_d, pad_hw) as a workload.
    """
    if len(shape) == 9:
        batch, channels, filters, h, w, groups, k, stride, pad = shape
        size, kernel, strides, pads = (1, h, w), (1, k, k), (1, stride, stride), (0, pad, pad)
    else:
        batch, channels, filters, d, h, w, groups, kd, kh, kw = shape[:10]
        stride_d, stride, pad_d, pad = shape[10:]
        size, kernel = (d, h, w), (kd, kh, kw)
        strides, pads = (stride_d, stride, stride), (pad_d, pad, pad)
    integer = form.a != "f32"
    return Conv(
        batch,
        size,
        channels,
        filters,
        kernel,
        strides,
        pads=tuple((p, p) for p in pads),
        groups=groups,
        a=form.a,
        b=form.b,
        out=form.out,
        bias="s32" if integer else "f32",
        b_bits=form.b_bits,
        shifted=integer,
        bounded=integer,  # scales of `problem` keep |y| far below 2**31
        padded=integer,
    )


def problem(work: Conv, seed: int = 0) -> tuple[ConvWeights, np.ndarray]:
    """Weights and A (batch, d, h, w, channels) whose outputs fill the range of the output type."""
    assert work.batch is not None
    rng = np.random.default_rng([seed, work.batch, *work.size, work.channels, work.filters])
    dims = (work.batch, *work.size, work.channels)
    window = (*work.kernel, work.group_channels, work.filters)
    depth = prod(window[:-1])
    if work.a == "f32":
        b = (rng.standard_normal(window) / np.sqrt(depth)).astype(np.float32)
        bias = rng.standard_normal(work.filters).astype(np.float32)
        return ConvWeights(b, bias=bias), rng.standard_normal(dims).astype(np.float32)
    a = rng.integers(0, 256, dims).astype(NUMPY[work.a])
    reach = 64 if work.b_bits == 7 else 127
    b = rng.integers(-reach, reach + 1, window).astype(np.int8)
    # |a - zero| is about 140 and |b| 0.58 reach in the mean square: codes deviate by about 40
    sums = 140 * 0.58 * reach * np.sqrt(depth)
    scale = (rng.uniform(0.5, 1.5, work.filters) * 40 / sums).astype(np.float32)
    bias = rng.normal(sums, sums, work.filters).astype(np.int32)  # about the middle of the codes
    return ConvWeights(b, scale, bias, a_zero=ZERO, zero_point=ZERO), a


class Convs(Suite):
    """Convolutions in two and three dimensions."""

    op = "conv"
    forms = FORMS
    families: ClassVar = ("depthwise2d", "depthwise3d", "groupconv2d", "conv2d")

    def shapes(self, family: str) -> list[Shape]:
        return deployed(family)

    def workload(self, form: Form, shape: Shape) -> Conv:
        return workload(form, shape)

    def problem(self, work: Conv) -> tuple[ConvWeights, np.ndarray]:
        return problem(work)

    def reference(self, work: Conv, weights: ConvWeights, a: np.ndarray) -> np.ndarray:
        return reference.conv(work, weights, a)

    def peers(self, work: Conv) -> list[str]:
        return conv_peers.names(work)

    def layers(self, work: Conv, peer: str) -> int:
        return conv_peers.layers(work, peer)

    def prepare(
        self, peer: str, work: Conv, weights: ConvWeights, a: np.ndarray, threads: int, layers: int
    ) -> Prepared:
        return conv_peers.prepare(peer, work, weights, a, threads, layers)

    def tiny(self, form: Form) -> Conv:
        return workload(form, (1, 16, 16, 1, 1, 1, 1, 1, 0))

    def large(self, shape: Shape) -> bool:
        return True

    def label(self, shape: Shape) -> str:
        """``1x56x56x64 > 256 1x1``, ``1x75x75x272 3x3/2 depthwise``."""
        work = workload(FORMS[0], shape)
        first = 1 if len(shape) == 9 else 0
        size, kernel, strides = (v[first:] for v in (work.size, work.kernel, work.strides))
        text = "x".join(map(str, (work.batch, *size, work.channels)))
        text += f" > {work.filters}" if work.filters != work.channels else ""
        text += " " + "x".join(map(str, kernel))
        if max(strides) > 1:
            text += "/" + (
                str(strides[0]) if len(set(strides)) == 1 else "x".join(map(str, strides))
            )
        if work.groups > 1:
            text += " depthwise" if work.depthwise else f" {work.groups} groups"
        return text
