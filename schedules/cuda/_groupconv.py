"""Convolutions of groups without tensor cores: what a thread computes, the layout of W.

A thread has 4 or 8 filters of a group for some outputs side by side. A word of A, 4 channels of
bytes or one f32, serves all filters of the thread and all taps of a row of the kernel; a word of
weights all outputs. Channels of a group are taken `deep` words at a time, in one load.

Bytes: small groups whose channels or filters are no multiple of 4 are merged, 2 or 4 to one, with
zeros between; where they cannot be, channels are read one by one. Other groups get filters of
zeros up to a multiple of 4, which are not stored.

W: [plane, row, part of the columns][`deep` words][column of the part][word][filter] a word each;
then one value per filter.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Gpu, Machine
from ...workload import Conv
from ._depthwise_strips import Strips, chunk, clocks
from ._ir import ceil_div

__all__ = ["GroupConv", "Groups"]

_COLUMNS = 9  # of a part of the kernel, at most
_MERGED = 16  # channels of a group that was merged, at most
_ROOMY = 168  # registers with which 12 warps fit a multiprocessor


class Groups:
    """How a workload is cut, for threads of `across` outputs and `quads` times 4 filters."""

    def __init__(self, work: Conv, across: int, quads: int, deep: int) -> None:
        self.work = work
        self.across = min(across, work.outputs[2])
        self.lanes = 4 if work.a == "u8" else 1  # channels of a word
        channels, filters = work.group_channels, work.filters // work.groups
        self.merged = 1
        if self.lanes == 4:
            for m in (1, 2, 4):
                whole = m * channels % 4 == m * filters % 4 == work.groups % m == 0
                if whole and (m == 1 or m * channels <= _MERGED):
                    self.merged = m
                    break
        self.group, self.own = channels * self.merged, filters * self.merged
        self.groups = work.groups // self.merged
        self.words = ceil_div(self.group, self.lanes)
        self.aligned = self.group % self.lanes == 0
        self.deep = 1
        if self.aligned:
            self.deep = max(d for d in (1, 2, 4) if d <= deep and self.words % d == 0)
        self.quads = quads if self.own % (4 * quads) == 0 else 1
        self.part = chunk(work.kernel[2], _COLUMNS)

    @property
    def filters(self) -> int:
        """Of a thread."""
        return 4 * self.quads

    @property
    def shares(self) -> int:
        """Threads that a group's filters take."""
        return ceil_div(self.own, self.filters)

    @property
    def strips(self) -> Strips:
        return Strips(self.work, self.across, 1, self.groups * self.shares)

    @property
    def slots(self) -> int:
        """Filters in W."""
        return self.strips.units * self.filters

    def slots_of_filters(self) -> np.ndarray:
        group, own = np.divmod(np.arange(self.work.filters), self.own)
        slots: np.ndarray = group * (self.shares * self.filters) + own
        return slots

    @cached_property
    def columns(self) -> dict[int, list[tuple[int, int]]]:
        """For every column of A that a part needs: the outputs, and what tap it is for them."""
        stride, dilation = self.work.strides[2], self.work.dilations[2]
        out: dict[int, list[tuple[int, int]]] = {}
        for x in range(self.across):
            for k in range(self.part):
                out.setdefault(x * stride + k * dilation, []).append((x, k))
        return dict(sorted(out.items()))

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """Planes, rows and parts of columns of the kernel, and of the words of a group."""
        kd, kh, kw = self.work.kernel
        return kd, kh, kw // self.part, self.words // self.deep

    @property
    def step_bytes(self) -> int:
        """Of W."""
        return 4 * self.part * self.deep * self.slots

    @property
    def weight_bytes(self) -> int:
        return prod(self.steps) * self.step_bytes

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, weights, a column of A, values per filter, addresses."""
        sums = self.across * self.filters
        return sums + self.part * self.deep * self.filters + 4 * self.deep + 3 * self.filters + 28

    def clocks(self, machine: Machine) -> float:
        """Expected clocks, not measured on a GPU.

        A multiprocessor starts 4 instructions of a warp a clock, but only 2 dp4a, and L1 gives it
        128 bytes: a load of a word by a warp, or a quarter of one of 16 bytes.
        """
        assert isinstance(machine, Gpu)
        products = self.across * self.part * self.deep * self.filters
        weights = self.part * self.deep * self.quads
        pixels = len(self.columns)
        spread = 1 if self.aligned else 4
        issue = products + weights + 2 * pixels * spread + 14
        level1 = 4 * (4 * weights + pixels * self.deep * spread)
        step = max(issue, (2 if self.lanes == 4 else 1) * products, level1)
        end = 12 if self.lanes == 4 else 5
        return clocks(
            self.strips, prod(self.steps) * step + end * self.across * self.filters + 60, machine
        )

    def encode(self, b: np.ndarray) -> np.ndarray:
        """W's weights of B (kd, kh, kw, channels of a group, filters)."""
        kd, kh, kw = self.work.kernel
        wide = np.zeros((kd, kh, kw, self.words * self.lanes, self.slots), b.dtype)
        if self.merged == 1:
            wide[:, :, :, : self.group, self.slots_of_filters()] = b
        else:
            each, own = self.work.group_channels, self.work.filters // self.work.groups
            split = wide.reshape(kd, kh, kw, self.merged, each, self.groups, self.merged, own)
            small = b.reshape(kd, kh, kw, each, self.groups, self.merged, own)
            for i in range(self.merged):
                split[:, :, :, i, :, :, i] = small[:, :, :, :, :, i]
        cut = wide.reshape(
            kd, kh, kw // self.part, self.part, -1, self.deep, self.lanes, self.slots
        )
        ordered = np.ascontiguousarray(cut.transpose(0, 1, 2, 4, 3, 5, 7, 6))
        return ordered.view(np.uint8).reshape(-1)


class GroupConv(Kernel):
    """The choice of parameters: that of the quickest plan."""

    SPACE: ClassVar = {"across": (1, 2, 4, 7, 8), "quads": (1, 2), "deep": (1, 2, 4)}

    @property
    def op(self) -> str:
        return "conv"

    def plan(self, workload: Conv, params: Any) -> Groups:
        return Groups(workload, params.across, params.quads, params.deep)

    def default(self, workload: Conv, machine: Machine) -> Any:
        """The quickest of the space, as estimated."""
        least = self.Params(1)
        points = (p for p in self.candidates(machine) if self.registers(p) <= _ROOMY)
        points = (p for p in points if self.plan(workload, p).registers <= _ROOMY or p == least)
        return min(points, key=lambda p: self.estimate(workload, p, machine))

    def effect(self, workload: Conv, params: Any) -> Hashable:
        plan = self.plan(workload, params)
        return plan.across, plan.quads, plan.deep

    def estimate(self, workload: Conv, params: Any, machine: Machine) -> float:
        return self.plan(workload, params).clocks(machine)
