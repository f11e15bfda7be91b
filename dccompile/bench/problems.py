"""Data for any workload that a kernel takes, and what it must compute of it.

Everything follows from the workload and a seed, so that every process makes the same. Codes span
their whole type, a third of them its extremes; scales are such that 8-bit results spread over
their range (40 codes of standard deviation) and reach both ends at times.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np

from .. import outliers, reference
from ..columns import quantize_columns
from ..kernel import Kernel
from ..workload import (
    INT8_LIMITS,
    NUMPY,
    Conv,
    ConvWeights,
    EmbeddingBag,
    EmbeddingTables,
    Gemm,
    GemmWeights,
    Interaction,
    ResidualWeights,
)

# What an open dimension is tried at: a request alone, and a batch of them.
ROWS, BATCHES, BAGS = (1, 64), (1, 4), (1, 64)
_TERMS = 20  # per bag in the mean, where a call says how many
_EXTREME = 0.3  # of codes
_CODE_STD = 93.0  # of such codes
_SPREAD = {"u8": 40.0, "s8": 40.0, "f32": 2.0}  # standard deviation of results
_BLOCK = 16 << 20  # bytes of random rows, repeated all over a table
# Rows that turns of calls touch together: more than a cache holds.
_TOUCHED, _TURNS, _INDEX_BYTES = 64 << 20, 256, 16 << 20
_RELATIVE = 1e-5  # float sums are in any order


@dataclass
class Problem:
    """Inputs of one call, and its result.

    `weights` are packed by the kernel. `turns` are the inputs before W, several sets where calls
    must not find their rows in a cache; `after` those between W and the result. `expected` is
    that of the first turn, computed by `dccompile.reference`.
    """

    workload: Any
    weights: Any
    turns: list[tuple[np.ndarray, ...]]
    after: tuple[np.ndarray, ...]
    expected: np.ndarray

    @property
    def nbytes(self) -> int:
        arrays = [a for turn in self.turns for a in turn] + [*self.after, self.expected]
        return sum(a.nbytes for a in arrays)

    def check(self, got: np.ndarray) -> str | None:
        """How a result differs; None if it does not.

        Integers, and what is computed of them without a transcendental function, must be equal,
        as must sums of embeddings, whose order is given; other floats nearly so.
        """
        work, want = self.workload, self.expected
        floats = isinstance(work, Interaction) or getattr(work, "a", "") == "f32"
        if floats or getattr(work, "activation", "none") in ("sigmoid", "tanh"):
            reach = max(1.0, float(np.abs(want).max(initial=0.0)))
            bad = ~(np.abs(got.astype(np.float64) - want) <= _RELATIVE * (reach + np.abs(want)))
        else:
            bad = got != want
        count = int(np.count_nonzero(bad))
        if not count:
            return None
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        values = f"{got[first]}, not {want[first]}"
        return f"{count} of {want.size} values differ, the first at {first}: {values}"


def make(workload: Any, seed: int = 0) -> list[Problem]:
    """Problems of a workload, one for each size that its open dimension is tried at.

    The reference computes about 10 Gop/s of convolutions, 1 of those in groups.
    """
    rng = np.random.default_rng([seed, zlib.crc32(repr(workload).encode())])
    if isinstance(workload, Gemm):
        return _gemm(workload, rng)
    if isinstance(workload, Conv):
        return _conv(workload, rng)
    if isinstance(workload, EmbeddingBag):
        return _bag(workload, rng)
    return _interaction(workload, rng)


def pack(kernel: Kernel[Any, Any], workload: Any, weights: Any, params: Any) -> np.ndarray:
    """W as the kernel packs it, uint8 (bytes,), in memory of large pages as an artifact's is."""
    if not isinstance(workload, EmbeddingBag):
        return kernel.pack(workload, weights, params)
    nbytes, free = kernel.nbytes(workload), _available()  # type: ignore[attr-defined]
    if nbytes > free:
        raise MemoryError(f"tables of {nbytes >> 20} MiB, {free >> 20} MiB of memory are available")
    w = large(nbytes)
    at = 0
    for piece in kernel.pieces(workload, weights.tables):  # type: ignore[attr-defined]
        raw = piece.reshape(-1).view(np.uint8)
        w[at : at + raw.size] = raw
        at += raw.size
    return w


def large(nbytes: int) -> np.ndarray:
    """Zeroed memory, uint8 (nbytes,), of large pages where the system has them."""
    page = 2 << 20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(-1, max(nbytes, 1) + page, flags=flags)
    region.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(region, np.uint8)
    start = -everything.ctypes.data % page
    return everything[start : start + nbytes]


def _available() -> int:
    """Bytes of memory that are free or easily freed."""
    with open("/proc/meminfo") as file:
        found = next(line for line in file if line.startswith("MemAvailable:"))
    return int(found.split()[1]) << 10


# ---- integers ----


def _codes(rng: np.random.Generator, kind: str, shape: tuple[int, ...], bits: int = 8) -> Any:
    """Codes over the whole range, some of them its ends; f32 for floats."""
    if kind == "f32":
        return rng.standard_normal(shape, np.float32)
    low, high = (-64, 64) if bits == 7 else INT8_LIMITS[kind]
    values = rng.integers(low, high, shape, NUMPY[kind], endpoint=True)
    choice = rng.integers(0, 256, shape, np.uint8)
    edge = 128 * _EXTREME
    values[choice < edge] = low
    values[choice >= 256 - edge] = high
    return values


def _zero(kind: str) -> int:
    """A zero point near the mean of codes."""
    return 127 if kind == "u8" else -9


def _centre(out: str, zero_point: int) -> float:
    """Where results before the zero point are to lie."""
    return 120.0 - zero_point if out == "u8" else 0.0


def _scale_and_bias(
    rng: np.random.Generator, work: Gemm | Conv, b: np.ndarray, zero: float, zero_point: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Factors and bias (columns,) that spread the results of an integer workload.

    b (depth, columns) less its zero points; `zero` is A's zero point.
    """
    wide = b.astype(np.float32)
    columns = wide.shape[1]
    std = _CODE_STD * np.sqrt(np.square(wide).sum(axis=0)) + 1.0
    mean = ((127.5 if work.a == "u8" else -0.5) - zero) * wide.sum(axis=0)
    noise = rng.normal(0, 0.5, columns)
    if work.out == "s32":
        bias = np.rint(noise * std).astype(np.int32) if work.bias == "s32" else None
        return None, bias
    spread = _SPREAD[work.out]
    scale = (rng.uniform(0.5, 1.5, columns) * spread / std).astype(np.float32)
    centre = _centre(work.out, zero_point)
    if work.bias == "s32":
        return scale, np.rint(centre / scale - mean + noise * std).astype(np.int32)
    if work.bias == "f32":
        return scale, (centre - mean * scale + noise * spread).astype(np.float32)
    return scale, None


def _gemm(work: Gemm, rng: np.random.Generator) -> list[Problem]:
    if work.a == "f32":
        b = rng.standard_normal((work.k, work.n), np.float32) * np.float32(2 / np.sqrt(work.k))
        bias = rng.standard_normal(work.n, np.float32) if work.bias == "f32" else None
        weights = GemmWeights(b.astype(NUMPY[work.b]), bias=bias)
        if work.b == "s8":
            columns = quantize_columns(b)
            weights = GemmWeights(columns.codes, columns.scale, bias)
    else:
        b = _sums_of_16_bits(work, rng)
        if b is None:
            b = _codes(rng, "s8", (work.k, work.n), work.b_bits)
        b_zero = rng.integers(-128, 128, work.n).astype(np.int32) if work.b_zero else None
        wide = b if b_zero is None else b.astype(np.int32) - b_zero
        scale, bias = _scale_and_bias(rng, work, wide, _zero(work.a), work.zero_point)
        zero = 0 if work.runtime else _zero(work.a)
        weights = GemmWeights(b, scale, bias, zero, b_zero)
    scalars: tuple[np.ndarray, ...] = ()
    if work.runtime:
        scalars = (np.array([_zero(work.a)], NUMPY[work.a]),)
        if work.out != "s32":
            scalars += (np.array([0.9], np.float32),)
    problems = []
    for m in ROWS if work.m is None else (work.m,):
        a = _codes(rng, work.a, (m, work.k))
        expected = reference.gemm(work, weights, a, *scalars)
        problems.append(Problem(work, weights, [(a,)], scalars, expected))
    return problems


def _sums_of_16_bits(work: Gemm, rng: np.random.Generator) -> np.ndarray | None:
    """Weights of which the facts of the workload are true; None where it has none."""
    if work.spill:
        reach = max(1, 128 // (2 * work.spill))
        return rng.integers(-reach, reach, (work.k, work.n), np.int8, endpoint=True)
    if work.outliers:
        return outliers.sample(rng, work.k, work.n, work.outliers)
    return None


def _conv(work: Conv, rng: np.random.Generator) -> list[Problem]:
    weights = _conv_weights(work, rng)
    problems = []
    for batch in BATCHES if work.batch is None else (work.batch,):
        a = _codes(rng, work.a, (batch, *work.size, work.channels))
        after: tuple[np.ndarray, ...] = ()
        if work.residual is not None:
            shape = (batch, *work.outputs, work.filters)
            after = (_codes(rng, work.residual.dtype, shape),)
        expected = reference.conv(replace(work, batch=batch), weights, a, *after)
        problems.append(Problem(work, weights, [(a,)], after, expected))
    return problems


def _conv_weights(work: Conv, rng: np.random.Generator) -> ConvWeights:
    window = (*work.kernel, work.group_channels, work.filters)
    if work.a == "f32":
        b = rng.standard_normal(window, np.float32) * np.float32(2 / np.sqrt(prod(window[:-1])))
        bias = rng.standard_normal(work.filters, np.float32) if work.bias == "f32" else None
        return ConvWeights(b, bias=bias)
    b = _codes(rng, "s8", window, work.b_bits)
    inside = not any(p for pair in work.pads for p in pair)
    out = ConvWeights(b, a_zero=_zero(work.a) if work.padded or inside else 0)
    if work.out in INT8_LIMITS:
        low, high = INT8_LIMITS[work.out]
        out.zero_point = low + 101 if work.shifted else 0
        out.clamp = (low + 3, high - 50) if work.clamped else None
    zero_point = out.zero_point
    if work.residual is not None:
        zero_point = 120 if work.out == "u8" else 0  # `c` brings the sum to its place instead
        out.residual = _residual(work, out.zero_point)
    flat = b.reshape(-1, work.filters)
    out.scale, out.bias = _scale_and_bias(rng, work, flat, out.a_zero, zero_point)
    return out


def _residual(work: Conv, zero_point: int) -> ResidualWeights:
    """A sum whose operands have about equal shares, in the middle of the output's codes."""
    assert work.residual is not None
    middle = {"u8": 127.5, "s8": -0.5}
    a, b = 0.71875, 0.59375
    c = _centre(work.out, zero_point) - b * middle[work.residual.dtype]
    inner = work.residual.inner
    if not inner:
        return ResidualWeights(1.0, b, float(np.float32(c)))
    low, high = INT8_LIMITS[inner]
    shift = low + 128
    return ResidualWeights(a, b, float(np.float32(c - a * shift)), shift, low, high)


# ---- bags and interactions ----


class _Repeated:
    """A table (rows, ...) that is the same block of random rows over and over."""

    def __init__(self, block: np.ndarray, rows: int) -> None:
        self.block, self.rows = block, rows

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self.block[np.where(index < 0, index + self.rows, index)
                                      % len(self.block)]  # fmt: skip
        return rows

    def __iter__(self) -> Iterator[np.ndarray]:
        for first in range(0, self.rows, len(self.block)):
            yield self.block[: self.rows - first]


def _bag(work: EmbeddingBag, rng: np.random.Generator) -> list[Problem]:
    most = max(1, _BLOCK // work.row_bytes)
    blocks = {count: _rows(work, rng, count) for count in {min(r, most) for r in work.rows}}
    tables = [_Repeated(blocks[min(rows, most)], rows) for rows in work.rows]
    weights = EmbeddingTables(tables)  # type: ignore[arg-type]
    problems = []
    for bags in BAGS if work.bags is None else (work.bags,):
        terms = _TERMS if work.pooling is None else work.pooling
        touched = max(1, bags * work.tables * terms)
        count = min(
            _TURNS, ceil(_TOUCHED / (touched * work.row_bytes)), _INDEX_BYTES // (8 * touched)
        )
        turns = [_index(work, rng, bags) for _ in range(max(2, count))]
        expected = reference.embedding_bag(work, weights, *_named(work, turns[0]))
        problems.append(Problem(work, weights, turns, (), expected))
    return problems


def _rows(work: EmbeddingBag, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random rows as stored; scales of either sign, so that sums cancel."""
    if work.storage in ("f32", "f16"):
        return rng.standard_normal((count, work.dim), np.float32).astype(NUMPY[work.storage])
    rows = rng.integers(0, 256, (count, work.row_bytes), np.uint8)
    parts = rng.uniform(-1, 1, (count, 2)).astype(NUMPY[work.scale]).view(np.uint8)
    rows[:, -parts.shape[1] :] = parts
    return rows


def _index(work: EmbeddingBag, rng: np.random.Generator, bags: int) -> tuple[np.ndarray, ...]:
    """Indices over whole tables, first and last rows among them; then cuts and weights, if any."""
    kind = NUMPY[work.index]
    size: tuple[int, ...] = (bags, work.tables, work.pooling or 0)
    cuts = None
    if work.layout != "fixed":
        lengths = rng.integers(0, 2 * _TERMS, bags, endpoint=True)
        ends = np.append(0, np.cumsum(lengths))
        cuts = {"lengths": lengths, "offsets": ends[:-1], "offsets+1": ends}[work.layout]
        size = (1, 1, int(ends[-1]))
    rows = np.array(work.rows)[None, :, None]
    low = -rows if work.negative else np.zeros_like(rows)
    index = rng.integers(low, rows, size)
    index[..., :1] = low
    index[..., 1:2] = rows - 1
    if work.padding is not None:
        index[rng.random(index.shape) < 0.1] = work.padding
    index = index if work.layout == "fixed" else index.reshape(-1)
    found = [index.astype(kind)]
    if cuts is not None:
        found.append(cuts.astype(kind))
    if work.weighted:
        found.append(rng.uniform(-2, 2, index.shape).astype(np.float32))
    return tuple(found)


def _named(
    work: EmbeddingBag, turn: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Index, cuts and weights of a turn, None for what it lacks."""
    index, *rest = turn
    cuts = None if work.layout == "fixed" else rest.pop(0)
    return index, cuts, rest.pop(0) if work.weighted else None


def _interaction(work: Interaction, rng: np.random.Generator) -> list[Problem]:
    problems = []
    for bags in BAGS if work.bags is None else (work.bags,):
        dense = rng.standard_normal((bags, work.dim), np.float32)
        rows = rng.standard_normal((bags, work.vectors - 1, work.dim), np.float32)
        x = np.concatenate([dense[:, None], rows], axis=1).astype(np.float64)
        products = x @ x.transpose(0, 2, 1)
        pairs = [(i, j) for i in range(work.vectors) for j in work.row(i)]
        taken = [products[:, i, j] for i, j in pairs]
        expected = np.concatenate([dense, np.stack(taken, axis=1)], axis=1).astype(np.float32)
        problems.append(Problem(work, None, [(dense, rows)], (), expected))
    return problems
