"""What the vision models are built of. Needs PyTorch: only the exporter and the benches import it.

Modules are named for `weights`: ``last`` ends a residual branch, ``project`` is a convolution
without activation behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNorm(nn.Module):
    """Convolution without bias, padded to keep the size, batch norm, activation or none.

    A kernel of three numbers makes it 3-D: (N, channels, d, h, w).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        sizes = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        kinds = (nn.Conv3d, nn.BatchNorm3d) if len(sizes) == 3 else (nn.Conv2d, nn.BatchNorm2d)
        strides = stride if isinstance(stride, int) else tuple(stride)
        padding = tuple(size // 2 for size in sizes)
        self.conv = kinds[0](inputs, outputs, sizes, strides, padding, groups=groups, bias=False)
        self.norm = kinds[1](outputs)
        self.activation = activation() if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x)))


def fold(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, every batch norm folded into its convolution, in place."""
    model.eval()
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return model


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel shuffle (Zhang et al., 2017): channel (g, i) of `groups` becomes (i, g)."""
    channels, height, width = (int(size) for size in x.shape[1:])
    x = x.reshape(-1, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(-1, channels, height, width)
