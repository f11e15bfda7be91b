"""What a workload costs at least, whatever computes it."""

from __future__ import annotations

from math import prod
from typing import Any

from ..workload import NUMPY, Conv, EmbeddingBag, Interaction

_TERMS = 20  # per bag, where a call says how many


def cost(work: Any) -> tuple[int, int, int]:
    """Operations, bytes read or written, and bytes of what they are part of."""
    if isinstance(work, EmbeddingBag):
        terms = work.bags * work.tables * (work.pooling or _TERMS)  # type: ignore[operator]
        lines = -(-work.row_bytes // 64) * 64
        nbytes = terms * (lines + (8 if work.index == "s64" else 4))
        return 2 * terms * work.dim, nbytes, sum(work.rows) * work.row_bytes
    if isinstance(work, Interaction):
        each = work.vectors * work.dim + work.dim + work.pairs
        nbytes = 4 * work.bags * each  # type: ignore[operator]
        return 2 * work.bags * work.pairs * work.dim, nbytes, nbytes  # type: ignore[operator]
    a, b, c = (bytes_of(t) for t in (work.a, work.b, work.out))
    if isinstance(work, Conv):
        pixels, outputs = (work.batch * prod(s) for s in (work.size, work.outputs))  # type: ignore[operator]
        weights = prod(work.kernel) * work.group_channels * work.filters
        sums = 2 if work.residual else 1
        nbytes = a * pixels * work.channels + b * weights + c * sums * outputs * work.filters
    else:
        nbytes = a * work.m * work.k + b * work.k * work.n + c * work.m * work.n
    return work.ops, nbytes, nbytes


def bytes_of(dtype: str) -> int:
    return {"8": 1, "6": 2, "4": 4}[NUMPY[dtype][-1]] if dtype != "f32" else 4
