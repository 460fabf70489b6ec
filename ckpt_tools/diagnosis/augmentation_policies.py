"""Random changes of images as the policies of training make them.

RandAugment (Cubuk et al. 2020, arXiv:1909.13719) changes every image by two operations of moderate
strength, TrivialAugment (Müller & Hutter 2021, arXiv:2103.10158) by one of any strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor, float], Tensor]
"""Changes the pixels (C, H, W) of an image, which are in 0–1, by a strength in −1 to 1."""


@dataclass(frozen=True)
class Geometry:
    """How far a policy moves an image at strength 1: degrees, slopes, and shares of the side.

    ``pixels`` instead of a share move small images further than large ones.
    """

    rotation: float
    shear: float
    translation: float = 0.0
    pixels: float = 0.0

    def rotate(self, image: Tensor, strength: float) -> Tensor:
        """Rotate an image (C, H, W) around its centre."""
        angle = math.radians(strength * self.rotation)
        return _transform(
            image, [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
        )

    def shear_horizontally(self, image: Tensor, strength: float) -> Tensor:
        """Move every row of an image (C, H, W) in proportion to its place."""
        return _transform(image, [[1.0, strength * self.shear, 0.0], [0.0, 1.0, 0.0]])

    def shear_vertically(self, image: Tensor, strength: float) -> Tensor:
        """Move every column of an image (C, H, W) in proportion to its place."""
        return _transform(image, [[1.0, 0.0, 0.0], [strength * self.shear, 1.0, 0.0]])

    def translate_horizontally(self, image: Tensor, strength: float) -> Tensor:
        """Move an image (C, H, W) along its rows."""
        share = self.translation + self.pixels / image.shape[-1]
        return _transform(image, [[1.0, 0.0, 2 * strength * share], [0.0, 1.0, 0.0]])

    def translate_vertically(self, image: Tensor, strength: float) -> Tensor:
        """Move an image (C, H, W) along its columns."""
        share = self.translation + self.pixels / image.shape[-2]
        return _transform(image, [[1.0, 0.0, 0.0], [0.0, 1.0, 2 * strength * share]])


# Those of torchvision 0.29 (transforms/autoaugment.py). The first is also that of timm's `rand` policies.
RAND_AUGMENT = Geometry(rotation=30, shear=0.3, translation=0.45)
TRIVIAL_AUGMENT = Geometry(rotation=135, shear=0.99, pixels=32)
# Of anything that moves images further than RandAugment, and small ones less than TrivialAugment.
STRONG = Geometry(rotation=90, shear=1.0, translation=0.5)


@dataclass(frozen=True)
class Policy:
    """Changes every image of a batch (N, C, H, W) by random operations.

    ``black`` (C,) is the value of a black pixel; the brightest value of a channel counts as white.
    ``strength`` is the largest one; with ``varies`` it is drawn for every image.
    """

    black: Tensor
    operations: int
    strength: float
    varies: bool
    geometry: Geometry = STRONG

    def __call__(self, x: Tensor) -> Tensor:
        """Return changed images."""
        low = self.black.to(x).reshape(1, -1, 1, 1)
        scale = (x.amax((0, 2, 3), keepdim=True) - low).clamp_min(1e-6)
        pixels = ((x - low) / scale).clamp(0, 1)
        return torch.stack([self._change(image) for image in pixels]) * scale + low

    def _change(self, image: Tensor) -> Tensor:
        geometry = self.geometry
        choices = (
            geometry.rotate,
            geometry.shear_horizontally,
            geometry.shear_vertically,
            geometry.translate_horizontally,
            geometry.translate_vertically,
            *_COLOUR_OPERATIONS,
        )
        for number in torch.randint(len(choices), (self.operations,)).tolist():
            size = self.strength * (float(torch.rand(())) if self.varies else 1.0)
            sign = 1 if float(torch.rand(())) < 0.5 else -1
            image = choices[number](image, sign * size).clamp(0, 1)
        return image


@dataclass(frozen=True)
class Greyscale:
    """Turns images (N, 3, H, W) grey with a probability of a half."""

    black: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images, half of them grey."""
        low = self.black.to(x).reshape(1, -1, 1, 1)
        scale = (x.amax((0, 2, 3), keepdim=True) - low).clamp_min(1e-6)
        grey = _grey((x - low) / scale).expand_as(x) * scale + low
        return torch.where((torch.rand(len(x), device=x.device) < 0.5).reshape(-1, 1, 1, 1), grey, x)


def _keep(image: Tensor, strength: float) -> Tensor:
    return image


def _transform(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """Transform the coordinates of an image; what comes in is black."""
    theta = torch.tensor([matrix], dtype=image.dtype, device=image.device)
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, mode="nearest", align_corners=False)[0]


def _brighten(image: Tensor, strength: float) -> Tensor:
    return image * (1 + strength)


def _saturate(image: Tensor, strength: float) -> Tensor:
    grey = _grey(image)
    return grey + (image - grey) * (1 + strength)


def _contrast(image: Tensor, strength: float) -> Tensor:
    mean = image.mean()
    return mean + (image - mean) * (1 + strength)


def _posterize(image: Tensor, strength: float) -> Tensor:
    levels = 2.0 ** round(8 - 6 * abs(strength))
    return (image * levels).floor() / levels


def _solarize(image: Tensor, strength: float) -> Tensor:
    return torch.where(image >= 1 - abs(strength), 1 - image, image)


def _stretch(image: Tensor, strength: float) -> Tensor:
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(1e-6), image)


def _equalize(image: Tensor, strength: float) -> Tensor:
    """Give the values of each channel their ranks, so that all are equally frequent."""
    flat = image.flatten(1).contiguous()
    ranks = torch.searchsorted(flat.sort(1).values, flat, right=True)
    return ((ranks - 1) / max(1, flat.shape[1] - 1)).reshape(image.shape)


def _grey(image: Tensor) -> Tensor:
    return image.mean(-3, keepdim=True)


_COLOUR_OPERATIONS: tuple[Operation, ...] = (
    _keep,
    _brighten,
    _saturate,
    _contrast,
    _posterize,
    _solarize,
    _stretch,
    _equalize,
)
