"""W of the integer convolution by tensor cores: weights, the table of pieces of K, constants.

    group 0: panel 0 (bn filters)            panel 1   ...   group 1: ...
    +----------------------+------------+--
    | k 0..31: 8 filters:  | 8 filters  |  ...   k 32..63: ...
    |  16 k of each filter |            |        filters in the order of `order`
    |  the other 16 k      |            |
    +----------------------+------------+--

128 bytes, 16 of each of 8 filters, are what ldmatrix reads at once: the copy of a step in shared
memory is as in W and has no bank conflicts. K is as in `Shape`, its end and the last panel padded
with zeros, so that it does not matter which bytes of A they meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...workload import INT8_LIMITS, Conv, ConvWeights
from ._conv_epilogue import Constants, starts
from ._conv_shape import Shape
from ._ir import ceil_div

if TYPE_CHECKING:
    from .conv_u8s8s32_mma import Params

__all__ = ["Layout", "order", "pack"]


class Layout:
    """Where everything is in W, in bytes; `steps` along K; bytes of shared memory of a stage."""

    def __init__(self, workload: Conv, params: Params) -> None:
        shape = Shape(workload)
        own = workload.filters // workload.groups
        self.panels = ceil_div(own, params.bn)  # of a group
        self.steps = ceil_div(shape.depth, params.depth)
        weights = workload.groups * self.panels * self.steps * params.bn * params.depth
        self.table = weights
        # one step more than there is: entries are loaded ahead
        self.pieces = (self.steps + 1) * (params.depth // shape.unit) if shape.entry else 0
        slots = workload.groups * self.panels * params.bn
        self.constants = Constants(workload, slots, weights + self.pieces * shape.entry)
        self.nbytes = self.constants.nbytes
        self.stage = (params.bm + params.bn) * params.depth


def order(params: Params, out: str, columns: int) -> np.ndarray:
    """Which filter of a group each of `columns` columns of the fragments has.

    A thread has columns 2t and 2t + 1 of every 8: these are neighbouring filters, `run` of them.
    """
    run = params.run(out in INT8_LIMITS)
    warp, own = np.divmod(np.arange(columns), params.wn)
    tile, column = np.divmod(own, 8)
    thread, odd = np.divmod(column, 2)
    block, pair = np.divmod(tile, run // 2)
    return warp * params.wn + block * 4 * run + thread * run + pair * 2 + odd


def pack(workload: Conv, weights: ConvWeights, params: Params) -> np.ndarray:
    """W, uint8."""
    shape, lay = Shape(workload), Layout(workload, params)
    if weights.a_zero and any(shape.padded) and not workload.padded:
        raise ValueError(f"{workload.describe()}: zero point {weights.a_zero}, not `padded`")
    groups, own = workload.groups, workload.filters // workload.groups
    columns = lay.panels * params.bn
    rows = weights.b.reshape(shape.runs, shape.span, groups, own).transpose(2, 0, 1, 3)
    runs = np.zeros((groups, shape.runs, shape.run, columns), np.int8)
    runs[:, :, : shape.span, :own] = rows
    wide = np.zeros((groups, lay.steps * params.depth, columns), np.int8)
    wide[:, : shape.depth] = runs.reshape(groups, shape.depth, columns)
    wide = wide[:, :, order(params, workload.out, columns)]
    # group, k of 32, half, k of 16, panel, 8 columns, column
    parts = wide.reshape(groups, -1, 2, 16, lay.panels, params.bn // 8, 8)
    parts = np.ascontiguousarray(parts.transpose(0, 4, 1, 5, 2, 6, 3))
    out = np.zeros(lay.nbytes, np.uint8)
    out[: lay.table] = parts.view(np.uint8).reshape(-1)
    if shape.entry:
        table = shape.table(lay.pieces).view(np.uint8).reshape(-1)
        out[lay.table : lay.table + table.size] = table
    filters = np.arange(workload.filters)
    slots = filters // own * columns + filters % own
    lay.constants.pack(out, weights, slots, starts(workload, weights))
    return out
