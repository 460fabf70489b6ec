"""A network as Keras had it, with dropout behind each pooling, and its ports without."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Ported(nn.Module):
    """Convolution, ReLU, BN and pooling, twice; ``--arch ported_nets:Ported``."""

    drop_rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pool1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.MaxPool2d(2)
        self.conv2, self.bn2, self.pool2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.pool1(self.bn1(F.relu(self.conv1(x)))))
        x = self.drop(self.pool2(self.bn2(F.relu(self.conv2(x)))))
        return self.head(self.bn3(F.relu(self.conv3(x))).mean((2, 3)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_rate, self.training)


class Original(Ported):
    """The same with the dropout that its training had."""

    drop_rate = 0.25


class FunctionallyPorted(Ported):
    """A port whose pooling is no module, so that the dropout stands before the next convolution."""

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = F.max_pool2d(norm(F.relu(conv(x))), 2)
        return self.head(self.bn3(F.relu(self.conv3(x))).mean((2, 3)))
