"""Turn images into samples, as the evaluation transforms of timm and torchvision do.

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
"""Pixels that an image may have before and after resizing.

PIL and torch hold an image two or three times, with 3 or 4 bytes for each pixel.
"""

_CROP_MODES = ("center", "squash", "border")
_MODES: dict[int, Literal["L", "RGB"]] = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageTransform:
    """Turns any PIL image into a uint8 tensor (C, H, W): convert, resize, crop or pad.

    Raises UsageError for an unknown interpolation or crop mode and for an impossible crop fraction,
    and DataError if the model's input is no image of one or three channels.
    """

    spec: InputSpec

    def __post_init__(self) -> None:
        spec = self.spec
        if len(spec.shape) != 3 or spec.shape[0] not in _MODES:
            raise DataError(
                f"images become samples of shape (1, H, W) or (3, H, W), the model takes "
                f"{spec.shape} (says {spec.origin}). Give --input-size, or the data as an array."
            )
        if spec.interpolation not in INTERPOLATIONS:
            names = ", ".join(INTERPOLATIONS)
            raise UsageError(f"interpolation {spec.interpolation!r} is unknown. One of: {names}.")
        if spec.crop_mode not in _CROP_MODES:
            raise UsageError(f"crop mode {spec.crop_mode!r} is unknown. One of: {', '.join(_CROP_MODES)}.")
        if not 0 < spec.crop_pct < math.inf:
            raise UsageError(
                f"crop fraction {spec.crop_pct} is not above 0. Common values: 0.875, 0.95, 1.0."
            )

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """PIL's name of the colour space that the model sees."""
        return _MODES[self.spec.shape[0]]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a finished sample."""
        return self.spec.shape[2], self.spec.shape[1]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a uint8 tensor (C, H, W).

        Raises PIL's DecompressionBombError for an image that resizing would make too large.
        """
        image = self._convert_mode(image)
        if self.accepts_pixels(image.size):
            return self.transform_pixels(to_tensor(image))
        return self._crop(
            to_tensor(image.resize(self._goal(image.size), INTERPOLATIONS[self.spec.interpolation]))
        )

    def accepts_pixels(self, size: tuple[int, int]) -> bool:
        """Whether ``transform_pixels`` gives the same result for an image of this size."""
        # Torch needs longer than PIL for images of one channel.
        return self.mode == "RGB" and matches_pil(size, self._goal(size), self.spec.interpolation)

    def transform_pixels(self, pixels: Tensor) -> Tensor:
        """Resize and crop a decoded image, uint8 (3, H, W) and channels last in memory."""
        return self._crop(
            resize_like_pil(pixels, self._goal((pixels.shape[2], pixels.shape[1])), self.spec.interpolation)
        )

    def _goal(self, size: tuple[int, int]) -> tuple[int, int]:
        goal = self.size_before_crop(size)
        # A strip of 1×60000 pixels is no large image, but resizing its short side makes it one.
        if goal[0] * goal[1] > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{size[0]}×{size[1]} pixels would be resized to {goal[0]}×{goal[1]}"
            )
        return goal

    def convert_colours(self, image: Image.Image) -> Tensor:
        """Return a uint8 tensor (C, H, W) of the image at its own size."""
        return to_tensor(self._convert_mode(image))

    def _convert_mode(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)

    def size_before_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size to which an image of this width and height is resized before the crop."""
        width, height = size
        # crop_pct often comes from torchvision as crop / resize. Without the small number, rounding
        # could make 224 / (224 / 232) a little less than 232, and floor would return 231.
        goal_w, goal_h = (math.floor(side / self.spec.crop_pct + 1e-6) for side in self.size)
        if self.spec.crop_mode == "squash":
            return goal_w, goal_h
        if self.spec.crop_mode == "center" and goal_w == goal_h:
            # The longer side is rounded down, as in torchvision. The other modes round, as in timm.
            if width <= height:
                return goal_w, int(goal_w * height / width)
            return int(goal_h * width / height), goal_h
        choose = max if self.spec.crop_mode == "border" else min
        ratio = choose(height / goal_h, width / goal_w)
        return round(width / ratio), round(height / ratio)

    def _crop(self, pixels: Tensor) -> Tensor:
        height, width = self.spec.shape[1:]
        top, left = _offset(pixels.shape[1], height), _offset(pixels.shape[2], width)
        if top >= 0 and left >= 0:
            return pixels[:, top : top + height, left : left + width]
        canvas = torch.tensor(self._fill(), dtype=torch.uint8).repeat(height, width, 1).permute(2, 0, 1)
        visible = pixels[:, max(top, 0) : top + height, max(left, 0) : left + width]
        y, x = max(-top, 0), max(-left, 0)
        canvas[:, y : y + visible.shape[1], x : x + visible.shape[2]] = visible
        return canvas

    def _fill(self) -> list[int]:
        # As in timm, the border has the mean colour of the training data; other padding is black.
        channels = self.spec.shape[0]
        if self.spec.crop_mode != "border" or not self.spec.mean:
            return [0] * channels
        levels = [min(max(round(255 * value), 0), 255) for value in self.spec.mean]
        return levels * channels if len(levels) == 1 else levels[:channels]

    def __str__(self) -> str:
        width, height = self.size
        resized = "×".join(str(math.floor(side / self.spec.crop_pct + 1e-6)) for side in (height, width))
        modes = {"center": "shorter side to fit", "squash": "squashed to", "border": "longer side to fit"}
        geometry = f"{modes[self.spec.crop_mode]} {resized} ({self.spec.interpolation})"
        return f"{self.mode}, {geometry}, centre {height}×{width}"


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack uint8 images (C, H, W) of one size to a batch (n, C, H, W), channels last in memory."""
    channels, height, width = images[0].shape
    batch = np.empty((len(images), height, width, channels), np.uint8)
    # Numpy copies in this thread. torch.stack wakes all its threads for every image, which on a
    # busy machine costs more than decoding.
    for place, image in zip(batch, images, strict=True):
        place[:] = image.permute(1, 2, 0).numpy()
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def to_tensor(image: Image.Image) -> Tensor:
    """Return a uint8 tensor (C, H, W) in the order of PIL's pixels: channels last in memory."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).permute(2, 0, 1)


def _offset(length: int, goal: int) -> int:
    """Return where a centre crop of ``goal`` pixels begins, negative where pixels are added."""
    # Torchvision rounds to even where pixels are cut off, and down where they are added.
    return round((length - goal) / 2) if length >= goal else -((goal - length) // 2)


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
        # Computed in float64 and rounded once: (x - 255 mean) / (255 std) = x scale + shift.
        cpu = torch.device("cpu")
        self._constants = {cpu: ((1 / (255 * self.std)).float(), (-self.mean / self.std).float())}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 from uint8 (N, C, …), on the same device, in the same memory format."""
        scale, shift = self._constants_on(pixels.device)
        if pixels.device.type != "cpu":
            return pixels.float().mul_(scale).add_(shift)
        if pixels.ndim == 4 and pixels.is_contiguous(memory_format=torch.channels_last):
            count, _, height, width = pixels.shape
            # The constants are repeated to a row of pixels: three values leave vector units idle.
            rows = pixels.permute(0, 2, 3, 1).reshape(count, height, -1)
            repeated = (
                constant.expand(pixels.shape[1], 1, 1).flatten().repeat(width) for constant in (scale, shift)
            )
            return _scale_and_shift(rows, *repeated).reshape(count, height, width, -1).permute(0, 3, 1, 2)
        return _scale_and_shift(pixels, scale, shift)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:  # copied once, because every copy waits for the device
            scale, shift = self._constants[torch.device("cpu")]
            self._constants[device] = scale.to(device), shift.to(device)
        return self._constants[device]

    def __str__(self) -> str:
        mean, std = (
            ", ".join(f"{value:.4g}" for value in values.flatten().tolist())
            for values in (self.mean, self.std)
        )
        return f"/255, mean {mean}, std {std}"


def _scale_and_shift(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # Numpy stays in this thread, where torch would wait for cores that are busy decoding. It also
    # asks for large memory pages: a batch in small ones takes longer to allocate than to compute.
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
