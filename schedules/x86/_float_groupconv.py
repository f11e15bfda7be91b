"""Float convolution of groups of few channels: several groups side by side in a vector.

    lanes of A:    a0 a1 a2 a3 | b0 b1 ...      groups a, b ... of 4 channels, as A has them
    weights r = 1: a0>1 a1>2 a2>3 a3>0 | ...    from channel c to filter c + 1 of its group

Every tap multiplies the same pixels with `size` vectors of weights, rotation r of which takes
channel c of a group to its filter (c + r) mod size. Each rotation has accumulators of its own,
which are turned into place and added once, at the end: no shuffle and no broadcast in the loops.

    W: vector 0 of channels: tap 0: r = 0 .. size - 1, tap 1 ...   vector 1 ...   | bias
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...machine import Machine
from ...workload import Conv, ConvWeights
from ._float_conv import FloatConv, Layout, Tile
from ._float_conv_loops import Serial
from ._float_conv_shape import Cell, ceil_div, squeezed
from ._float_depthwise import Depthwise
from ._ir import T, intrinsic, local, ramp, splat


class FloatGroupConv(FloatConv):
    """As many filters as channels in every group."""

    Params: ClassVar[type] = Tile
    sizes: ClassVar[tuple[int, ...]]  # of groups that the kernel takes

    def refuses(self, workload: Conv) -> str | None:
        if workload.channels != workload.filters or workload.group_channels not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            return f"not groups of as many filters as channels, one of {sizes}"
        return super().refuses(workload)

    def registers(self, params: Tile) -> int:
        """Accumulators of a tile for every rotation, its pixels, a vector of weights."""
        return params.mr * params.nr + min(params.mr, params.nr) + 1

    def layout(self, workload: Conv, params: Tile) -> Layout:
        taps = prod(workload.kernel) * workload.group_channels
        return Layout(params.lanes, 1, workload.filters, 1, taps, workload.bias != "none")

    def pack(self, workload: Conv, weights: ConvWeights, params: Tile) -> np.ndarray:
        size = workload.group_channels
        b = weights.b.reshape(-1, size, workload.groups, size)  # tap, channel, group, filter
        channel = np.arange(size)
        turned = np.stack(
            [b[:, channel, :, (channel + r) % size] for r in range(size)]
        )  # rotation, channel, tap, group
        rotated = turned.transpose(2, 0, 3, 1).reshape(*workload.kernel, size, workload.filters)
        return super().pack(workload, ConvWeights(rotated, bias=weights.bias), params)

    def default(self, workload: Conv, machine: Machine) -> Tile:
        size = workload.group_channels
        tiles = (t for t in self.candidates(machine) if t.nr == size and t.lanes == machine.lanes)
        return max(tiles, key=lambda tile: tile.mr)

    def effect(self, workload: Conv, params: Tile) -> Hashable:
        return params.nr == workload.group_channels, ceil_div(
            squeezed(workload).outputs[2], params.mr
        )

    def estimate(self, workload: Conv, params: Tile, machine: Machine) -> float:
        """Loads of pixels and weights against multiply-adds."""
        size = workload.group_channels
        if params.nr != size:
            return math.inf
        mr = workload.outputs[2] / ceil_div(workload.outputs[2], params.mr)
        return max(mr * size, mr + size, 4.0) / mr

    def build(self, workload: Conv, params: Tile, machine: Machine) -> Any:
        return GroupConv(self.name, workload, params, self.layout(workload, params)).function()


class GroupConv(Depthwise):
    """The loops of a depthwise convolution around a tile of several rotations."""

    def _tile_of(
        self, cell: Cell, pixel: Any, at: Any, od: Any, oh: Any, vector: Any, channels: int
    ) -> None:
        lay, lanes, work = self.lay, self.lay.lanes, self.work
        mr, size = cell.columns, work.group_channels
        acc = local(mr * size * lanes, "float32")
        where = [[ramp((i * size + r) * lanes, lanes) for r in range(size)] for i in range(mr)]
        weights = T.Bind(vector * (lay.k * lay.step))
        column = T.Bind(vector * lanes)
        zero = bias = splat(0.0, "float32", lanes)
        if lay.biased:
            bias = T.Bind(self._floats(lay.bias + vector * lay.step))
        for row_of in where:
            for r, place in enumerate(row_of):
                T.buffer_store(acc, zero if r else bias, [place])

        def row(a: Any, k: Any) -> None:
            """Adds the taps of a row of the kernel."""
            for run in cell.taps[0].runs:
                with Serial(run.count) as extra:
                    kx = run.kx + extra
                    first = T.Bind(a + kx * (work.dilations[2] * work.channels))
                    tap = T.Bind(weights + (k + kx) * (size * lay.step))
                    x = {
                        i: T.Bind(
                            self._load(
                                self.a, first + i * work.strides[2] * work.channels, channels
                            )
                        )
                        for i in run.pixels
                    }
                    for r in range(size):
                        w = T.Bind(self._floats(tap + r * lay.step))
                        for i in run.pixels:
                            place = where[i][r]
                            y = intrinsic(self.vector, "llvm.fma", x[i], w, acc[place])
                            T.buffer_store(acc, y, [place])

        self._kernel_rows(T.Bind(at + column), od, oh, row)

        def total(i: int) -> Any:
            value = acc[where[i][0]]
            for r in range(1, size):
                order = [g + (o - r) % size for g in range(0, lanes, size) for o in range(size)]
                value = value + T.Shuffle([acc[where[i][r]]], order)
            return self._sum(value, pixel + i, column, 0, channels)

        self.epilogue.store_floats([[total(i)] for i in range(mr)], (pixel, column), channels)


__all__ = ["FloatGroupConv"]
