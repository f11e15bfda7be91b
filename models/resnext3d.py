"""ResNeXt3D-101 with depthwise 3x3x3 convolutions (channel-separated, Tran et al., 2019).

32 frames of 112 x 112, 400 classes.
"""

from __future__ import annotations

import torch
from torch import nn

from .layers import ConvNorm

_BLOCKS = (3, 4, 23, 3)


class Bottleneck(nn.Module):
    """1x1x1, depthwise 3x3x3, 1x1x1 to 4 times the width; plus the input."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        point, outputs = (1, 1, 1), 4 * width
        self.reduce = ConvNorm(inputs, width, point)
        self.depthwise = ConvNorm(width, width, (3, 3, 3), stride, width)
        self.last = ConvNorm(width, outputs, point, activation=None)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else ConvNorm(inputs, outputs, point, stride, activation=None)
        )
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.last(self.depthwise(self.reduce(x))) + self.shortcut(x))


class ResNeXt3D(nn.Module):
    """(N, 3, 32, 112, 112) to scores (N, 400); no max-pool, stages 2 to 4 halve every dim."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 64, (3, 7, 7), (1, 2, 2))
        self.stages = nn.ModuleList()
        channels = 64
        for stage, count in enumerate(_BLOCKS):
            layers = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                layers.append(Bottleneck(channels, 64 << stage, stride))
                channels = 256 << stage
            self.stages.append(nn.Sequential(*layers))
        self.mean = nn.AdaptiveAvgPool3d(1)
        self.classes = nn.Linear(channels, 400)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classes(self.mean(x).flatten(1))
