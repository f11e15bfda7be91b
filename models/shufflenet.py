"""ShuffleNet with 4 groups (Zhang et al., 2017), its depthwise convolutions at full width.

Units keep the width of their outputs throughout, where the paper narrows to a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .layers import ConvNorm, shuffle

GROUPS = 4
WIDTHS = (24, 272, 544, 1088)  # of the stem and the three stages
UNITS = (4, 8, 4)


class Unit(nn.Module):
    """1x1 in groups, shuffle, depthwise 3x3, 1x1 in groups.

    With stride 1 the input is added; with stride 2 its 3x3 means are put in front.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = GROUPS) -> None:
        super().__init__()
        width = outputs - inputs if stride == 2 else outputs
        self.first = ConvNorm(inputs, width, groups=groups)
        self.depthwise = ConvNorm(width, width, 3, stride, width, None)
        last = ConvNorm(width, width, groups=GROUPS, activation=None)
        self.add_module("last" if stride == 1 else "end", last)
        self.mean = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(shuffle(self.first(x), GROUPS))
        if self.mean is None:
            return self.relu(self.last(y) + x)
        return self.relu(torch.cat([self.mean(x), self.end(y)], 1))


def stage(inputs: int, outputs: int, units: int, groups: int = GROUPS) -> nn.Sequential:
    """Units, the first with stride 2 and so many groups in its first convolution."""
    first = Unit(inputs, outputs, 2, groups)
    return nn.Sequential(first, *(Unit(outputs, outputs, 1) for _ in range(units - 1)))


class Trunk(nn.Module):
    """(N, 3, h, w) to features: stem, max-pool and as many stages, of stride 8, 16 and 32."""

    def __init__(self, units: Sequence[int] = UNITS) -> None:
        super().__init__()
        self.stem = ConvNorm(3, WIDTHS[0], 3, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList(
            stage(WIDTHS[index], WIDTHS[index + 1], count, GROUPS if index else 1)
            for index, count in enumerate(units)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        for part in self.stages:
            x = part(x)
        return x
