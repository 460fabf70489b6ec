"""What a training does to its images: each augmentation changes a batch, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

MIXUP_ALPHA = 0.8
GREY_PROBABILITY = 0.5


@dataclass(frozen=True)
class MixedBatch:
    """Inputs with two labels each, of which the first counts `share` and the second the rest."""

    images: Tensor
    labels: Tensor
    other_labels: Tensor
    share: float

    def loss(self, logits: Tensor) -> Tensor:
        """The cross entropy of logits (N, classes), a scalar."""
        first = F.cross_entropy(logits, self.labels)
        if self.share == 1:
            return first
        return self.share * first + (1 - self.share) * F.cross_entropy(logits, self.other_labels)


def shift_and_zoom(x: Tensor) -> Tensor:
    """Move every image by up to an eighth of its side, then show a random window of 0.6 to 1 of its side."""
    side = x.shape[-1]
    step = side // 8
    padded = F.pad(x, (step,) * 4, value=float(x.min()))
    tops, lefts = torch.randint(2 * step + 1, (2, len(x))).tolist()
    windows = [padded[i, :, tops[i] : tops[i] + side, lefts[i] : lefts[i] + side] for i in range(len(x))]
    sides = torch.empty(len(x)).uniform_(0.6, 1)
    return _show_windows(torch.stack(windows), sides, sides)


def crop_and_resize(x: Tensor) -> Tensor:
    """RandomResizedCrop: windows of 30 to 100 % of the area, with sides in ratios of 3:4 to 4:3.

    It is torchvision's with another lower bound: 8 % of an image of 8×8 pixels are two pixels.
    """
    areas = torch.empty(len(x)).uniform_(0.3, 1)
    ratios = torch.empty(len(x)).uniform_(-0.2877, 0.2877).exp()
    heights, widths = (areas / ratios).sqrt().clamp(max=1), (areas * ratios).sqrt().clamp(max=1)
    return _show_windows(x, heights, widths)


def _show_windows(x: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Enlarge a window of every image, at a random place, to the image's size; sizes are shares of it."""
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = widths, heights
    matrix[:, 0, 2] = (1 - widths) * (2 * torch.rand(len(x)) - 1)
    matrix[:, 1, 2] = (1 - heights) * (2 * torch.rand(len(x)) - 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")


_RANDAUGMENT = v2.RandAugment()
_TRIVIALAUGMENT = v2.TrivialAugmentWide()
# So many images get the same operation. A call costs a third of a millisecond, and a training of these nets
# would spend half of its time in calls for single images.
_SHARING = 4


def randaugment(x: Tensor) -> Tensor:
    """Torchvision's RandAugment with its defaults, on uint8 images."""
    return torch.cat([_RANDAUGMENT(group) for group in x.split(_SHARING)])


def trivialaugment(x: Tensor) -> Tensor:
    """Torchvision's TrivialAugmentWide with its defaults, on uint8 images."""
    return torch.cat([_TRIVIALAUGMENT(group) for group in x.split(_SHARING)])


def random_greyscale(x: Tensor) -> Tensor:
    """Half of the uint8 images lose their colours."""
    grey = v2.functional.rgb_to_grayscale(x, num_output_channels=3)
    return torch.where((torch.rand(len(x)) < GREY_PROBABILITY)[:, None, None, None], grey, x)


def keep(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Augmentation:
    """How a training changes its images, and whether these are the coloured digits."""

    change: Callable[[Tensor], Tensor] = keep
    coloured: bool = False
    mixup: bool = False

    def mix(self, images: Tensor, labels: Tensor) -> MixedBatch:
        """Mix normalised images in random pairs, one share a batch (Zhang et al. 2018), or leave them."""
        if not self.mixup:
            return MixedBatch(images, labels, labels, 1.0)
        share = float(torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample())
        order = torch.randperm(len(images))
        return MixedBatch(share * images + (1 - share) * images[order], labels, labels[order], share)


TRAININGS = {
    "none": Augmentation(),
    "shift and zoom": Augmentation(shift_and_zoom),
    "RandomResizedCrop": Augmentation(crop_and_resize),
    "mixup 0.8": Augmentation(mixup=True),
    "RandAugment": Augmentation(randaugment, coloured=True),
    "TrivialAugment": Augmentation(trivialaugment, coloured=True),
    "random greyscale": Augmentation(random_greyscale, coloured=True),
}
MNIST_TRAININGS = {name: TRAININGS[name] for name in ("none", "RandomResizedCrop")}
