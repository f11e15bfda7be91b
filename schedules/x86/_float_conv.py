"""Float convolution with weights packed in panels, for vectors of any width.

W: group 0: panel 0                            panel 1  ...  last panel  | group 1 ... | bias
     tap (kd, kh, kx), channel c: v0 .. v(nr-1)              the vectors
     next c, next tap ...                                    that are left   v: `lanes` filters
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Conv, ConvWeights
from ._float_conv_loops import Builder, panels_first, touched
from ._float_conv_shape import ceil_div, flat, squeezed

_TILE = "mr", "nr", "lanes"
_AHEAD_BYTES = 256 << 10  # of A, C and R, from which on fetching them ahead can matter
_ROOMY = 0.85  # part of the registers that a tile may take without hindering the compiler
_STREAM = 24  # bytes of W a cycle that the second-level cache gives, with margin
_WAY = 4096  # bytes after which addresses share a set of the first-level cache
_WAYS = 7  # lines of a set that pixels of A may take, of 8


@dataclass(frozen=True)
class Tile:
    """Parameters of the kernels."""

    mr: int = 14  # most output pixels kept in registers
    nr: int = 2  # vectors of filters kept in registers
    lanes: int = 16  # filters of a vector


@dataclass(frozen=True)
class Blocked(Tile):
    """Those of dense convolutions."""

    # KiB of A, R and C that stay in cache while panel after panel of W passes; 0: all of it
    # passes by each panel
    chunk: int = 512
    ahead: bool = False  # prefetch what tiles of the next chunk read and write


@dataclass(frozen=True)
class Layout:
    """Where everything is in W. Offsets are in bytes."""

    lanes: int
    nr: int
    filters: int  # of a group
    groups: int
    k: int  # products of a sum
    biased: bool

    @property
    def vectors(self) -> int:
        """Of a group."""
        return ceil_div(self.filters, self.lanes)

    @property
    def columns(self) -> int:
        """Filters of a group, padded."""
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        """Of a group."""
        return ceil_div(self.vectors, self.nr)

    @property
    def whole(self) -> int:
        """Leading panels of nr vectors without padding."""
        return self.filters // self.lanes // self.nr

    @property
    def step(self) -> int:
        """Bytes of a vector."""
        return self.lanes * 4

    @property
    def group(self) -> int:
        """Bytes of the weights of a group."""
        return self.columns * self.k * 4

    @property
    def bias(self) -> int:
        return ceil_div(self.group * self.groups, 64) * 64

    @property
    def nbytes(self) -> int:
        bias = self.groups * self.columns * 4 if self.biased else 0
        return self.bias + ceil_div(bias, 64) * 64


class FloatConv(Kernel):
    """C = activation(A * B + bias + R), all f32."""

    Params: ClassVar[type] = Blocked

    @property
    def op(self) -> str:
        return "conv"

    def refuses(self, workload: Conv) -> str | None:
        if workload.dtypes != "f32f32f32":
            return f"operands are {workload.a} x {workload.b}, not f32 x f32"
        return None

    def registers(self, params: Tile) -> int:
        """C's tile, the vectors of a tap's weights, a broadcast of A."""
        return params.mr * params.nr + params.nr + 1

    def layout(self, workload: Conv, params: Tile) -> Layout:
        k = prod(workload.kernel) * workload.group_channels
        filters = workload.filters // workload.groups
        biased = workload.bias != "none"
        return Layout(params.lanes, params.nr, filters, workload.groups, k, biased)

    def pack(self, workload: Conv, weights: ConvWeights, params: Tile) -> np.ndarray:
        lay = self.layout(workload, params)
        b = np.zeros((lay.groups, lay.k, lay.columns), np.float32)
        b[:, :, : lay.filters] = np.moveaxis(
            weights.b.reshape(lay.k, lay.groups, lay.filters), 1, 0
        )
        out = np.zeros(lay.nbytes, np.uint8)
        at = 0
        for group in b:
            for first in range(0, lay.columns, lay.nr * lay.lanes):
                panel = np.ascontiguousarray(group[:, first : first + lay.nr * lay.lanes])
                out[at : at + panel.nbytes] = panel.view(np.uint8).reshape(-1)
                at += panel.nbytes
        if lay.biased:
            assert weights.bias is not None
            bias = np.zeros((lay.groups, lay.columns), np.float32)
            bias[:, : lay.filters] = weights.bias.reshape(lay.groups, lay.filters)
            out[lay.bias : lay.bias + bias.nbytes] = bias.view(np.uint8).reshape(-1)
        return out

    def default(self, workload: Conv, machine: Machine) -> Tile:
        """The tile with the fewest estimated cycles, in the order of the fewest bytes."""
        choices = (Blocked(*values) for values in product(*map(self.SPACE.get, _TILE)))  # type: ignore[arg-type]
        tiles = (t for t in choices if self.registers(t) <= machine.registers)
        best = min(tiles, key=lambda params: self._cycles(workload, params, machine))
        first = panels_first(workload, self.layout(workload, best), best.chunk << 10)
        return replace(best, chunk=0) if first else best

    def effect(self, workload: Conv, params: Tile) -> Hashable:
        work = squeezed(workload)
        height, width = work.outputs[1:]
        pixels = width * (work.batch or 1) if flat(work) else width
        tile = -ceil_div(pixels, ceil_div(pixels, params.mr))
        if not flat(work) and width <= params.mr // 2 and height > 1:
            tile = min(params.mr // width, height)
        vectors = ceil_div(workload.filters // workload.groups, params.lanes)
        panels = workload.groups * ceil_div(vectors, params.nr)
        own = tile, min(params.nr, vectors), params.lanes
        if not isinstance(params, Blocked):
            return own
        size = touched(workload) * (workload.batch or 1)
        chunk = params.chunk if panels > 1 and params.chunk << 10 < size else 0
        return *own, chunk, params.ahead and flat(work) and size > _AHEAD_BYTES

    def estimate(self, workload: Conv, params: Tile, machine: Machine) -> float:
        halves = 1.05 if params.lanes < machine.lanes else 1.0  # twice the instructions
        return halves * self._cycles(workload, params, machine)

    def _cycles(self, workload: Conv, params: Tile, machine: Machine) -> float:
        """Estimated cycles of an image on one thread, two halves of 512-bit vectors in each."""
        lay, work = self.layout(workload, params), squeezed(workload)
        height, width = work.outputs[1:]
        tiles = ceil_div(width, params.mr)
        heights = [(tiles * height, width / tiles)]
        if flat(work):
            heights = [(tiles, ceil_div(width, tiles))]
        elif width <= params.mr // 2:
            rows = min(params.mr // width, height)
            heights = [(height // rows, rows * width), (1, height % rows * width)]
        wide = lay.lanes / 8
        lines = gcd(_WAY, work.strides[2] * work.channels * 4) / _WAY  # of a pixel, in its set
        slow = 1.0 if self.registers(params) <= _ROOMY * machine.registers else 1.01

        def panel(nr: int) -> float:
            total = 0.0
            for count, mr in heights:
                step = max(mr * nr * wide / 2, (nr * wide + mr) / 2, 4.0, nr * lay.step / _STREAM)
                step = step * slow + 0.5 + 0.05 * mr + 0.1 * nr
                if lines * mr > _WAYS:
                    step += 0.5 * mr
                total += count * (lay.k * step + 20 + 2 * mr * nr * wide) if mr else 0.0
            return total

        whole, rest = divmod(lay.vectors, lay.nr)
        cycles = whole * panel(lay.nr) + (panel(rest) if rest else 0.0)
        return cycles * work.outputs[0] * lay.groups

    def build(self, workload: Conv, params: Tile, machine: Machine) -> Any:
        return Builder(self.name, workload, params, self.layout(workload, params)).function()


__all__ = ["Blocked", "FloatConv", "Layout", "Tile"]
