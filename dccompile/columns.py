"""Weight matrices in up to 8 bits: symmetric codes, a scale of least squared error per column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RATIOS = np.linspace(1.0, 0.5, 51, dtype=np.float32)  # of the scale that clips nothing
_PATIENCE = 8  # ratios in a row that are better for no row end the search
_CHUNK = 1 << 17  # weights that are searched at a time: they and their errors fit L2
_TINY = np.finfo(np.float32).tiny  # scales are normal numbers


@dataclass(frozen=True)
class Columns:
    """codes (k, n) s8, scale (n,) f32, all positive. Values are f32(codes) * scale.

    `relative`: root of the squared differences over the squared weights; `plain`: the same if the
    greatest weight of every column had the greatest code.
    """

    codes: np.ndarray
    scale: np.ndarray
    relative: float
    plain: float

    def values(self) -> np.ndarray:
        return self.codes.astype(np.float32) * self.scale


def quantize_columns(weights: np.ndarray, bits: int = 8) -> Columns:
    """Of float32 weights (k, n), all finite. A column of zeros has the scale 1.

    Codes are symmetric, -127 .. 127 with 8 `bits`.
    """
    limit = np.float32(2 ** (bits - 1) - 1)
    k, n = weights.shape
    codes, scale = np.empty((n, k), np.int8), np.empty(n, np.float32)
    squares, plain = 0.0, 0.0
    step = max(1, _CHUNK // max(1, k))
    for first in range(0, n, step):
        part = slice(first, first + step)
        rows = np.ascontiguousarray(weights[:, part].T)
        scale[part], least, widest = best_scales(rows, limit)
        codes[part] = _rounded(rows, scale[part], limit)
        squares += float(least.sum(dtype=np.float64))
        plain += float(widest.sum(dtype=np.float64))
    total = float(np.square(weights, dtype=np.float64).sum()) or 1.0
    errors = (float(np.sqrt(x / total)) for x in (squares, plain))
    return Columns(np.ascontiguousarray(codes.T), scale, *errors)


def best_scales(rows: np.ndarray, limit: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows (rows, k): scale, its squared error, that of the scale that clips nothing; (rows,).

    Of few weights some scale rounds all luckily; of many a few are better clipped than all others
    rounded coarsely.
    """
    widest = np.abs(rows).max(axis=1, initial=0) / limit
    widest = np.where(widest > 0, np.maximum(widest, _TINY), np.float32(1))
    best, least, plain = widest, np.full(len(rows), np.inf), np.zeros(len(rows))
    idle = 0
    for ratio in _RATIOS:
        scale = np.maximum(widest * ratio, _TINY)
        error = _rounded(rows, scale, limit)
        error *= scale[:, None]
        error -= rows
        found = np.einsum("ij,ij->i", error, error)
        if ratio == 1:
            plain = found
        better = found < least
        best, least = np.where(better, scale, best), np.where(better, found, least)
        idle = 0 if better.any() else idle + 1
        if idle == _PATIENCE:
            break
    return best.astype(np.float32), least, plain


def _rounded(rows: np.ndarray, scale: np.ndarray, limit: np.float32) -> np.ndarray:
    """Codes as float32."""
    codes = np.rint(rows / scale[:, None])
    return np.clip(codes, -limit, limit, out=codes)
