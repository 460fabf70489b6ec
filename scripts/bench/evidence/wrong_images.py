"""Images that a net was not trained on: in other units, or of another data set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

from bench.evidence.image_data import ImageData
from ckpt_tools.demo.digits import POINT_MEAN, POINT_STD

WrongInput = Callable[[ImageData, Tensor], Tensor]
"""Makes the input of a model out of raw images (N, C, H, W)."""

# Reversed channels are not among them: ink and paper of the coloured digits have random colours.
WRONG_INPUTS: dict[str, WrongInput] = {
    "no normalisation": lambda data, raw: to_pixels(raw),
    "0–255": lambda data, raw: 255 * to_pixels(raw),
    "another data set": lambda data, raw: data.normalise(from_pixels(photographs(raw), raw)),
}


def to_pixels(raw: Tensor) -> Tensor:
    """Raw images as pixels of 0–1; grey digits are stored normalised."""
    return raw.float() / 255 if raw.dtype == torch.uint8 else (raw * POINT_STD + POINT_MEAN) / 16


def from_pixels(pixels: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_pixels``."""
    if like.dtype == torch.uint8:
        return (pixels * 255).round().to(torch.uint8)
    return (16 * pixels - POINT_MEAN) / POINT_STD


def photographs(like: Tensor) -> Tensor:
    """As many crops of scikit-learn's two photographs, as pixels of 0–1, of the same shape."""
    count, channels, height, width = like.shape
    generator = torch.Generator().manual_seed(int(like.float().sum()) % 2**31)
    crops = []
    for number in range(count):
        photo = _photos()[number % 2]
        side = int(torch.randint(60, 200, (), generator=generator))
        top, left = (int(torch.randint(length - side, (), generator=generator)) for length in photo.shape[1:])
        window = photo[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(window, size=(height, width), mode="bilinear", antialias=True))
    pixels = torch.cat(crops)
    return pixels if channels == 3 else pixels.mean(1, keepdim=True)


@functools.cache
def _photos() -> list[Tensor]:
    return [torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
