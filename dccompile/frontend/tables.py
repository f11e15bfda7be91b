"""The rows of recovered embedding tables as kernels store them, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..tables import RowError, half_rows, quantize_rows
from .bags import BagSite

_BLOCK = 4 << 20  # bytes of float rows that are converted at a time
_BITS = {"u8": 8, "u4": 4}


def stored(site: BagSite) -> Iterator[Iterable[np.ndarray]]:
    """Every table of a site, as blocks of rows of the workload's storage.

    Notes in `site.errors` what storing them changed. Raises ModelError naming table and row of a
    value that the storage cannot hold.
    """
    for name, array in zip(site.tables, site.arrays, strict=True):
        yield _blocks(site, name, array)


def _blocks(site: BagSite, name: str, array: np.ndarray) -> Iterator[np.ndarray]:
    work, error = site.workload, RowError()
    kept = {"float32": "f32", "float16": "f16"}[array.dtype.name] == work.storage
    step = max(1, _BLOCK // (4 * work.dim))
    for first in range(0, len(array), step):
        block = array[first : first + step]
        if kept:
            yield block
            continue
        if work.storage == "f16":
            rows, change = half_rows(block, name=f"table '{name}'", first=first)
        else:
            bits = _BITS[work.storage]
            rows, change = quantize_rows(block, bits, work.scale, None, f"table '{name}'", first)
        error += change
        yield rows
    if not kept:
        site.errors[name] = error


def report(site: BagSite) -> list[dict[str, Any]]:
    """Per table of a site: its size and, where rows are stored in fewer bits, their error."""
    work = site.workload
    return [
        {
            "name": name,
            "rows": rows,
            "dim": work.dim,
            "precision": site.precision,
            "bytes": rows * work.row_bytes,
            "relative_error": site.errors[name].relative if name in site.errors else 0.0,
            "largest_error": site.errors[name].largest if name in site.errors else 0.0,
        }
        for name, rows in zip(site.tables, work.rows, strict=True)
    ]
