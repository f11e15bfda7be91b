"""Weights in 8 bits: a scale for every output channel, group or tensor, symmetric codes.

Fine-grain (Park et al. 2018, section 3.2.2 (a)): filters differ in size by orders of magnitude once
batch norms are folded into them, so that each has its own scale. The scale is the one with the
least squared error: above some size of filter a few weights are better clipped than all others
rounded coarsely.

Outlier-aware ((d)): for machines without VNNI all but a small share of the weights can be kept
within +-64, where two products of a pair fit 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from dccompile.columns import best_scales
from dccompile.frontend.editor import attribute

from .noise import decibels

GRANULARITIES = ("channel", "group", "tensor")
LIMIT = 127  # codes are symmetric: -127 .. 127
MAIN = 64  # the largest code whose pairs of products with u8 fit 16 bits
_CHUNK = 1 << 17  # weights that are searched at a time
_TINY = np.float32(1e-12)  # the least scale: filters of next to nothing


@dataclass(frozen=True)
class Quantized:
    """8-bit weights of one layer.

    codes s8, of the weights' shape · scale (channels,) f32 along `axis` · sqnr in dB · outliers:
    share of the codes beyond +-64.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int
    sqnr: float
    outliers: float

    def values(self) -> np.ndarray:
        """The numbers that the codes stand for, float32."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.codes.astype(np.float32) * self.scale.reshape(shape)


def channel_axis(node: NodeProto) -> int:
    """The axis of a layer's weights that counts output channels."""
    if node.op_type == "MatMul":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else 0


def quantize(
    node: NodeProto,
    weights: np.ndarray,
    granularity: str = "channel",
    outliers: float | None = None,
) -> Quantized:
    """The weights of a layer in 8 bits. At most the share `outliers` of a row lies beyond +-64."""
    axis = channel_axis(node)
    rows = _rows(weights, axis)
    groups = attribute(node, "group", 1) if node.op_type.startswith("Conv") else 1
    shared = node.op_type == "ConvTranspose" and groups > 1  # a channel has several filters
    blocks = {"channel": len(rows), "group": groups, "tensor": 1}[granularity]
    blocks = 1 if shared else blocks
    parts = rows.reshape(blocks, -1)
    scale = least_error_scales(parts)
    if outliers is not None:
        scale = np.maximum(scale, _quantile(np.abs(parts), 1 - outliers) / MAIN)
    scale = np.repeat(np.maximum(scale, _TINY), len(rows) // blocks)
    codes = round_to(rows, scale)
    noise = float(np.square(codes * scale[:, None] - rows, dtype=np.float64).sum())
    signal = float(np.square(rows, dtype=np.float64).sum())
    beyond = float(np.count_nonzero(np.abs(codes) > MAIN) / max(1, codes.size))
    moved = codes.astype(np.int8).reshape(-1, *np.delete(weights.shape, axis))
    return Quantized(
        np.ascontiguousarray(np.moveaxis(moved, 0, axis)),
        scale,
        axis,
        decibels(signal, noise),
        beyond,
    )


def _rows(weights: np.ndarray, axis: int) -> np.ndarray:
    """(channels, weights of one) f32."""
    return np.ascontiguousarray(np.moveaxis(weights, axis, 0)).reshape(weights.shape[axis], -1)


def round_to(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes as float32, (rows, k) by a scale for every row."""
    codes = np.rint(rows / scale[:, None])
    return np.clip(codes, -LIMIT, LIMIT, out=codes)


def least_error_scales(rows: np.ndarray) -> np.ndarray:
    """The scale of every row (rows, k) f32 with the least squared error, as (rows,) f32."""
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    parts = [rows[first : first + step] for first in range(0, len(rows), step)]
    return np.concatenate([best_scales(part, np.float32(LIMIT))[0] for part in parts])


def _quantile(rows: np.ndarray, share: float) -> np.ndarray:
    """The number that `share` of a row does not exceed."""
    index = min(rows.shape[1] - 1, int(np.ceil(share * rows.shape[1])) - 1)
    found: np.ndarray = np.partition(rows, index, axis=1)[:, index]
    return found
