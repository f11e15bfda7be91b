"""The meaning of every workload in plain numpy: what kernels are tested against, bit by bit.

Nothing here is shared with the schedules.
"""

from __future__ import annotations

import numpy as np

from .workload import (
    INT8_LIMITS,
    NUMPY,
    Conv,
    ConvWeights,
    EmbeddingBag,
    EmbeddingTables,
    Gemm,
    GemmWeights,
)


def gemm(
    workload: Gemm,
    weights: GemmWeights,
    a: np.ndarray,
    a_zero: np.ndarray | None = None,
    a_scale: np.ndarray | None = None,
) -> np.ndarray:
    """C (m, n) of A (m, k), exactly as the docstring of `Gemm` defines it.

    `a_zero` and `a_scale`, of shape (1,), are given with `workload.runtime`. Float workloads
    accumulate in float64, sigmoid and tanh are computed in float64: there, equality is not to be
    expected.
    """
    if workload.a == "f32":
        sums = a.astype(np.float64) @ weights.b.astype(np.float32).astype(np.float64)
        if workload.b == "s8":
            assert weights.scale is not None
            sums = sums * weights.scale.astype(np.float64)
        if weights.bias is not None:
            sums = sums + weights.bias.astype(np.float64)
        return activate(workload, sums.astype(np.float32))
    acc = accumulate(workload, weights, a, a_zero)
    if workload.out == "s32":
        return acc
    assert weights.scale is not None
    scale = weights.scale.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if workload.runtime:
            assert a_scale is not None
            scale = a_scale.astype(np.float32) * scale
        y = acc.astype(np.float32)
        if workload.bias == "f32":
            assert weights.bias is not None
            y = fma(y, scale, weights.bias)
        else:
            y = y * scale
    if workload.out == "f32":
        return activate(workload, y)
    return quantize(workload.out, y, workload.zero_point, workload.clamp)


def accumulate(
    workload: Gemm, weights: GemmWeights, a: np.ndarray, a_zero: np.ndarray | None = None
) -> np.ndarray:
    """The s32 accumulator of an integer Gemm, modulo 2**32, with an s32 bias in it."""
    zero = weights.a_zero
    if workload.runtime:
        assert a_zero is not None
        zero = int(a_zero[0])
    b = weights.b.astype(np.float64)
    if weights.b_zero is not None:
        b = b - weights.b_zero
    # float64 holds every sum exactly: k * 2**8 * 2**9 < 2**53 for any k below 2**36
    acc = ((a.astype(np.float64) - zero) @ b).astype(np.int64)
    if workload.bias == "s32":
        assert weights.bias is not None
        acc = acc + weights.bias.astype(np.int64)
    return acc.astype(np.int32)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x*y + z of float32 arrays, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, 2008),
    which makes the second rounding, to float32, the only one that counts.
    """
    product = x.astype(np.float64) * y.astype(np.float64)
    product, addend = np.broadcast_arrays(product, np.asarray(z, np.float64))
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # Knuth's two-sum
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def quantize(out: str, y: np.ndarray, zero_point: int, clamp: tuple[int, int] | None) -> np.ndarray:
    """clamp(saturate(rint(y) + zero_point)) in the 8-bit type of the output; NaN gives its least.

    NaN comes only from a runtime scale that is NaN or infinite.
    """
    low, high = INT8_LIMITS[out]
    # an f32 beyond 2**20 saturates whatever the zero point is
    limited = np.clip(np.where(np.isnan(y), -np.inf, y), -(2.0**20), 2.0**20)
    codes = np.clip(np.rint(limited).astype(np.int64) + zero_point, low, high)
    if clamp is not None:
        codes = np.clip(codes, *clamp)
    return codes.astype(NUMPY[out])


def activate(workload: Gemm | Conv, y: np.ndarray) -> np.ndarray:
    """The activation of a float32 output; a NaN stays one."""
    with np.errstate(over="ignore"):
        if workload.activation == "relu":
            return np.maximum(y, np.float32(0))
        if workload.activation == "clip":
            assert workload.clip is not None
            low, high = (np.float32(bound) for bound in workload.clip)
            return np.minimum(np.maximum(y, low), high)
        if workload.activation == "sigmoid":
            return (1 / (1 + np.exp(-y.astype(np.float64)))).astype(np.float32)
        if workload.activation == "tanh":
            return np.tanh(y.astype(np.float64)).astype(np.float32)
    return y


def conv(
    workload: Conv, weights: ConvWeights, a: np.ndarray, r: np.ndarray | None = None
) -> np.ndarray:
    """C of A and R, exactly as the docstring of `Conv` defines it.

    Float workloads accumulate in float64: there, equality is not to be expected.
    """
    sums = convolve(workload, weights, a)  # whole numbers below 2**53: exact
    if workload.a == "f32":
        if weights.bias is not None:
            sums = sums + weights.bias.astype(np.float64)
        if r is not None:
            sums = sums + r.astype(np.float64)
        return activate(workload, sums.astype(np.float32))
    acc = sums.astype(np.int64)
    if workload.bias == "s32":
        assert weights.bias is not None
        acc = acc + weights.bias.astype(np.int64)
    if workload.out == "s32":
        return acc.astype(np.int32)
    assert weights.scale is not None
    y, scale = acc.astype(np.int32).astype(np.float32), weights.scale.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if workload.bias == "f32":
            assert weights.bias is not None
            y = fma(y, scale, weights.bias)
        else:
            y = y * scale
        if workload.out == "f32":
            return activate(workload, y)
        if workload.residual is not None:
            w = weights.residual
            assert w is not None and r is not None
            factor, other, c = np.float32(w.b), r.astype(np.float32), np.float32(w.c)
            if workload.residual.inner:
                q = np.clip(np.rint(y) + np.float32(w.shift), np.float32(w.low), np.float32(w.high))
                terms = [(q, np.float32(w.a)), (other, factor)]
                if workload.residual.first:
                    terms.reverse()
                y = fma(*terms[0], fma(*terms[1], c))
            else:
                y = y + fma(other, factor, c)
    return quantize(workload.out, y, weights.zero_point, weights.clamp)


def convolve(workload: Conv, weights: ConvWeights, a: np.ndarray) -> np.ndarray:
    """The sums of products (batch, d, h, w, filters) in float64, tap after tap."""
    groups, b = workload.groups, weights.b.astype(np.float64)
    outputs = workload.outputs
    pads = [(0, 0), *((max(p, 0), max(q, 0)) for p, q in workload.pads), (0, 0)]
    wide = np.pad(a.astype(np.float64) - weights.a_zero, pads)
    wide = wide.reshape(*wide.shape[:-1], groups, workload.group_channels)
    b = b.reshape(*workload.kernel, workload.group_channels, groups, -1)
    out = np.zeros((a.shape[0], *outputs, groups, workload.filters // groups))
    for tap in np.ndindex(*workload.kernel):
        where = tuple(
            slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride)
            for t, dilation, stride, size in zip(
                tap, workload.dilations, workload.strides, outputs, strict=True
            )
        )
        here = (slice(None), *where)
        out += np.einsum("ndhwgc,cgo->ndhwgo", wide[here], b[tap], optimize=True)
    return out.reshape(*out.shape[:-2], workload.filters)


def embedding_bag(
    workload: EmbeddingBag,
    tables: EmbeddingTables,
    index: np.ndarray,
    offsets: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """out (bags, tables, dim) f32, bit by bit as the docstring of `EmbeddingBag` defines it.

    `offsets`, or lengths, are given where the layout is not 'fixed'; `weight` has the shape of
    `index`. Every index must be allowed.
    """
    bags, terms = _bags(workload, index.shape, offsets)
    out = np.zeros((len(bags), workload.tables, workload.dim), np.float32)
    flat = index.reshape(-1)
    factor = None if weight is None else weight.reshape(-1)
    coded = workload.storage in ("u8", "u4")
    for t, table in enumerate(tables.tables):
        first, last = bags[:, t], bags[:, t] + terms
        y, z = out[:, t], np.zeros((len(bags), 1), np.float32)
        count = np.zeros((len(bags), 1), np.int64)
        for step in range(int(terms.max(initial=0))):
            here = first + step < last
            here[here] &= flat[(first + step)[here]] != workload.padding
            at = (first + step)[here]
            value, scale, bias = _rows(
                workload, table[flat[at]]
            )  # negative ones count from the end
            w = None if factor is None else factor[at, None]
            if coded:
                y[here] = fma(value, scale if w is None else scale * w, y[here])
                z[here] = z[here] + bias if w is None else fma(bias, w, z[here])
            else:
                y[here] = y[here] + value if w is None else fma(value, w, y[here])
            count[here] += 1
        if coded:
            y += z
        if workload.mode == "mean":
            y /= np.maximum(count, 1).astype(np.float32)
    return out


def _bags(
    workload: EmbeddingBag, shape: tuple[int, ...], cuts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """First terms (bags, tables) in the flat index, and the number of terms (bags,)."""
    if workload.layout == "fixed":
        first = np.arange(shape[0] * shape[1]).reshape(shape[:2]) * shape[2]
        return first, np.full(shape[0], shape[2])
    assert cuts is not None
    cuts = cuts.astype(np.int64)
    if workload.layout == "lengths":
        return (np.cumsum(cuts) - cuts)[:, None], cuts
    if workload.layout == "offsets":
        cuts = np.append(cuts, shape[0])
    return cuts[:-1, None], np.diff(cuts)


def _rows(workload: EmbeddingBag, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values or codes (n, dim), scales and biases (n, 1) of rows as stored, all f32."""
    if workload.storage in ("f32", "f16"):
        none = np.zeros((len(rows), 1), np.float32)
        return rows.astype(np.float32), none, none
    width = (workload.dim + 1) // 2 if workload.storage == "u4" else workload.dim
    codes = rows[:, :width]
    if workload.storage == "u4":
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(rows), 2 * width)
    parts = np.ascontiguousarray(rows[:, width:]).view(NUMPY[workload.scale]).astype(np.float32)
    return codes[:, : workload.dim].astype(np.float32), parts[:, :1], parts[:, 1:]
