"""MobileNetV2 (Sandler et al., 2018) at width 1, 1000 classes."""

from __future__ import annotations

import torch
from torch import nn

from .layers import ConvNorm

# expansion, outputs, blocks, stride of the first
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Block(nn.Module):
    """1x1 up, depthwise 3x3, 1x1 down without activation; plus the input if it has that shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = ConvNorm(inputs, width, activation=nn.ReLU6) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, 3, stride, width, nn.ReLU6)
        down = ConvNorm(width, outputs, activation=None)
        self.add_module("last" if self.residual else "project", down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x if self.expand is None else self.expand(x))
        return self.last(y) + x if self.residual else self.project(y)


class MobileNetV2(nn.Module):
    """(N, 3, 224, 224) to scores (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2, activation=nn.ReLU6)
        self.blocks = nn.ModuleList()
        channels = 32
        for expansion, outputs, count, first in _STAGES:
            for index in range(count):
                self.blocks.append(Block(channels, outputs, 1 if index else first, expansion))
                channels = outputs
        self.head = ConvNorm(channels, 1280, activation=nn.ReLU6)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.classes = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classes(self.mean(self.head(x)).flatten(1))
