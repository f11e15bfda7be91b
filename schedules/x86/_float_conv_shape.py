"""Which taps a tile of output pixels has: the geometry of a channels-last convolution.

A tile is `rows` x `columns` output pixels, consecutive in C. Taps outside of A are left out, so a
tile at a border has, for every kernel row, runs of kernel columns that only some pixels take part
in. One row of pixels leaves rows outside of A out at run time, by the bounds of its loop over kh;
several rows (C narrower than a tile) have their own steps for every kh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

from ...workload import Conv

Pixels = tuple[int, ...]


def ceil_div(a: Any, b: Any) -> Any:
    return (a + (b - 1)) // b


def flat(work: Conv) -> bool:
    """Whether every output has one tap, in its own place, or all of a row, which is its own.

    C's pixels are then like those of a matrix product.
    """
    width, row = work.size[2], work.kernel[2]
    own = row == 1 or work.dilations[2] == 1
    apart = width == row or (width % row == 0 and work.strides[2] == row)
    ones = work.kernel[:2] == work.strides[:2] == (1, 1)
    return own and apart and ones and not any(map(any, work.pads))


def squeezed(work: Conv) -> Conv:
    """The same convolution with as many pixels as possible in its last spatial dims.

    Trailing dims of one pixel and one tap move to the front; those of a flat one become one.
    """
    if flat(work):
        row = work.kernel[2]
        return replace(work, size=(1, 1, prod(work.size)), strides=(1, 1, row))
    for _ in range(2):
        if work.size[2] == work.kernel[2] == work.outputs[2] == 1 and not any(work.pads[2]):
            turned = {
                name: (getattr(work, name)[2], *getattr(work, name)[:2])
                for name in ("size", "kernel", "strides", "dilations", "pads")
            }
            work = replace(work, **turned)
    return work


@dataclass(frozen=True)
class Run:
    """Kernel columns kx .. kx + count - 1, which these pixels of a tile have."""

    kx: int
    count: int
    pixels: Pixels


@dataclass(frozen=True)
class Taps:
    """Kernel rows kh .. kh + count - 1, all with the same runs; count None: as the loop says."""

    kh: int
    count: int | None
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Cell:
    """`count` equal tiles, `step` apart, the first at `first`: an output column, or row.

    A tile is `rows` x `columns` pixels.
    """

    first: int
    count: int
    step: int
    rows: int
    columns: int
    taps: tuple[Taps, ...]


def valid(work: Conv, dim: int, at: int) -> range:
    """Taps of spatial dim `dim` that output position `at` has inside of A."""
    start = work.pads[dim][0] - at * work.strides[dim]
    dilation = work.dilations[dim]
    low = max(0, ceil_div(start, dilation))
    high = min(work.kernel[dim], (work.size[dim] - 1 + start) // dilation + 1)
    return range(low, max(low, high))


def whole(work: Conv, dim: int) -> bool:
    """Whether every output position has every tap of dim `dim`."""
    full = range(work.kernel[dim])
    return all(valid(work, dim, at) == full for at in {0, work.outputs[dim] - 1})


def _runs(work: Conv, columns: Iterable[int], rows: Pixels = (0,)) -> tuple[Run, ...]:
    """Runs of a tile whose pixels are `rows` of `columns`; `rows` those that have the tap."""
    columns = list(columns)
    have = [valid(work, 2, x) for x in columns]

    def pixels(kx: int) -> Pixels:
        return tuple(
            r * len(columns) + i for r in rows for i in range(len(columns)) if kx in have[i]
        )

    runs = []
    for subset, group in groupby(range(work.kernel[2]), key=pixels):
        taps = list(group)
        if subset:
            runs.append(Run(taps[0], len(taps), subset))
    return tuple(runs)


def _merged(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Neighbours that differ only in position as one."""
    last: Cell | None = None
    for cell in cells:
        if last is not None:
            gap = cell.first - (last.first + (last.count - 1) * last.step)
            same = replace(cell, first=0, count=0, step=0) == replace(
                last, first=0, count=0, step=0
            )
            if same and (last.count == 1 or gap == last.step):
                last = replace(last, count=last.count + 1, step=gap)
                continue
            yield last
        last = cell
    if last is not None:
        yield last


def columns_of(work: Conv, most: int) -> list[Cell]:
    """Tiles of at most `most` pixels of one row of C, balanced."""
    width = work.outputs[2]
    blocks = ceil_div(width, most)
    cells, x = [], 0
    for block in range(blocks):
        columns = width // blocks + (block < width % blocks)
        taps = Taps(0, None, _runs(work, range(x, x + columns)))
        cells.append(Cell(x, 1, 0, 1, columns, (taps,)))
        x += columns
    return list(_merged(cells))


def rows_of(work: Conv, rows: int) -> list[Cell]:
    """Tiles of at most `rows` whole rows of C."""
    height, width = work.outputs[1:]

    def taps(first: int, count: int) -> tuple[Taps, ...]:
        have = [valid(work, 1, first + r) for r in range(count)]
        per_tap = [
            (kh, _runs(work, range(width), tuple(r for r in range(count) if kh in have[r])))
            for kh in range(work.kernel[1])
        ]
        result = []
        for runs, group in groupby(per_tap, key=lambda pair: pair[1]):
            found = [kh for kh, _ in group]
            if runs:
                result.append(Taps(found[0], len(found), runs))
        return tuple(result)

    counts = [min(rows, height - y) for y in range(0, height, rows)]
    return list(
        _merged(
            Cell(i * rows, 1, 0, count, width, taps(i * rows, count))
            for i, count in enumerate(counts)
        )
    )


__all__ = [
    "Cell",
    "Run",
    "Taps",
    "ceil_div",
    "columns_of",
    "flat",
    "rows_of",
    "squeezed",
    "valid",
    "whole",
]
