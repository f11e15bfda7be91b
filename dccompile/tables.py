"""Embedding tables in fewer bits: row by row, each with the least L2 error that is found.

A row of codes is u8, or two u4 to a byte with the lower nibble first, followed by its scale and
bias: value = code * scale + bias. Both are stored as f32 or f16, and codes are chosen for them as
stored. Tables are read and written in chunks of rows that fit a second-level cache, so that
memory-mapped ones of any size pass through little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import ModelError, Problem
from .workload import NUMPY

_CHUNK = 1 << 16  # elements
# Shares of max - min by which to move an end of the range inwards, one end after the other, and
# rounds of least squares after that. With 8 bits a narrower range does not pay. Of 4 bits, the
# whole grid of 16 x 16 ranges would lower the error by another 0.5 to 0.8 %.
_MOVES: dict[int, tuple[tuple[float, ...], ...]] = {8: (), 4: ((0.05, 0.1, 0.15), (-0.025, 0.025))}
_ROUNDS = {8: 2, 4: 3}


@dataclass(frozen=True)
class RowError:
    """What storing rows in fewer bits changed; those of the parts of a table add up with `+`.

    `values`: the sum of the squares of all values · `squares`: of all differences · `plain`: of the
    differences if rows were quantized from their least to their greatest value · `largest`: the
    greatest difference, in row `row`.
    """

    values: float = 0.0
    squares: float = 0.0
    plain: float = 0.0
    largest: float = 0.0
    row: int = 0

    def __add__(self, other: RowError) -> RowError:
        worst = self if self.largest >= other.largest else other
        return RowError(
            self.values + other.values,
            self.squares + other.squares,
            self.plain + other.plain,
            worst.largest,
            worst.row,
        )

    @property
    def relative(self) -> float:
        """Root of the squared differences over the squared values."""
        return float(np.sqrt(self.squares / self.values)) if self.values else 0.0

    @property
    def relative_plain(self) -> float:
        return float(np.sqrt(self.plain / self.values)) if self.values else 0.0


def _error(first: int, x: np.ndarray, stored: np.ndarray, plain: np.ndarray | None) -> RowError:
    """Of rows from number `first` on; `plain` (rows, 1) squared differences, None: the same."""
    wide = x.astype(np.float64)
    gap = wide - stored
    squares = float(np.square(gap).sum())
    worst = np.abs(gap).max(axis=1)
    return RowError(
        float(np.square(wide).sum()),
        squares,
        squares if plain is None else float(plain.sum(dtype=np.float64)),
        float(worst.max()),
        first + int(worst.argmax()),
    )


def quantize_rows(
    table: np.ndarray,
    bits: int,
    scale: str = "f32",
    out: np.ndarray | None = None,
    name: str = "table",
    first: int = 0,
) -> tuple[np.ndarray, RowError]:
    """Rows (rows, row_bytes) uint8 of `bits` (8 or 4) for a float table (rows, dim), and the error.

    `scale` is the type of a row's scale and bias, f32 or f16. `out`, where given, is filled and
    returned: a view of a memory-mapped file, say. Raises ModelError naming the row that cannot be
    quantized; `first` is the number of the first row, where `table` is part of a larger one.
    """
    rows, dim = table.shape
    width = dim if bits == 8 else (dim + 1) // 2
    kind = np.dtype(NUMPY[scale])
    if out is None:
        out = np.empty((rows, width + 2 * kind.itemsize), np.uint8)
    error = RowError()
    for start, x in _chunks(table, name, first):
        target = out[start : start + len(x)]
        codes, factor, bias, plain = _fit(x, bits, kind)
        for row in np.flatnonzero(~np.isfinite(factor + bias).all(axis=1))[:1]:
            found = f"its range does not fit a scale of {scale}"
            raise _refused(name, first + start + int(row), found)
        if bits == 8:
            target[:, :width] = codes
        else:
            even, odd = codes[:, 0::2].astype(np.uint8), codes[:, 1::2].astype(np.uint8)
            target[:, :width] = even
            target[:, : odd.shape[1]] |= odd << 4
        parts = np.concatenate([factor, bias], axis=1).astype(kind)
        target[:, width:] = parts.view(np.uint8)
        error += _error(first + start, x, codes * factor + bias, plain)
    return out, error


def half_rows(
    table: np.ndarray, out: np.ndarray | None = None, name: str = "table", first: int = 0
) -> tuple[np.ndarray, RowError]:
    """A float table (rows, dim) as f16, and the error; otherwise as `quantize_rows`."""
    if out is None:
        out = np.empty(table.shape, np.float16)
    error = RowError()
    for start, x in _chunks(table, name, first):
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        for row in np.flatnonzero(~np.isfinite(half).all(axis=1))[:1]:
            raise _refused(name, first + start + int(row), "it holds a value beyond 65504")
        out[start : start + len(x)] = half
        error += _error(first + start, x, half, None)
    return out, error


def dequantize_rows(codes: np.ndarray, bits: int, dim: int, scale: str = "f32") -> np.ndarray:
    """The values (rows, dim) f32 of rows as quantize_rows writes them."""
    width = dim if bits == 8 else (dim + 1) // 2
    raw = codes[:, :width]
    if bits == 4:
        raw = np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), 2 * width)[:, :dim]
    parts = np.ascontiguousarray(codes[:, width:]).view(NUMPY[scale]).astype(np.float32)
    return raw.astype(np.float32) * parts[:, :1] + parts[:, 1:]


def _chunks(table: np.ndarray, name: str, number: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and values of every chunk, f32, or f64 where squares could overflow f32."""
    rows, dim = table.shape
    if not rows or not dim:
        raise ModelError(
            [Problem("DC3160", name, f"a table of shape {list(table.shape)}", "give it some rows")]
        )
    step = max(1, _CHUNK // dim)
    for first in range(0, rows, step):
        x = np.asarray(table[first : first + step], np.float32)
        top = np.abs(x).max()
        if not np.isfinite(top):
            row, column = np.argwhere(~np.isfinite(x))[0]
            found = f"it holds {x[row, column]} in column {column}"
            raise _refused(name, number + first + int(row), found)
        yield first, x if top < 1e15 else x.astype(np.float64)


def _refused(name: str, row: int, found: str) -> ModelError:
    fix = "correct the row, or leave this table in f32"
    return ModelError([Problem("DC3161", f"{name}, row {row}", found, fix)])


def _fit(
    x: np.ndarray, bits: int, kind: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases (rows, 1) of least error, and the error of plain min-max.

    A range inside the row's own rounds most values more finely and clips a few. From the best
    range found, least squares gives the scale and bias that fit the codes, and these better codes.
    """
    levels = 2**bits - 1
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    whole = high - low
    with np.errstate(over="ignore", invalid="ignore"):
        best = _stored(x, whole / levels, low, levels, kind)
        plain = best[3]
        for shares in _MOVES[bits]:
            for inwards in (1, 0), (0, -1):
                start = low, high
                for share in shares:
                    ends = [e + way * share * whole for e, way in zip(start, inwards, strict=True)]
                    found = _stored(x, (ends[1] - ends[0]) / levels, ends[0], levels, kind)
                    wins = found[3] < best[3]
                    low, high = (
                        np.where(wins, e, b) for e, b in zip(ends, (low, high), strict=True)
                    )
                    best = _better(best, found)
        for _ in range(_ROUNDS[bits]):
            codes = best[0]
            centre, mean = codes.mean(axis=1, keepdims=True), x.mean(axis=1, keepdims=True)
            spread = codes - centre
            square = np.square(spread).sum(axis=1, keepdims=True)
            slope = (spread * (x - mean)).sum(axis=1, keepdims=True)
            slope = np.divide(slope, square, out=np.zeros_like(slope), where=square > 0)
            slope = slope.astype(kind).astype(x.dtype)
            best = _better(best, _stored(x, slope, mean - slope * centre, levels, kind))
    codes, factor, bias, _ = best
    return codes, factor, bias, plain


def _stored(
    x: np.ndarray, factor: np.ndarray, bias: np.ndarray, levels: int, kind: np.dtype
) -> list[np.ndarray]:
    """Codes for a scale and bias rounded to `kind`, these, and the squared errors (rows, 1)."""
    factor = factor.astype(kind).astype(x.dtype)
    bias = bias.astype(kind).astype(x.dtype)
    codes = np.divide(x - bias, factor, out=np.zeros_like(x), where=factor != 0)
    codes = np.clip(np.rint(codes), 0, levels)
    gap = codes * factor
    gap += bias
    gap -= x
    return [codes, factor, bias, np.square(gap).sum(axis=1, keepdims=True)]


def _better(best: list[np.ndarray], found: list[np.ndarray]) -> list[np.ndarray]:
    """Row by row the one with the smaller error."""
    wins = found[3] < best[3]
    return [np.where(wins, f, b) for f, b in zip(found, best, strict=True)]
