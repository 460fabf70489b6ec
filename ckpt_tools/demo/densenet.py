"""A DenseNet-BC as torchvision writes it, small enough for 8×8 images (Huang et al. 2017).

Same names, same order and the same functional dropout as ``torchvision.models.densenet``, so what
the tool says about this network it would say about the large ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """BN-ReLU-1×1 conv, BN-ReLU-3×3 conv, then dropout: (N, C, H, W) → (N, growth, H, W)."""

    def __init__(self, channels: int, growth: int, bottleneck: int, drop_rate: float) -> None:
        super().__init__()
        width = bottleneck * growth
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute new features (N, growth, H, W) from all earlier ones."""
        narrowed = self.conv1(self.relu1(self.norm1(torch.cat(list(features), 1))))
        new_features: Tensor = self.conv2(self.relu2(self.norm2(narrowed)))
        if self.drop_rate > 0:
            # A call, not a module: this is the site that only a recorded forward finds.
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    """Layers of which each takes the input and the features of all earlier ones.

    ``forward`` maps (N, C, H, W) to (N, C + layers · growth, H, W).
    """

    def __init__(self, layers: int, channels: int, growth: int, bottleneck: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(channels + i * growth, growth, bottleneck, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and all new features, concatenated."""
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """BN-ReLU-1×1 conv and 2×2 average pooling between two blocks."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """DenseNet-BC: stem, dense blocks with transitions, BN, mean over the map, linear head.

    ``forward`` takes (N, in_channels, H, W) and returns logits (N, num_classes). H and W are halved
    after every block but the last.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        growth: int,
        stem: int,
        bottleneck: int,
        drop_rate: float,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv0"] = nn.Conv2d(in_channels, stem, kernel_size=3, padding=1, bias=False)
        parts["norm0"] = nn.BatchNorm2d(stem)
        parts["relu0"] = nn.ReLU(inplace=True)
        channels = stem
        for i, layers in enumerate(blocks, start=1):
            parts[f"denseblock{i}"] = DenseBlock(layers, channels, growth, bottleneck, drop_rate)
            channels += layers * growth
            if i < len(blocks):
                parts[f"transition{i}"] = Transition(channels, channels // 2)
                channels //= 2
        # Torchvision's name, whatever the number of blocks
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        # As torchvision's DenseNet; BN layers begin with weight 1 and bias 0 by themselves.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        maps = F.relu(self.features(x), inplace=True)
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(maps, (1, 1)).flatten(1))
        return logits


def digits_densenet(
    drop_rate: float = 0.0,
    num_classes: int = 10,
    *,
    blocks: Sequence[int] = (16, 4),
    growth: int = 4,
    stem: int = 16,
    bottleneck: int = 4,
    in_channels: int = 1,
) -> DenseNet:
    """Build the demo's network: ``--arch ckpt_tools.demo.densenet:digits_densenet`` calls this.

    Sixteen layers at 8×8 and four at 4×4. Deep and narrow, because every BN layer behind dropout
    adds its share to the shift that the tool corrects; the first BN layers are behind none and
    serve as controls.
    """
    return DenseNet(blocks, growth, stem, bottleneck, drop_rate, num_classes, in_channels)
