"""The networks on which `bench passes` measures speed, with statistics that suit their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Two pre-activated convolutions with dropout between them.

    Zagoruyko & Komodakis 2016, arXiv:1605.07146.
    """

    def __init__(self, inside: int, outside: int, stride: int, rate: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.drop = nn.Dropout(rate)
        self.bn2, self.conv2 = nn.BatchNorm2d(outside), nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.drop(self.conv1(y)))))


class WideResNet(nn.Module):
    """WRN-28-10 for images of 32×32; neither timm nor torchvision has it."""

    def __init__(self, depth: int = 28, width: int = 10, rate: float = 0.3, classes: int = 10) -> None:
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        blocks = []
        for group in range(3):
            for number in range((depth - 4) // 6):
                inside = widths[group] if number == 0 else widths[group + 1]
                blocks.append(WideBlock(inside, widths[group + 1], 2 if group and not number else 1, rate))
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.head = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Network:
    """A network, its input's side, and how many images a batch holds on a CPU."""

    name: str
    build: Callable[[], nn.Module]
    side: int
    batch: int

    def batches(self, count: int, size: int, device: str) -> list[Tensor]:
        """Images like normalised photographs: smooth, of unequal brightness and contrast."""
        g = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(count):
            coarse = F.interpolate(
                torch.randn(size, 3, 8, 8, generator=g), size=(self.side,) * 2, mode="bilinear"
            )
            fine = 0.3 * torch.randn(size, 3, self.side, self.side, generator=g)
            contrast = 0.5 + torch.rand(size, 1, 1, 1, generator=g)
            batches.append(
                ((coarse + fine) * contrast + 0.5 * torch.randn(size, 1, 1, 1, generator=g)).to(device)
            )
        return batches

    def model(self, device: str) -> nn.Module:
        """Random weights; the running statistics are those of a few training batches."""
        torch.manual_seed(0)
        model = self.build().to(device)
        with torch.no_grad():
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            for batch in self.batches(2, 8, device):
                model(batch)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1
        return model.eval()


NETWORKS = {
    network.name: network
    for network in (
        Network("ResNet-50", torchvision.models.resnet50, 224, 32),
        Network("DenseNet-121, drop 0.2", lambda: torchvision.models.densenet121(drop_rate=0.2), 224, 32),
        Network("EfficientNet-B0", torchvision.models.efficientnet_b0, 224, 32),
        Network("WRN-28-10, 32×32", WideResNet, 32, 64),
    )
}

SMALL = Network("ResNet-18, 64×64", torchvision.models.resnet18, 64, 128)  # for runs over thousands of images
