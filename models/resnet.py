"""ResNet-50 v1.5 (He et al., 2015) and ResNeXt-101-32x4d (Xie et al., 2016), 1000 classes.

v1.5: the stride is in the 3x3 convolution, not in the 1x1 before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .layers import ConvNorm


class Bottleneck(nn.Module):
    """1x1, 3x3 in groups, 1x1 to 4 times `planes` channels; plus the input."""

    def __init__(self, inputs: int, planes: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.reduce = ConvNorm(inputs, width)
        self.middle = ConvNorm(width, width, 3, stride, groups)
        self.last = ConvNorm(width, outputs, activation=None)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else ConvNorm(inputs, outputs, 1, stride, activation=None)
        )
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.last(self.middle(self.reduce(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """(N, 3, 224, 224) to scores (N, 1000)."""

    def __init__(self, blocks: Sequence[int], groups: int, width: int) -> None:
        """`width`: channels of a group in the first stage, of 64 planes."""
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        channels = 64
        for stage, count in enumerate(blocks):
            planes = 64 << stage
            layers = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                layers.append(Bottleneck(channels, planes, groups * width << stage, stride, groups))
                channels = 4 * planes
            self.stages.append(nn.Sequential(*layers))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.classes = nn.Linear(channels, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.classes(self.mean(x).flatten(1))


def resnet50() -> nn.Module:
    return ResNet((3, 4, 6, 3), 1, 64)


def resnext101() -> nn.Module:
    return ResNet((3, 4, 23, 3), 32, 4)
