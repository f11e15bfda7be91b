"""Depthwise convolution of f32: what a thread computes, its code, the layout of W.

W: [part of the kernel][row and column of the part][channel] f32; then, 64-byte aligned, the bias of
every channel. The kernel is taken in equal parts whose weights stay in registers.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from ...workload import Conv, ConvWeights
from ._depthwise_strips import Builder, Strips, chunk, every, u32
from ._float_epilogue import finished
from ._ir import T, address, call, ceil_div, i32, local, tirx, when
from ._math import fma

__all__ = ["FloatDepthwise", "Taps", "bias_of", "float_bytes", "float_finish", "pack_floats"]

_WEIGHTS = 48  # registers of a part's weights, at most
_COLUMNS = 9  # of a part, at most


class Taps:
    """How a workload is cut, for strips of `across` x `down` outputs of `lanes` channels."""

    def __init__(self, work: Conv, across: int, down: int, lanes: int) -> None:
        self.work = work
        self.across = min(across, work.outputs[2])
        self.down = min(down, work.outputs[1])
        self.lanes = max(v for v in (1, 2, 4) if v <= lanes and work.channels % v == 0)
        wide = chunk(work.kernel[2], _COLUMNS)
        self.part = chunk(work.kernel[1], _WEIGHTS // (wide * self.lanes)), wide

    @property
    def strips(self) -> Strips:
        return Strips(self.work, self.across, self.down, self.work.channels // self.lanes)

    @property
    def parts(self) -> tuple[int, int, int]:
        """Parts of the kernel, by dimension."""
        kd, kh, kw = self.work.kernel
        return kd, kh // self.part[0], kw // self.part[1]

    @property
    def part_bytes(self) -> int:
        """Of W."""
        return 4 * prod(self.part) * self.work.channels

    @property
    def weight_bytes(self) -> int:
        return prod(self.parts) * self.part_bytes

    def _lines(self, dim: int, count: int) -> dict[int, list[tuple[int, int]]]:
        """For every row (dim 1) or column of A of a part: the outputs, and their taps."""
        stride, dilation = self.work.strides[dim], self.work.dilations[dim]
        out: dict[int, list[tuple[int, int]]] = {}
        for i in range(count):
            for k in range(self.part[dim - 1]):
                out.setdefault(i * stride + k * dilation, []).append((i, k))
        return dict(sorted(out.items()))

    @cached_property
    def rows(self) -> dict[int, list[tuple[int, int]]]:
        return self._lines(1, self.down)

    @cached_property
    def columns(self) -> dict[int, list[tuple[int, int]]]:
        return self._lines(2, self.across)

    @property
    def instructions(self) -> float:
        """Of a thread, about."""
        outputs = self.across * self.down * self.lanes
        part = prod(self.part) * (outputs + 1) + 2.5 * len(self.rows) * len(self.columns) + 12
        return prod(self.parts) * part + 4 * outputs + 50

    def encode(self, b: np.ndarray) -> np.ndarray:
        """W's weights of B (kd, kh, kw, channels)."""
        nd, nh, nw = self.parts
        cut = b.reshape(nd, nh, self.part[0], nw, self.part[1], -1).transpose(0, 1, 3, 2, 4, 5)
        return np.ascontiguousarray(cut, np.float32).view(np.uint8).reshape(-1)


def float_bytes(work: Conv, weights: int, slots: int) -> int:
    """Bytes of W: of weights and, where there is one, a bias for every slot."""
    bias = 4 * slots if work.bias == "f32" else 0
    return ceil_div(ceil_div(weights, 64) * 64 + bias, 64) * 64


def pack_floats(
    work: Conv, weights: ConvWeights, encoded: np.ndarray, count: int, slots: np.ndarray
) -> np.ndarray:
    """W of encoded weights; `slots` (filters,) of `count` says where each filter's bias is."""
    out = np.zeros(float_bytes(work, encoded.size, count), np.uint8)
    out[: encoded.size] = encoded
    if work.bias == "f32":
        assert weights.bias is not None
        row = np.zeros(count, np.float32)
        row[slots] = weights.bias
        at = ceil_div(encoded.size, 64) * 64
        out[at : at + row.nbytes] = row.view(np.uint8)
    return out


def bias_of(to: Builder, offset: int, slot: Any, count: int) -> list[Any]:
    """The bias of `count` (1, 2, 4, 8) slots from `slot` on, as f32; None where there is none."""
    if to.work.bias != "f32":
        return [None] * count
    held, size = local(count, "uint32"), min(count, 4)
    for i in range(0, count, size):
        to.take(held, i, address(to.w, slot * 4 + (offset + 4 * i)), size, None, None)
    return [T.Bind(call("float32", "as_float", held[i])) for i in range(count)]


def float_finish(to: Builder, sums: list[Any], bias: list[Any], at: Any, count: Any) -> None:
    """Stores C of the sums of neighbouring filters from `at` on; `count` of them, None: all."""
    added: list[Any] = [None] * len(sums)
    if to.r is not None:
        added = [call("float32", "as_float", word) for word in to.added(at, len(sums), count)]
    values = [
        finished(to.work, y, bias=b, residual=r) for y, b, r in zip(sums, bias, added, strict=True)
    ]
    to.store(at, values, count)


class FloatDepthwise(Builder):
    def __init__(self, name: str, workload: Conv, plan: Taps) -> None:
        self.plan = plan
        nbytes = float_bytes(workload, plan.weight_bytes, workload.channels)
        super().__init__(name, workload, plan.strips, nbytes)

    def thread(self, unit: Any) -> None:
        plan = self.plan
        self.fill = u32(0)
        self.channel = T.Bind(unit * plan.lanes)
        bias = bias_of(self, ceil_div(plan.weight_bytes, 64) * 64, self.channel, plan.lanes)
        size = plan.across * plan.down * plan.lanes
        self.sums = local(size, "float32")
        for i in range(size):
            T.buffer_store(self.sums, tirx.const(0, "float32"), [i])
        self.weights = local(prod(plan.part) * plan.lanes, "uint32")
        self.raw = local(plan.lanes, "uint32")
        total = prod(plan.parts)
        if total == 1:
            self._part(None)
        else:
            with T.serial(i32(0), i32(total)) as part:
                self._part(part)
        for x in range(plan.across):
            for y in range(plan.down):
                first = (y * plan.across + x) * plan.lanes
                sums = [self.sums[first + i] for i in range(plan.lanes)]
                with when(every(self.exists(x, y))):
                    float_finish(self, sums, bias, self.out_at(x, y, self.channel), None)

    def _part(self, part: Any) -> None:
        """Adds the products of a part of the kernel."""
        work, plan = self.work, self.plan
        first = T.Bind(self.channel * 4)
        if part is not None:
            first = T.Bind(first + part * plan.part_bytes)
        for i in range(prod(plan.part)):
            place = address(self.w, first + 4 * i * work.channels)
            self.take(self.weights, i * plan.lanes, place, plan.lanes, None, None)
        moved, most = self.moves(part, plan.parts, (1, *plan.part))
        z = self.zin if moved[0] is None else self.zin + moved[0]
        depth = self.inside(0, 0, moved[0], most[0])
        for row, lines in plan.rows.items():
            y = self.yin + row if moved[1] is None else self.yin + moved[1] + row
            base = T.Bind(self.row(z, y, moved[2]) + self.channel)
            here = every([*depth, *self.inside(1, row, moved[1], most[1])])
            here = None if here is None else T.Bind(here)
            for column, used in plan.columns.items():
                sides = [here] if here is not None else []
                valid = every([*sides, *self.inside(2, column, moved[2], most[2])])
                self.load(0, base + column * work.channels, plan.lanes, None, valid)
                for y_out, ky in lines:
                    for x, kx in used:
                        self._add((y_out * plan.across + x), ky * plan.part[1] + kx)

    def _add(self, output: int, tap: int) -> None:
        lanes = self.plan.lanes
        for i in range(lanes):
            at = output * lanes + i
            a = call("float32", "as_float", self.raw[i])
            w = call("float32", "as_float", self.weights[tap * lanes + i])
            T.buffer_store(self.sums, fma(a, w, self.sums[at]), [at])
