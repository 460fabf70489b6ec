"""Seven small networks with dropout in front of BN layers, one of each usual kind.

Each takes images (N, C, 8, 8) and returns logits (N, 10). Their sizes are such that a training on the digits
takes seconds on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.trained_nets import DropPath, conv
from ckpt_tools.demo.densenet import digits_densenet

SIDE = 8
CLASSES = 10


class WideBlock(nn.Module):
    """A pre-activated residual block with dropout between its convolutions (Zagoruyko & Komodakis 2016)."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, width)
        self.dropout = nn.Dropout(rate)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return x + self.conv2(F.relu(self.bn2(y)))


def wide_resnet(rate: float, channels: int, width: int = 20, blocks: int = 4) -> nn.Sequential:
    layers = [WideBlock(width, rate) for _ in range(blocks)]
    return nn.Sequential(conv(channels, width), *layers, nn.BatchNorm2d(width), nn.ReLU(), *_head(width))


class DropPathBlock(nn.Module):
    """A residual block whose branch is left out at random (stochastic depth, Huang et al. 2016)."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + self.path(y))


def drop_path_resnet(rate: float, channels: int, width: int = 20, blocks: int = 4) -> nn.Sequential:
    """The rate rises linearly with the depth, as in the paper."""
    layers = [DropPathBlock(width, rate * (i + 1) / blocks) for i in range(blocks)]
    stem = (conv(channels, width), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *layers, *_head(width))


def mlp(rate: float, channels: int, width: int = 96, depth: int = 5) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    inside = channels * SIDE * SIDE
    for _ in range(depth):
        layers += [nn.Linear(inside, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(rate)]
        inside = width
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def vgg(rate: float, channels: int, width: int = 20, depth: int = 5) -> nn.Sequential:
    """Dropout of whole maps behind every activation."""
    layers: list[nn.Module] = []
    inside = channels
    for _ in range(depth):
        layers += [conv(inside, width), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(rate)]
        inside = width
    return nn.Sequential(*layers, *_head(width))


class SqueezeExcite(nn.Module):
    """Channels are scaled by a gate that is computed from their means (Hu et al. 2018)."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, narrow, 1), nn.Conv2d(narrow, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, squeeze-excitation, projection and DropPath (Tan & Le 2019)."""

    def __init__(self, width: int, expansion: int, rate: float) -> None:
        super().__init__()
        wide = width * expansion
        self.branch = nn.Sequential(
            conv(width, wide, size=1), nn.BatchNorm2d(wide), nn.SiLU(),
            conv(wide, wide, groups=wide), nn.BatchNorm2d(wide), nn.SiLU(),
            SqueezeExcite(wide, width // 2), conv(wide, width, size=1), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.branch(x))


def efficientnet(rate: float, channels: int, width: int = 16, blocks: int = 3) -> nn.Sequential:
    layers = [InvertedBottleneck(width, 3, rate * (i + 1) / blocks) for i in range(blocks)]
    stem = (conv(channels, width), nn.BatchNorm2d(width), nn.SiLU())
    last = (conv(width, 4 * width, size=1), nn.BatchNorm2d(4 * width), nn.SiLU())
    return nn.Sequential(*stem, *layers, *last, *_head(4 * width))


class ConformerBlock(nn.Module):
    """Half a feed-forward module and a convolution module of a Conformer (Gulati et al. 2020).

    It maps (N, width, T) to (N, width, T).
    """

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(rate),
            nn.Linear(2 * width, width), nn.Dropout(rate),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1),
            nn.Conv1d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm1d(width), nn.SiLU(),
            nn.Conv1d(width, width, 1), nn.Dropout(rate),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.feed_forward(x.transpose(1, 2)).transpose(1, 2)
        return x + self.convolution(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Conformer(nn.Module):
    """Reads an image row by row, as a sequence of eight steps."""

    def __init__(self, rate: float, channels: int, width: int = 48, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv1d(channels * SIDE, width, 1), nn.Dropout(rate))
        self.blocks = nn.Sequential(*[ConformerBlock(width, rate) for _ in range(blocks)])
        self.head = nn.Linear(width * SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2).transpose(1, 2)  # (N, C, 8 rows, 8) -> (N, C · 8, 8 rows)
        return self.head(self.blocks(self.embed(rows)).flatten(1))


def _head(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)


@dataclass(frozen=True)
class SmallNet:
    """A kind of network with its drop rate and how it is trained."""

    build: Callable[[float, int], nn.Module]  # drop rate, input channels
    drop_rate: float
    learning_rate: float
    epochs: int  # as many as the slowest kinds need to learn in some ten seconds


def _densenet(rate: float, channels: int) -> nn.Module:
    """Shorter than the demo's, because the time of a correction grows with the number of BN layers."""
    return digits_densenet(rate, blocks=(8, 3), growth=6, in_channels=channels)


def _mnist_densenet(rate: float, channels: int) -> nn.Module:
    """Three blocks, at 28×28, 14×14 and 7×7."""
    return digits_densenet(rate, blocks=(3, 3, 3), growth=6, in_channels=channels)


NETS = {
    "densenet": SmallNet(_densenet, 0.3, 0.1, 14),
    "wrn": SmallNet(wide_resnet, 0.4, 0.05, 14),
    "resnet-droppath": SmallNet(drop_path_resnet, 0.4, 0.05, 14),
    "mlp": SmallNet(mlp, 0.4, 0.05, 30),
    "vgg-dropout2d": SmallNet(vgg, 0.2, 0.05, 26),
    "efficientnet": SmallNet(efficientnet, 0.3, 0.05, 14),
    "conformer": SmallNet(Conformer, 0.2, 0.05, 14),
}
MNIST_NETS = {"densenet-mnist": SmallNet(_mnist_densenet, 0.3, 0.1, 4)}
