"""A varied population of images from two photographs: crops, flips, blends and colour changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor


def photos(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, 3, height, width) and a class (N,) for each.

    The class says which photograph the crop is from, and which quarter of its width.
    """
    g = torch.Generator().manual_seed(seed)
    sources = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.long)
    for number in range(count):
        first, label = _crop(sources, height, width, g)
        second, _ = _crop(sources, height, width, g)
        share = 0.3 * torch.rand((), generator=g)
        image = (1 - share) * first + share * second
        gain, offset = (
            0.6 + 0.8 * torch.rand(3, 1, 1, generator=g),
            60 * (torch.rand(3, 1, 1, generator=g) - 0.5),
        )
        images[number] = (image * gain + offset).clamp(0, 255).to(torch.uint8)
        labels[number] = label
    return images, labels


def _crop(sources: list[Tensor], height: int, width: int, g: torch.Generator) -> tuple[Tensor, int]:
    which = int(torch.randint(len(sources), (), generator=g))
    photo = sources[which]
    scale = 0.15 + 0.5 * float(torch.rand((), generator=g))  # of the photograph's height
    tall = round(scale * photo.shape[1])
    wide = min(round(tall * width / height), photo.shape[2])
    top = int(torch.randint(photo.shape[1] - tall + 1, (), generator=g))
    left = int(torch.randint(photo.shape[2] - wide + 1, (), generator=g))
    window = photo[None, :, top : top + tall, left : left + wide].float()
    image = F.interpolate(window, size=(height, width), mode="bilinear", antialias=True)[0]
    flipped = image.flip(2) if float(torch.rand((), generator=g)) < 0.5 else image
    return flipped, 4 * which + 4 * (left + wide // 2) // photo.shape[2]


def jpeg_folder(root: Path, count: int, height: int, width: int) -> Path:
    """The same as JPEG files in class folders below ``root``; kept if they are there already."""
    folder = root / f"{count}-{height}x{width}"
    if not folder.exists():
        for start in range(0, count, 1000):  # a thousand at a time: memory stays small
            images, labels = photos(min(1000, count - start), height, width, seed=start)
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                path = folder / str(label) / f"{start + number:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=90)
    return folder
