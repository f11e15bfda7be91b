"""Dot products of all pairs of a sample's vectors on a GPU.

A sample's vectors are copied to shared memory, `chunk` of their elements at a time; the sums stay
in registers. A thread has the t x t products of vectors I, I + g, I + 2g, .. with vectors J, J + g,
J + 2g, .., where g = vectors / t rounded up and J <= I: with t = 4, 27 vectors are the 28 tiles of
a 7 x 7 triangle, a warp. The threads of a tile's row I read vectors that follow each other, each
of an odd number of 16-byte words, so that 8 of them lie in different banks.

The triangle of tiles is folded to a rectangle, of g rows for odd g and g + 1 for even:

    00             00  66  65  64     row p, column q, odd g: tile (p, q) if q <= p,
    10 11          10  11  55  54     else tile (g - 1 - p, g - q)
    20 21 22       20  21  22  44
    ..             ..

The products are put in order in the same shared memory, then dense vector and products are stored
as one run of the output.

Arithmetic for an H100, 27 vectors of 64: a sample is 6.9 KB in and 1.7 KB out, 2.6 ns of 3.35 TB/s;
its 28 x 16 sums of 64 products are 32 x 1024 multiply-adds with 32 lanes, 1024 cycles of one of
528 schedulers: 1.1 ns; its loads from shared memory, 128 of 16 bytes a lane, about 256 cycles of
one of 132 multiprocessors: 1.1 ns. So memory bounds it. Expected, not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Interaction

_MOST = 128  # vectors
_SHARED = 40 << 10  # bytes of a block
_WARPS = 8  # of a sample, at most
_BLOCK = 4  # warps of a block that has several samples
_LOADS = 4  # issue slots of a 16-byte load from shared memory


@dataclass(frozen=True)
class Tile:
    tile: int = 4  # t: products of t x t vectors in a thread


@dataclass(frozen=True)
class Plan:
    """How a workload is shared: all in threads, vectors or elements."""

    tile: int
    groups: int  # g
    warps: int  # of a sample
    each: int  # tiles of a thread
    samples: int  # of a block
    chunk: int  # elements of a vector in shared memory at a time
    stride: int  # from one vector to the next there

    @property
    def tiles(self) -> int:
        return self.groups * (self.groups + 1) // 2

    @property
    def threads(self) -> int:
        """Threads of a sample."""
        return self.warps * 32


def plan(work: Interaction, tile: int) -> Plan:
    """The shares for tiles of tile x tile."""
    groups = -(-work.vectors // tile)
    tiles = groups * (groups + 1) // 2
    warps = min(_WARPS, -(-tiles // 32))
    samples = max(1, _BLOCK // warps)
    room = _SHARED // samples // work.vectors // 16  # words of 16 bytes of a vector
    words = min(-(-work.dim // 4), room - 1 if room % 2 == 0 else room)
    chunks = -(-work.dim // (4 * words))
    chunk = -(-work.dim // (4 * chunks)) * 4
    stride = chunk if chunk % 8 else chunk + 4
    return Plan(tile, groups, warps, -(-tiles // (warps * 32)), samples, chunk, stride)


class InteractionKernel(Kernel[Interaction, None]):
    """out = dense, then the triangle of x times its transpose."""

    Params: ClassVar[type] = Tile
    SPACE: ClassVar = {"tile": (2, 4)}

    def refuses(self, workload: Interaction) -> str | None:
        if workload.vectors > _MOST:
            return f"{workload.vectors} vectors, more than {_MOST}"
        return None

    def registers(self, params: Tile) -> int:
        """Sums and addresses of as many tiles as 128 vectors need, and operands."""
        each = plan(Interaction(_MOST, 4), params.tile).each
        return (params.tile + 2) * params.tile * each + 8 * params.tile + 40

    def default(self, workload: Interaction, machine: Machine) -> Tile:
        return min(
            (Tile(t) for t in self.SPACE["tile"]),
            key=lambda p: self.estimate(workload, p, machine),
        )

    def effect(self, workload: Interaction, params: Tile) -> Hashable:
        return plan(workload, params.tile)

    def estimate(self, workload: Interaction, params: Tile, machine: Machine) -> float:
        """Issue slots of a sample for 4 elements."""
        shares, t = plan(workload, params.tile), params.tile
        return shares.warps * shares.each * (4 * t * t + _LOADS * 2 * t)

    def pack(self, workload: Interaction, weights: None, params: Tile) -> np.ndarray:
        return np.zeros(0, np.uint8)

    def build(self, workload: Interaction, params: Tile, machine: Machine) -> Any:
        from ._interaction_loops import Builder

        return Builder(self.name, workload, plan(workload, params.tile)).function()
