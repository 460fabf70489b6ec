"""What training may have done to the same images, each as a random change of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_tools.diagnosis.augmentation_policies import RAND_AUGMENT, TRIVIAL_AUGMENT, Greyscale, Policy

BatchChange = Callable[[Tensor], Tensor]
# Of windows, as shares of an image: torchvision's default for RandomResizedCrop, and what people set
# for fine-tuning and for small images.
_SMALLEST_AREA, _USUAL_SMALLEST_AREA = 0.08, 0.4


def training_augmentations(batch: Tensor, black: Tensor) -> list[BatchChange]:
    """Return usual augmentations: random policies, shifts over black or zeros, crops, mixing.

    They draw from torch's global generator. Mixing alone serves batches that are no images.

    Args:
        batch: (N, C, …), as it goes into the model.
        black: (C,), the value of a black pixel.
    """
    if batch.ndim != 4:
        return [_mix_samples] if batch.ndim == 2 else []
    # Images are padded either before or after they are normalised.
    shift_over_black, shift_over_zeros = _Shift(black), _Shift(torch.zeros_like(black))
    return [
        Policy(black, operations=2, strength=0.3, varies=False, geometry=RAND_AUGMENT),
        Policy(black, operations=2, strength=0.3, varies=False),
        Policy(black, operations=1, strength=1.0, varies=True),
        Policy(black, operations=1, strength=1.0, varies=True, geometry=TRIVIAL_AUGMENT),
        *([Greyscale(black)] if batch.shape[1] == 3 else []),
        shift_over_black,
        shift_over_zeros,
        _crop_randomly,
        lambda x: _crop_randomly(x, _USUAL_SMALLEST_AREA),
        _mix_samples,
        _mix_batch,
        lambda x: _mix_samples(_crop_randomly(x)),
        lambda x: _mix_samples(shift_over_black(x)),
    ]


@dataclass(frozen=True)
class _Shift:
    """Moves every image by up to an eighth of its width; what comes in has the value ``fill``."""

    fill: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        edge = max(1, x.shape[-1] // 8)
        fill = self.fill.to(x).reshape(1, -1, 1, 1)
        # F.pad takes one number as fill value, and not one for each channel.
        padded = F.pad(x - fill, (edge,) * 4) + fill
        height, width = x.shape[2:]
        tops, lefts = torch.randint(2 * edge + 1, (2, len(x))).tolist()
        windows = [
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ]
        return torch.stack(windows)


def _crop_randomly(x: Tensor, smallest_area: float = _SMALLEST_AREA) -> Tensor:
    """Enlarge a window of every image to the image's size, as in training on ImageNet.

    It covers a share of the area that is drawn between the smallest one and 1.
    """
    height, width = x.shape[2:]
    sides = torch.empty(len(x)).uniform_(smallest_area, 1).sqrt().tolist()
    windows = []
    for image, side in zip(x, sides, strict=True):
        h, w = max(2, round(height * side)), max(2, round(width * side))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        window = image[None, :, top : top + h, left : left + w]
        windows.append(resize_bilinear(window, height, width))
    return torch.cat(windows)


def resize_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Resize a batch of images (N, C, H, W), with smoothing where it gets smaller."""
    size = (height, width)
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def _mix_samples(x: Tensor) -> Tensor:
    """Average every sample with another one.

    This is mixup with equal shares, which changes the samples more than any other shares.
    """
    return (x + x[torch.randperm(len(x))]) / 2


def _mix_batch(x: Tensor) -> Tensor:
    """Mix every sample with another one by shares of Beta(0.8, 0.8), timm's usual mixup."""
    shares = torch.distributions.Beta(0.8, 0.8).sample((len(x),)).to(x).reshape(-1, *[1] * (x.ndim - 1))
    return shares * x + (1 - shares) * x[torch.randperm(len(x))]
