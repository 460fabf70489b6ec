"""Samples that are rows of an array (N, …): floats as they are, uint8 as images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.arrays.stored_array import StoredArray
from ckpt_tools.data.images.transforms import ImageTransform, PixelScale, stack_images
from ckpt_tools.data.sample_order import Reading, random_order
from ckpt_tools.data.stream import Chunk, IndexedStream
from ckpt_tools.errors import DataError

__all__ = ["ArraySource"]


@dataclass(frozen=True)
class ArraySource:
    """The rows of an array.

    Floats of any width become float32 and count as preprocessed. Uint8 arrays (N, C, H, W), (N, H,
    W) and, where the last axis alone can be the channels, (N, H, W, C) are images: they are resized
    and cropped like files, unless height and width already are the model's; then nothing is
    resampled. Either way they are divided by 255 and normalised. Grey becomes RGB, or RGB grey,
    where the model wants the other.
    """

    spec: str
    array: StoredArray
    limit: int | None = None
    seed: int = 0
    kind: Literal["array", "dataset"] = "array"

    @property
    def count(self) -> int:
        """Samples in one pass."""
        stored = self.array.shape[0]
        return stored if self.limit is None else min(self.limit, stored)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one stored sample, channels first."""
        if not self.is_preprocessed:
            # A tensor on "meta" has a shape and no values, so nothing is read here.
            return tuple(_channels_first(torch.empty(self.array.shape, device="meta")).shape[1:])
        return self.array.shape[1:]

    @property
    def is_preprocessed(self) -> bool:
        """Whether the samples go to the model as they are: floats do, pixels do not."""
        return not self.array.holds_pixels

    def batches(self, input_spec: InputSpec | None, reading: Reading) -> IndexedStream:
        """Float32 batches (n, …). Workers and a cache are used only where images are resampled.

        Raises DataError if the samples do not fit ``input_spec``, or are uint8 and there is none.
        """
        image: ImageTransform | None
        finish: Callable[[Tensor], Tensor]
        if self.is_preprocessed:
            self._check_floats(input_spec)
            image, finish, words = None, _as_float32, "floats, taken as they are"
        else:
            image, finish, words = self._pixels(input_spec)
        if image is None:
            # The rows are in memory or mapped: copying them takes no time.
            reading = replace(reading, workers=0, cached=False)
        elif reading.workers is None and image.spec.shape[1:] == self.sample_shape[1:]:
            reading = replace(reading, workers=0)
        return IndexedStream(
            ArrayRows(self._rows, image),
            random_order(self.array.shape[0], limit=self.limit, seed=self.seed),
            reading,
            name=self.array.label,
            transform=words,
            finish=finish,
        )

    @functools.cached_property
    def _rows(self) -> Tensor:
        """The samples, read once for all models that they are fed to."""
        rows = self.array.load()
        return rows if self.is_preprocessed else _channels_first(rows)

    def _check_floats(self, input_spec: InputSpec | None) -> None:
        if input_spec is None:
            return
        shape, expected = self.sample_shape, input_spec.shape
        # Only the channels must agree: height and width may differ from those of training.
        if len(shape) != len(expected) or (len(expected) > 1 and shape[0] != expected[0]):
            raise DataError(
                f"{self.array.label}: samples have shape {shape}, the model takes {expected} "
                f"(says {input_spec.origin}). Floats are not rearranged: "
                f"save them as (N, {_format_shape(expected)})."
            )

    def _pixels(self, input_spec: InputSpec | None) -> tuple[ImageTransform | None, PixelScale, str]:
        shape = self.sample_shape
        if input_spec is None:
            raise DataError(
                f"{self.array.label}: uint8 pixels {shape}; how they become an input of this model "
                f"is unknown. Give --input-size {_format_shape(shape)} with --mean and --std as in "
                f"training, or save floats."
            )
        scale = PixelScale(input_spec)
        if shape == input_spec.shape:
            return None, scale, f"uint8 at the model's size, {scale}"
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise DataError(
                f"{self.array.label}: uint8 samples of shape {shape} cannot be made into "
                f"{input_spec.shape} (says {input_spec.origin}). "
                f"Images have 1 or 3 channels; save anything else as floats."
            )
        image = ImageTransform(input_spec)
        return image, scale, f"{image}, {scale}"


@dataclass(frozen=True)
class ArrayRows:
    """Reads rows of an array by number, as they are or, with ``transform``, as images."""

    rows: Tensor
    transform: ImageTransform | None

    def __getitem__(self, indices: list[int]) -> Chunk:
        """Return the rows (n, …) in this order; an array has no unreadable ones."""
        rows = self.rows[torch.tensor(indices)]
        if self.transform is not None:
            rows = stack_images([_fit_image(_to_image(row), self.transform) for row in rows])
        return Chunk(rows, {})

    def name(self, index: int) -> str:
        """Return the number of the row, as messages show it."""
        return f"row {index}"


def _fit_image(image: Image.Image, transform: ImageTransform) -> Tensor:
    # At the model's size only the channels may differ: resampling would blur the pixels.
    return transform.convert_colours(image) if image.size == transform.size else transform(image)


def _to_image(row: Tensor) -> Image.Image:
    # PIL takes images of one channel as (H, W).
    pixels = row.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _channels_first(rows: Tensor) -> Tensor:
    """Return images as (N, C, H, W), and other shapes as they are.

    The last axis counts as the channels only where it alone can be: (N, 3, H, 3) stays as it is.
    """
    if rows.ndim == 3:
        return rows.unsqueeze(1)
    if rows.ndim == 4 and rows.shape[3] in (1, 3) and rows.shape[1] not in (1, 3):
        return rows.permute(0, 3, 1, 2)
    return rows


def _as_float32(batch: Tensor) -> Tensor:
    return batch.float()


def _format_shape(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
