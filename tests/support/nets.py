"""Tiny nets, one for each way in which dropout meets BatchNorm, and a way to make their statistics real."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseNet(nn.Module):
    """Functional dropout behind a rate, concatenation."""

    def __init__(self, drop_rate: float = 0.2, layers: int = 4) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(layers))
        self.norm = nn.BatchNorm2d(8 + 4 * layers)
        self.head = nn.Linear(8 + 4 * layers, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            new = conv(F.relu(norm(x)))
            if self.drop_rate > 0:
                new = F.dropout(new, self.drop_rate, self.training)
            x = torch.cat([x, new], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class DropPath(nn.Module):
    """Whole samples of a branch are dropped."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """A residual block with a parallel shortcut that has a BN layer of its own."""

    def __init__(self, inside: int, outside: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.drop = drop
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.drop(self.bn2(self.conv2(y))))


class ResNet(nn.Sequential):
    """Two blocks; the first one's shortcut is parallel to its dropout."""

    def __init__(self, rate: float = 0.3, *, wide: bool = False, classes: int = 5) -> None:
        drop = (lambda: nn.Dropout(rate)) if wide else (lambda: DropPath(rate))
        super().__init__(
            Block(3, 6, drop()),
            Block(6, 8, drop()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )


class Reused(nn.Module):
    """One dropout module and one BN layer, both used twice, and a BN layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.first, self.shared, self.unused = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.drop = nn.Dropout2d(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.first(self.stem(x))))
        a = self.shared(self.conv(x))
        b = self.shared(self.conv(F.avg_pool2d(x, 2)))
        return self.drop(a).mean((2, 3)) + b.mean((2, 3))


class Noisy(nn.Module):
    """Noise written by hand, of the kind ``kind``, between two BN layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.bn1, self.bn2 = nn.BatchNorm1d(7), nn.BatchNorm1d(7)
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.bn1(x))
        return self.bn2(self.disturb(x) if self.training else x)

    def disturb(self, x: Tensor) -> Tensor:
        if self.kind == "gaussian":
            return x + 0.1 * torch.randn_like(x)
        if self.kind == "mask in place":
            x[torch.rand(x.shape) < 0.3] = 0
            return x
        if self.kind == "view in place":
            x[:, :3].mul_(torch.bernoulli(torch.full((x.shape[0], 1), 0.5)))
            return x
        if self.kind == "item":
            return x * 0 if torch.rand(()).item() < 0.5 else x
        return x * 2 if random.random() < 0.5 else x + 1


def mlp(rate: float = 0.5) -> nn.Sequential:
    """Dropout directly in front of BN1d."""
    return nn.Sequential(
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(rate),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(rate),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def video(rate: float = 0.3) -> nn.Sequential:
    """BN3d behind Dropout3d."""
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.Dropout3d(rate),
        nn.Conv3d(6, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.Dropout3d(rate),
        nn.Conv3d(6, 6, 3), nn.BatchNorm3d(6),
    )  # fmt: skip


def sequence(rate: float = 0.3) -> nn.Sequential:
    """BN1d on (N, C, L)."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Conv1d(8, 8, 3),
        nn.BatchNorm1d(8),
    )


def batches(shape: tuple[int, ...], count: int = 4, size: int = 32, seed: int = 0) -> list[Tensor]:
    """Inputs whose scale and offset differ from sample to sample."""
    g = torch.Generator().manual_seed(seed)
    ones = (1,) * len(shape)
    return [
        torch.randn(size, *shape, generator=g) * (0.5 + torch.rand(size, *ones, generator=g))
        + torch.randn(size, *ones, generator=g)
        for _ in range(count)
    ]


def trained(model: nn.Module, data: list[Tensor], steps: int = 60) -> nn.Module:
    """Running statistics as training leaves them, dropout on; gammas and betas are not trivial."""
    model.train()
    with torch.no_grad():
        model(data[0])
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "weight" in name else -0.5))
        for step in range(steps):
            model(data[step % len(data)])
    return model.eval()
