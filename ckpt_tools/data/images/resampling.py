"""Resize pixels with torch where the result is the same as PIL's: it is several times faster."""

from __future__ import annotations

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = ["INTERPOLATIONS", "matches_pil", "resize_like_pil"]

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "random": Image.Resampling.BICUBIC,  # timm's word for "a random choice in training"
}

_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def matches_pil(size: tuple[int, int], goal: tuple[int, int], interpolation: str) -> bool:
    """Whether ``resize_like_pil`` gives PIL's pixels for images of this width and height.

    The two agree to 0.01 levels on average.

    PIL's weights have 22 bits, torch's about 15, so a pixel in a few hundred is rounded to the
    other side.
    """
    # PIL resizes rows before columns, as torch always does, unless the height shrinks by more than
    # twice as much as the width. The order matters, because each step rounds and clips.
    shrinks = size[1] - goal[1]
    rows_first = shrinks <= 0 or shrinks <= 2 * (size[0] - goal[0])
    return INTERPOLATIONS[interpolation] in _MODES and rows_first


def resize_like_pil(pixels: Tensor, goal: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 (C, H, W), channels last in memory, to ``goal`` = (width, height).

    ``interpolation`` must be one for which ``matches_pil`` is true: bilinear, bicubic or random.
    """
    mode = _MODES[INTERPOLATIONS[interpolation]]
    # pixels[None] alone does not count as channels last, so torch would copy it.
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size=(goal[1], goal[0]), mode=mode, antialias=True)[0]
