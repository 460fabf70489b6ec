"""The plain DenseNet of table 2: no bottleneck, no compression (Huang et al. 2016, first version).

L layers with weights: a stem, three blocks of (L − 4) / 3 layers BN-ReLU-3×3 conv-dropout, two
transitions, a linear head. As in Huang's code the stem has 16 channels and no dropout, the
convolution of a transition has dropout, and weights are He's by fan-out. L = 40, k = 12 has 1.0
million parameters, L = 100 7.0 (k = 12) and 27.2 (k = 24).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS, STEM = 3, 16


class Convolved(nn.Sequential):
    """BN-ReLU-conv-dropout: (N, inside, H, W) → (N, outside, H, W)."""

    def __init__(self, inside: int, outside: int, size: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inside, outside, size, padding=size // 2, bias=False)
        self.dropout = nn.Dropout(drop_rate)


class Dense(Convolved):
    """The input and ``growth`` new features behind it."""

    def __init__(self, inside: int, growth: int, drop_rate: float) -> None:
        super().__init__(inside, growth, 3, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, super().forward(x)), 1)


class DenseNet(nn.Module):
    """Images (N, channels, H, W) → logits (N, classes); H and W are halved twice."""

    def __init__(self, depth: int, growth: int, drop_rate: float, classes: int, channels: int) -> None:
        super().__init__()
        layers, odd = divmod(depth - BLOCKS - 1, BLOCKS)
        if odd or layers < 1:
            raise ValueError(f"depth {depth}: expected 3·n + 4, such as 40 or 100.")
        self.stem = nn.Conv2d(channels, STEM, 3, padding=1, bias=False)
        width, parts = STEM, []
        for block in range(BLOCKS):
            if block:
                parts += [Convolved(width, width, 1, drop_rate), nn.AvgPool2d(2)]
            parts += [Dense(width + layer * growth, growth, drop_rate) for layer in range(layers)]
            width += layers * growth
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.blocks(self.stem(x))), inplace=True)
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


def densenet(
    drop_rate: float = 0.0, *, depth: int = 40, growth: int = 12, num_classes: int = 10, in_chans: int = 3
) -> DenseNet:
    """For ``--arch densenet:densenet``; the numbers of classes and channels are read off a checkpoint."""
    return DenseNet(depth, growth, drop_rate, num_classes, in_chans)
