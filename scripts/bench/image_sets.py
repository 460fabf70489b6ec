"""Small data sets made of what scikit-learn ships: digits, digits in colour, crops of two
photographs.

Every set is kept as uint8 images at its own resolution, so that "another resize" can be tried from
the same source.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

SIZE = 32
_TRAIN_SHARE = 0.55
_PATCH = 64  # side of a crop of a photograph
_CROPS = 1800


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (uint8, N, C, h, w) at their own resolution, labels (N,), and two splits as indices."""

    name: str
    source: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor

    @property
    def channels(self) -> int:
        return self.source.shape[1]


def resize(source: Tensor, size: int = SIZE, how: str = "bilinear") -> Tensor:
    """uint8 images at ``size``: as PIL does it (antialiased) for bilinear and bicubic."""
    if how == "nearest":
        return F.interpolate(source.float(), size=(size, size), mode="nearest").to(torch.uint8)
    floats = F.interpolate(source.float(), size=(size, size), mode=how, antialias=True, align_corners=False)
    return floats.round().clamp(0, 255).to(torch.uint8)


def crop_centre(source: Tensor, share: float) -> Tensor:
    """The centre of every image, ``share`` of its side."""
    side = source.shape[-1]
    cut = max(1, round(side * (1 - share) / 2))
    return source[..., cut : side - cut, cut : side - cut]


@functools.cache
def image_set(name: str) -> ImageSet:
    """ "digits" (grey), "coloured" (digits), "photos" (both), "china" and "flower" (one each)."""
    generator = torch.Generator().manual_seed(0)
    source, labels = _SOURCES[name](generator)
    order = torch.randperm(len(source), generator=generator)
    cut = round(len(order) * _TRAIN_SHARE)
    return ImageSet(name, source, labels, order[:cut], order[cut:])


def _digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    return pixels.round().to(torch.uint8), torch.from_numpy(bunch.target).long()


def _coloured_digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Light warm ink on dark cool paper, both varied from image to image."""
    pixels, labels = _digits(generator)
    ink = torch.tensor([0.9, 0.6, 0.3]) + 0.3 * (torch.rand(len(pixels), 3, generator=generator) - 0.5)
    paper = torch.tensor([0.15, 0.25, 0.45]) + 0.25 * (torch.rand(len(pixels), 3, generator=generator) - 0.5)
    share = pixels.float() / 255
    colours = share * ink[:, :, None, None] + (1 - share) * paper[:, :, None, None]
    return (255 * colours.clamp(0, 1)).round().to(torch.uint8), labels


def _photos(generator: torch.Generator, chosen: tuple[int, ...] = (0, 1)) -> tuple[Tensor, Tensor]:
    """Crops; the class says which photograph and which quarter of its width."""
    images = [torch.from_numpy(np.array(load_sample_images().images[i])).permute(2, 0, 1) for i in chosen]
    patches, labels = [], []
    for i in range(_CROPS):
        photo = images[i % len(images)]
        top = int(torch.randint(photo.shape[1] - _PATCH, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - _PATCH, (), generator=generator))
        patches.append(photo[:, top : top + _PATCH, left : left + _PATCH])
        labels.append(4 * (i % len(images)) + 4 * (left + _PATCH // 2) // photo.shape[2])
    return torch.stack(patches), torch.tensor(labels)


_SOURCES = {
    "digits": _digits,
    "coloured": _coloured_digits,
    "photos": _photos,
    "china": lambda generator: _photos(generator, (0,)),
    "flower": lambda generator: _photos(generator, (1,)),
}
