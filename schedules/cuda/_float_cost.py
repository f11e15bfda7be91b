"""Expected times of the float kernels' blocks on a GPU. Models, not measurements.

Work of a block: instructions of a warp, of which each of a multiprocessor's 4 schedulers starts
one a cycle; k after k waits for memory and for sums, so that a lone warp needs at least `_LATENCY`
cycles a k. Memory: every byte of A, W and C once, at the machine's bandwidth as far as enough
blocks ask for it.
"""

from __future__ import annotations

from typing import Any

from ._float_layout import Layout
from ._float_rows import Rows
from ._float_tile import Block
from ._ir import ceil_div
from ._split_tile import SplitBlock

__all__ = ["rows_us", "split_us", "tile_us"]

_START = 2.0  # us of a launch, fill and end of the pipeline
_LATENCY = 10.0  # cycles a k of a lone warp, at least
_IN_FLIGHT = 16 << 10  # bytes that a block of few rows has under way
_L2 = 1.6  # times as fast as memory
_MEMORY = 0.7  # us until memory answers


def tile_us(block: Block, m: int, lay: Layout, machine: Any) -> float:
    """Of C's tiles on the FMA units."""
    per_k = block.tm * block.tn + 0.75 * (block.tm + block.tn) + 3
    if lay.kind != "f32":
        per_k += 2.5 * block.bn / (block.threads / block.slices) * block.slices
    warps = block.threads / 32
    loads = warps * (block.tm + block.tn) / 2  # of 128 bytes, one a cycle, two each
    busy = max(per_k * max(warps / 4, 1.0), loads)
    steps = ceil_div(lay.k_tiles * block.bk, block.slices)
    cycles = steps * max(busy, _LATENCY + per_k) + lay.k_tiles * 60 + block.tm * block.tn * 8
    return _bound_us(block, cycles, steps * busy, m, lay, machine)


def _bound_us(block: Any, cycles: float, busy: float, m: int, lay: Layout, machine: Any) -> float:
    """Of blocks that take `cycles` alone, of which the schedulers or tensor cores work `busy`.

    Every tile reads its part of A and W from L2.
    """
    tiles = ceil_div(m, block.bm) * lay.tiles * lay.groups
    waves = ceil_div(tiles, machine.multiprocessors)
    total = max(cycles, waves * (0.25 * cycles + 0.75 * busy)) if waves > 1 else cycles
    moved = 4 * m * (lay.k + lay.n) * lay.groups + lay.nbytes
    again = tiles * lay.k_tiles * (4 * block.bm * block.bk + lay.tile)
    memory = max(moved, again / _L2) / (machine.bandwidth * 1e3)
    return _START + max(total / (machine.clock * 1e3), memory)


def rows_us(rows: Rows, machine: Any) -> float:
    """Of a pass over the weights."""
    lay = rows.lay
    share = min(1.0, rows.blocks * _IN_FLIGHT / (_MEMORY * machine.bandwidth * 1e3))
    moved = lay.nbytes / (machine.bandwidth * 1e3 * share)
    items = ceil_div(rows.total, rows.lines)
    per_item = rows.count * rows.own * rows.deep + rows.count * rows.deep / 2 + 12
    cycles = ceil_div(rows.blocks, machine.multiprocessors) * items * per_item * 2
    again = rows.blocks * rows.count * lay.k * 4  # A, from L2
    moved += again / (_L2 * machine.bandwidth * 1e3)
    adding = 0.002 * rows.count * rows.own
    return _START + adding + max(moved, cycles / (machine.clock * 1e3))


def split_us(block: SplitBlock, m: int, lay: Layout, machine: Any) -> float:
    """Of C's tiles on the tensor cores, two mma for each."""
    tiles = 2 * block.fm * block.fn
    rate = 6.3 if int(machine.arch[3:]) >= 90 else 8.0  # cycles of an m16n8k8 by one of 4 cores
    # of 8 k: mma, split, widening, sums of bk
    issued = 2 * tiles + 20 * block.fm + 10 * block.fn + 8 + 64 * block.fm * block.fn / block.bk
    per_8k = max(2 * tiles * rate, issued)
    warps = block.threads / 32
    busy = per_8k * max(warps / 4, 1.0)
    steps = lay.k_tiles * block.bk / 8
    cycles = steps * max(busy, 60.0 + per_8k / 2) + lay.k_tiles * 240 / block.stages + 16 * tiles
    return _bound_us(block, cycles, steps * busy, m, lay, machine)
