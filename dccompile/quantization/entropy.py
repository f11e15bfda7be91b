"""The threshold of least KL divergence, as TensorRT and ONNX Runtime calibrate."""

from __future__ import annotations

import numpy as np

_BINS = 2048  # at most, of absolute values
_CANDIDATES = 256
_TINY = 1e-4  # count of a bin that is empty in one of two distributions which are compared


def threshold(values: np.ndarray, counts: np.ndarray, width: float) -> tuple[float, float]:
    """The ends of the range for values from a histogram whose bins are this wide, none 0.

    [-t, t] where both signs occur, else [0, t] or [-t, 0]: the t for which the distribution of
    the absolute values, those beyond t moved there, is most like itself quantized. Levels have
    the width that codes would have. t is not beyond the data on either side.
    """
    negative, positive = bool((values < 0).any()), bool((values > 0).any())
    levels = 128 if negative and positive else 256
    numbers = np.floor(np.abs(values) / width).astype(np.int64)
    group = int(numbers.max()) // _BINS + 1  # whole bins, else counts would ripple
    p = np.bincount(numbers // group, counts).astype(np.float64)
    ends = np.unique(np.linspace(min(levels, p.size), p.size, _CANDIDATES).astype(np.int64))
    t = float(min(ends, key=lambda end: _divergence(p, int(end), levels))) * group * width
    return max(-t, min(values.min(), 0.0)), min(t, max(values.max(), 0.0))


def _divergence(p: np.ndarray, end: int, levels: int) -> float:
    """KL divergence of the first `end` bins, the others added to the last, from their levels."""
    whole = p[:end].copy()
    level = np.arange(end) * levels // end
    used = (p[:end] > 0).astype(np.float64)
    sums, bins = np.bincount(level, p[:end]), np.bincount(level, used)
    q = np.divide(sums, bins, out=np.zeros_like(sums), where=bins > 0)[level] * used
    whole[-1] += p[end:].sum()
    whole, q = np.maximum(whole, _TINY), np.maximum(q, _TINY)
    whole, q = whole / whole.sum(), q / q.sum()
    return float((whole * np.log(whole / q)).sum())
