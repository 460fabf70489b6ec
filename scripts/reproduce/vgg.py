"""The VGG variant of section 2.3.2, and the initialisations it is trained from.

Stacks of 3×3 convolutions (2 × 64, 2 × 128, 3 × 256, 3 × 512, 3 × 512), a max pooling behind each,
two linear layers of 512, ReLU everywhere, no BatchNorm. Kept are 70 % of the neurons of the first
layer, 60 % of those of layer 3 and of the first two layers of the last three stacks, 50 % of those
of the linear layers. (The authors' published script has one linear layer of 512, and dropout before
it; the text is followed here.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ckpt_tools import rewrite_init

# of every stack: its channels at full width, and the keep probability behind each of its layers
STACKS = ((64, (0.7, 1)), (128, (0.6, 1)), (256, (0.6, 0.6, 1)), (512, (0.6, 0.6, 1)), (512, (0.6, 0.6, 1)))
LINEAR, LINEAR_KEEP = 512, (0.5, 0.5)
SIZE = 32  # of the images; five poolings leave one position


def vgg(classes: int = 10, channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """Images (N, channels, 32, 32) → logits (N, classes).

    `width` multiplies every number of channels and neurons.
    """
    layers: list[nn.Module] = []
    for full, keeps in STACKS:
        outside = round(full * width)
        for keep in keeps:
            layers += [nn.Conv2d(channels, outside, 3, padding=1), *_active(keep)]
            channels = outside
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for keep in LINEAR_KEEP:
        layers += [nn.Linear(channels, round(LINEAR * width)), *_active(keep)]
        channels = round(LINEAR * width)
    return nn.Sequential(*layers, nn.Linear(channels, classes))


def _active(keep: float) -> list[nn.Module]:
    return [nn.ReLU(inplace=True), nn.Dropout(1 - keep)] if keep < 1 else [nn.ReLU(inplace=True)]


def _ours(model: nn.Module, images: Tensor, seed: int) -> None:
    """The paper's: columns on the unit hypersphere over √(E[f²]/p), the backpropagation term deactivated."""
    rewrite_init(model, images, rule="paper", backward_term="off", seed=seed)


def _fill_with(fill: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor, int], None]:
    def initialise(model: nn.Module, images: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fill(layer.weight)
                nn.init.zeros_(layer.bias)

    return initialise


INITIALISATIONS: Mapping[str, Callable[[nn.Module, Tensor, int], None]] = {
    "ours": _ours,
    "He": _fill_with(lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu")),
    "Xavier": _fill_with(nn.init.xavier_uniform_),
}
