"""Where everything is in W: tiles of weights in the order in which blocks read them.

    W: group 0: tile (n 0, k 0), (n 0, k 1), .. , (n 1, k 0) ..  | group 1 .. | scale | bias | flag

A tile is bk x bn weights, zeros where K or N end. Its 16-byte items hold

- f32: 4 columns of one k; items in the order (k, n / 4)
- s8:  4 columns of 4 k, a column a word; (k / 4, n / 4)
- f16: columns g and g + 8 of a 16 x 16 block, of 4 k from 4t; (k / 16, n / 16, g, t): what lane
  4g + t of a warp feeds to the tensor cores, whose order of k is free as long as A has the same

scale, bias: f32 of every column, padding included. flag: 1 if a weight is infinite or NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._ir import ceil_div

__all__ = ["Layout", "pack"]

_STEP = {"f32": 1, "s8": 4, "f16": 16}  # k of a row of items
_SIZE = {"f32": 4, "s8": 1, "f16": 2}


@dataclass(frozen=True)
class Layout:
    """Offsets are in bytes, n and k those of a group."""

    kind: str  # f32 | f16 | s8
    n: int
    k: int
    bn: int
    bk: int
    groups: int
    scaled: bool
    biased: bool

    @property
    def size(self) -> int:
        return _SIZE[self.kind]

    @property
    def step(self) -> int:
        """k of a row of items."""
        return _STEP[self.kind]

    @property
    def tiles(self) -> int:
        """Along n."""
        return ceil_div(self.n, self.bn)

    @property
    def k_tiles(self) -> int:
        return ceil_div(self.k, self.bk)

    @property
    def columns(self) -> int:
        """Of a group, padded."""
        return self.tiles * self.bn

    @property
    def tile(self) -> int:
        return self.bn * self.bk * self.size

    @property
    def group(self) -> int:
        return self.tiles * self.k_tiles * self.tile

    @property
    def _row(self) -> int:
        return ceil_div(self.groups * self.columns * 4, 64) * 64

    @property
    def scale(self) -> int | None:
        return self._scale if self.scaled else None

    @property
    def bias(self) -> int | None:
        return self._bias if self.biased else None

    @property
    def _scale(self) -> int:
        return ceil_div(self.groups * self.group, 64) * 64

    @property
    def _bias(self) -> int:
        return self._scale + (self._row if self.scaled else 0)

    @property
    def flag(self) -> int:
        return self._bias + (self._row if self.biased else 0)

    @property
    def nbytes(self) -> int:
        return self.flag + 64


def pack(lay: Layout, b: np.ndarray, scale: Any = None, bias: Any = None) -> np.ndarray:
    """W of weights (groups, k, n) and, by column, scale and bias (groups * n,)."""
    padded = np.zeros((lay.groups, lay.k_tiles * lay.bk, lay.columns), b.dtype)
    padded[:, : lay.k, : lay.n] = b
    t = padded.reshape(lay.groups, lay.k_tiles, lay.bk, lay.tiles, lay.bn)
    t = t.transpose(0, 3, 1, 2, 4)  # group, n tile, k tile, k, n
    lead = t.shape[:3]
    if lay.kind == "s8":
        t = t.reshape(*lead, lay.bk // 4, 4, lay.bn).swapaxes(-1, -2)
    elif lay.kind == "f16":
        t = t.reshape(*lead, lay.bk // 16, 4, 4, lay.bn // 16, 2, 8)  # .., t, k, .., half, g
        t = t.transpose(0, 1, 2, 3, 6, 8, 4, 7, 5)
    out = np.zeros(lay.nbytes, np.uint8)
    raw = np.ascontiguousarray(t).reshape(-1).view(np.uint8)
    out[: raw.size] = raw
    for at, values in ((lay.scale, scale), (lay.bias, bias)):
        if at is not None:
            row = np.zeros((lay.groups, lay.columns), np.float32)
            row[:, : lay.n] = np.asarray(values, np.float32).reshape(lay.groups, lay.n)
            out[at : at + row.nbytes] = row.view(np.uint8).reshape(-1)
    if lay.kind != "s8" and not np.isfinite(b).all():
        out[lay.flag] = 1
    return out
