"""From an image to a sample: the evaluation transforms of timm and torchvision, without importing them.

Both libraries resize, crop, divide by 255 and normalise, and train their models to expect exactly
that. The geometry here follows ``timm.data.transforms_factory.transforms_imagenet_eval`` and
torchvision's ``ImageClassification`` preset, rounding included; the tests compare with both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.images.resampling import INTERPOLATIONS, matches_pil, resize_like_pil
from ckpt_tools.errors import DataError, UsageError

__all__ = ["MAX_PIXELS", "ImageTransform", "PixelScale", "stack_images"]

MAX_PIXELS = 1 << 26
"""Pixels of an image, before and after resizing: PIL and torch hold it two or three times, with 3 or 4 bytes each."""

_CROP_MODES = ("center", "squash", "border")
_MODES: dict[int, Literal["L", "RGB"]] = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageTransform:
    """Turns any PIL image into a uint8 tensor (C, H, W): convert, resize, crop or pad.

    Raises UsageError for an interpolation, crop mode or crop fraction that means nothing, and
    DataError if the model's input is no image of one or three channels.
    """

    spec: InputSpec

    def __post_init__(self) -> None:
        spec = self.spec
        if len(spec.shape) != 3 or spec.shape[0] not in _MODES:
            raise DataError(
                f"images become samples of shape (1, H, W) or (3, H, W), the model takes {spec.shape} "
                f"(says {spec.origin}). Give --input-size, or the data as an array of that shape."
            )
        if spec.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation {spec.interpolation!r} is unknown. One of: {', '.join(INTERPOLATIONS)}.")
        if spec.crop_mode not in _CROP_MODES:
            raise UsageError(f"crop mode {spec.crop_mode!r} is unknown. One of: {', '.join(_CROP_MODES)}.")
        if not 0 < spec.crop_pct < math.inf:
            raise UsageError(f"crop fraction {spec.crop_pct} is not above 0. Common values: 0.875, 0.95, 1.0.")

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """PIL's name of the colour space that the model sees."""
        return _MODES[self.spec.shape[0]]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a finished sample."""
        return self.spec.shape[2], self.spec.shape[1]

    def __call__(self, image: Image.Image) -> Tensor:
        """A uint8 tensor (C, H, W). Raises PIL's DecompressionBombError for absurd strips."""
        image = self._convert_mode(image)
        if self.accepts_pixels(image.size):
            return self.transform_pixels(to_tensor(image))
        return self._crop(to_tensor(image.resize(self._goal(image.size), INTERPOLATIONS[self.spec.interpolation])))

    def accepts_pixels(self, size: tuple[int, int]) -> bool:
        """Whether ``of_pixels`` makes the same of an image of this width and height."""
        # one channel takes torch longer than PIL
        return self.mode == "RGB" and matches_pil(size, self._goal(size), self.spec.interpolation)

    def transform_pixels(self, pixels: Tensor) -> Tensor:
        """A uint8 tensor (3, H, W) of a decoded image, uint8 (3, H, W) and channels last in memory."""
        return self._crop(
            resize_like_pil(pixels, self._goal((pixels.shape[2], pixels.shape[1])), self.spec.interpolation)
        )

    def _goal(self, size: tuple[int, int]) -> tuple[int, int]:
        goal = self.size_before_crop(size)
        # A strip of 1×60000 pixels is no large image, and would grow to gigabytes here.
        if goal[0] * goal[1] > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{size[0]}×{size[1]} pixels would be resized to {goal[0]}×{goal[1]}")
        return goal

    def convert_colours(self, image: Image.Image) -> Tensor:
        """A uint8 tensor (C, H, W) of the image at its own size."""
        return to_tensor(self._convert_mode(image))

    def _convert_mode(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)

    def size_before_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height, before the crop, of an image of this width and height."""
        width, height = size
        # crop_pct often is crop / resize of torchvision: 224 / (224 / 232) must not fall short of
        # 232.
        goal_w, goal_h = (math.floor(side / self.spec.crop_pct + 1e-6) for side in self.size)
        if self.spec.crop_mode == "squash":
            return goal_w, goal_h
        if self.spec.crop_mode == "center" and goal_w == goal_h:
            # torchvision cuts the longer side off; everything else in timm rounds it
            if width <= height:
                return goal_w, int(goal_w * height / width)
            return int(goal_h * width / height), goal_h
        choose = max if self.spec.crop_mode == "border" else min
        ratio = choose(height / goal_h, width / goal_w)
        return round(width / ratio), round(height / ratio)

    def _crop(self, pixels: Tensor) -> Tensor:
        (top, height), (left, width) = (
            (_offset(have, want), want) for have, want in zip(pixels.shape[1:], self.spec.shape[1:], strict=True)
        )
        if top >= 0 and left >= 0:
            return pixels[:, top : top + height, left : left + width]
        canvas = torch.tensor(self._fill(), dtype=torch.uint8).repeat(height, width, 1).permute(2, 0, 1)
        seen = pixels[:, max(top, 0) : top + height, max(left, 0) : left + width]
        y, x = max(-top, 0), max(-left, 0)
        canvas[:, y : y + seen.shape[1], x : x + seen.shape[2]] = seen
        return canvas

    def _fill(self) -> list[int]:
        channels = self.spec.shape[0]
        if self.spec.crop_mode != "border" or not self.spec.mean:
            return [0] * channels
        levels = [min(max(round(255 * value), 0), 255) for value in self.spec.mean]
        return levels * channels if len(levels) == 1 else levels[:channels]

    def __str__(self) -> str:
        width, height = self.size
        resized = "×".join(str(math.floor(side / self.spec.crop_pct + 1e-6)) for side in (height, width))
        how = {"center": "shorter side to fit", "squash": "squashed to", "border": "longer side to fit"}
        return f"{self.mode}, {how[self.spec.crop_mode]} {resized} ({self.spec.interpolation}), centre {height}×{width}"


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """A uint8 batch (n, C, H, W) of the tensors that ``to_tensor`` made, channels last in memory like them."""
    channels, height, width = images[0].shape
    batch = np.empty((len(images), height, width, channels), np.uint8)
    # numpy copies in this thread; torch.stack wakes all its threads for every image, on a busy
    # machine at a higher cost than decoding
    for place, image in zip(batch, images, strict=True):
        place[:] = image.permute(1, 2, 0).numpy()
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def to_tensor(image: Image.Image) -> Tensor:
    """A uint8 tensor (C, H, W) on the image's own pixel order, that is, channels last in memory."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).permute(2, 0, 1)


def _offset(have: int, want: int) -> int:
    # torchvision's rounding: to even where pixels are cut off, downwards where they are added
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


class PixelScale:
    """``(x / 255 − mean) / std`` per channel, as one float32 operation.

    ``spec.mean`` and ``spec.std`` hold one value, one per channel, or none (0 and 1). Raises
    UsageError for any other number of values, or a std that is not above 0.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.mean = _per_channel(spec.mean or (0.0,), spec, "mean")
        self.std = _per_channel(spec.std or (1.0,), spec, "std")
        if not bool((self.std > 0).all()):
            raise UsageError(f"std {spec.std} must be above 0 in every channel. Give --std.")
        cpu = torch.device("cpu")
        self._constants = {cpu: ((1 / (255 * self.std)).float(), (-self.mean / self.std).float())}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 (N, C, …) from uint8 (N, C, …), on the same device, in the same memory format."""
        scale, shift = self._constants_on(pixels.device)
        if pixels.device.type != "cpu":
            return pixels.float().mul_(scale).add_(shift)
        if pixels.ndim == 4 and pixels.is_contiguous(memory_format=torch.channels_last):
            count, _, height, width = pixels.shape
            # constants as long as a row of pixels: three at a time would keep vector units idle
            rows = pixels.permute(0, 2, 3, 1).reshape(count, height, -1)
            along = (constant.expand(pixels.shape[1], 1, 1).flatten().repeat(width) for constant in (scale, shift))
            return _scale_and_shift(rows, *along).reshape(count, height, width, -1).permute(0, 3, 1, 2)
        return _scale_and_shift(pixels, scale, shift)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:  # sent once: every such copy waits for the device
            scale, shift = self._constants[torch.device("cpu")]
            self._constants[device] = scale.to(device), shift.to(device)
        return self._constants[device]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{v:.4g}" for v in t.flatten().tolist()) for t in (self.mean, self.std))
        return f"/255, mean {mean}, std {std}"


def _scale_and_shift(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # numpy stays in this thread, where torch would wait for cores that are busy decoding, and asks
    # for large memory pages: a batch in small ones takes longer to allocate than to compute
    values = np.empty(pixels.shape, np.float32)
    np.multiply(pixels.numpy(), scale.numpy(), out=values)
    values += shift.numpy()
    return torch.from_numpy(values)


def _per_channel(values: tuple[float, ...], spec: InputSpec, name: str) -> Tensor:
    if len(values) not in (1, spec.shape[0]):
        raise UsageError(
            f"{name} has {len(values)} values, the model takes {spec.shape[0]} channels "
            f"(input {spec.shape}, says {spec.origin}). Give --{name} with one value per channel."
        )
    return torch.tensor(values, dtype=torch.float64).reshape(-1, *[1] * (len(spec.shape) - 1))
