"""Depthwise convolution of f32.

C[y, x, c] = activation(sum over ky, kx of A[y + ky, x + kx, c] * B[ky, kx, c] + bias[c] + R)

A thread has up to 4 channels, a load of 16 bytes, of some outputs side by side and one below the
other; the weights of a part of the kernel stay in registers, every pixel of A is loaded once for
all taps and outputs that it meets.

3x3, 4 x 2 outputs of 4 channels: 24 loads of 16 bytes, 288 multiply-adds, 547 instructions in all,
17 an output of 9 taps: 7.5 outputs a clock and multiprocessor. An output moves 8 bytes (stride 2:
20). Expected on an H100, not measured on a GPU: 3.35 TB/s are 0.42 T outputs/s = 7.5 Tflop/s, 1.8
a clock and multiprocessor: bound by memory, or by L2 at about twice that.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...kernel import Kernel
from ...machine import Machine
from ...workload import Conv, ConvWeights
from ._depthwise_float import Taps, pack_floats
from ._depthwise_strips import clocks


@dataclass(frozen=True)
class Params:
    across: int = 4  # outputs of a thread, side by side
    down: int = 2  # and one below the other
    lanes: int = 4  # channels of a thread, where they are a multiple


class DepthwiseSimt(Kernel):
    name = "depthwise_f32f32f32_simt"
    features = ("sm_80",)
    Params: Any = Params
    SPACE: ClassVar = {"across": (1, 2, 4, 8), "down": (1, 2, 4), "lanes": (1, 2, 4)}

    @property
    def op(self) -> str:
        return "conv"

    def refuses(self, workload: Conv) -> str | None:
        if workload.dtypes != "f32f32f32":
            return f"operands are {workload.a} x {workload.b}, not f32 x f32"
        if not workload.depthwise:
            return f"{workload.groups} groups of {workload.channels} -> {workload.filters} channels"
        return None

    def registers(self, params: Params) -> int:
        """Of 3x3: sums, weights, a few pixels of A, bias, addresses."""
        outputs = params.across * params.down
        return params.lanes * (outputs + 9 + 4 + 1) + 2 * params.down + 28

    def plan(self, workload: Conv, params: Params) -> Taps:
        return Taps(workload, params.across, params.down, params.lanes)

    def default(self, workload: Conv, machine: Machine) -> Params:
        """The quickest of the space, as estimated."""
        points = (p for p in self.candidates(machine) if self.registers(p) <= 168)
        best: Params = min(points, key=lambda p: self.estimate(workload, p, machine))
        return best

    def effect(self, workload: Conv, params: Params) -> Hashable:
        plan = self.plan(workload, params)
        return plan.across, plan.down, plan.lanes

    def estimate(self, workload: Conv, params: Params, machine: Machine) -> float:
        plan = self.plan(workload, params)
        return clocks(plan.strips, plan.instructions, machine)

    def pack(self, workload: Conv, weights: ConvWeights, params: Params) -> np.ndarray:
        encoded = self.plan(workload, params).encode(weights.b[:, :, :, 0])
        slots = np.arange(workload.channels)
        return pack_floats(workload, weights, encoded, workload.channels, slots)

    def build(self, workload: Conv, params: Params, machine: Machine) -> Any:
        from ._depthwise_float import FloatDepthwise

        return FloatDepthwise(self.name, workload, self.plan(workload, params)).function()


KERNEL = DepthwiseSimt()
