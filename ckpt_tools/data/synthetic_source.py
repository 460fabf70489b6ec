"""Random inputs as a source of data, for a correction without training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.images.transforms import PixelScale
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.data.stream import Chunk, IndexedStream
from ckpt_tools.errors import DataError
from ckpt_tools.model.random_inputs import (
    DEFAULT_COUNT,
    DEFAULT_NOISE,
    NoiseKind,
    images_of_noise,
    noise_shape,
)

__all__ = ["SyntheticSource"]

_DESCRIPTIONS = {
    "smooth": "random images of smooth noise",
    "1/f^2 power": "random images with a 1/f² power spectrum",
    "1/f power": "random images with a 1/f power spectrum",
    "white": "random images of white noise",
}

_IMAGE_CHANNELS = (1, 3, 4)  # grey, RGB, and RGB with an alpha or infrared channel

# Pixels have mean 0.45 and standard deviation 0.25 on the scale 0–1, about the values of ImageNet (0.449 and
# 0.226) and of CIFAR-10 (0.473 and 0.251). Clamping to 0–1, which real pixels obey, takes away 4 % of the
# standard deviation: N(0.45, 0.25²) would end with 0.452 and 0.239. These values end with 0.450 and 0.250.
_MEAN_BEFORE_CLAMPING, _STD_BEFORE_CLAMPING = 0.4468, 0.2651


@dataclass(frozen=True)
class SyntheticSource:
    """Random inputs in place of training data; a ``Source``.

    Each input has a random generator of its own, so that the inputs are the same in every pass, in every
    process, and for every batch size.

    ``sample_shape`` is the shape of inputs that no InputSpec describes. They have mean 0 and variance 1. It
    is None where the model's InputSpec decides.
    """

    sample_shape: tuple[int, ...] | None = None
    count: int = DEFAULT_COUNT
    seed: int = 0
    noise: NoiseKind = DEFAULT_NOISE
    spec: str = "synthetic inputs"
    kind: Literal["synthetic"] = "synthetic"

    @property
    def is_preprocessed(self) -> bool:
        """Whether there are inputs without an InputSpec, since their shape is known."""
        return self.sample_shape is not None

    def batches(self, input_spec: InputSpec | None, reading: Reading) -> IndexedStream:
        """Return a stream of float32 batches (n, *shape).

        Images of a model whose InputSpec is known are made of pixels and normalised as real ones are; all
        other inputs have mean 0 and variance 1. An image has three dimensions (C, H, W) and one, three or
        four channels, or as many as ``input_spec`` has means.

        Raises DataError if no shape is known.
        """
        shape = self.sample_shape if input_spec is None else input_spec.shape
        if shape is None:
            raise DataError(
                f"{self.spec}: the shape of the model's input is not known. "
                "Give the shape of one sample, for example --input-size 3,224,224."
            )
        finish: Callable[[Tensor], Tensor] = _keep
        description = _describe_samples(shape, self.noise)
        makes_pixels = input_spec is not None and _is_image(input_spec)
        if input_spec is not None and makes_pixels:
            scale = PixelScale(input_spec)
            finish, description = scale, f"{description}, {scale}"
        return IndexedStream(
            _RandomSamples(shape, self.noise, self.seed, makes_pixels),
            torch.arange(self.count, device="cpu"),
            # Pixels can be kept in a quarter of the memory, and so they are where it is asked for.
            reading if makes_pixels else replace(reading, cached=False),
            name=self.spec,
            transform=description,
            finish=finish,
        )


@dataclass(frozen=True)
class _RandomSamples:
    """Random inputs by number, as uint8 pixels or as floats with mean 0 and variance 1."""

    shape: tuple[int, ...]
    noise: NoiseKind
    seed: int
    makes_pixels: bool

    def __getitem__(self, indices: list[int]) -> Chunk:
        """Make the inputs with these numbers."""
        if len(self.shape) != 3:
            return Chunk(self._draw_numbers(indices, self.shape), {})
        numbers = self._draw_numbers(indices, noise_shape(self.shape, self.noise))
        images = images_of_noise(numbers, self.shape, self.noise)
        return Chunk(_to_pixels(images) if self.makes_pixels else images, {})

    def _draw_numbers(self, indices: list[int], shape: tuple[int, ...]) -> Tensor:
        numbers = torch.empty(len(indices), *shape, dtype=torch.float32, device="cpu")
        generator = torch.Generator("cpu")  # the global one stays as it is
        for row, index in zip(numbers, indices, strict=True):
            # The generator takes 32 bits of its seed; neighbouring seeds give unrelated numbers. The prime
            # keeps the inputs of one seed apart from those of the next.
            generator.manual_seed((self.seed * 1_000_003 + index) % 2**32)
            row.normal_(generator=generator)
        return numbers

    def name(self, index: int) -> str:
        """Return the number of the input, as messages show it."""
        return f"random input {index}"


def _to_pixels(images: Tensor) -> Tensor:
    """Turn images with mean 0 and variance 1 into uint8 pixels. ``images`` are overwritten."""
    pixels = images.mul_(255 * _STD_BEFORE_CLAMPING).add_(255 * _MEAN_BEFORE_CLAMPING + 0.5)
    return pixels.clamp_(0, 255).to(torch.uint8)  # which rounds down, hence the 0.5


def _is_image(spec: InputSpec) -> bool:
    return len(spec.shape) == 3 and (spec.shape[0] in _IMAGE_CHANNELS or len(spec.mean) == spec.shape[0])


def _describe_samples(shape: tuple[int, ...], kind: NoiseKind) -> str:
    description = _DESCRIPTIONS[kind] if len(shape) == 3 else "independent random numbers N(0, 1)"
    return f"{description}, {'×'.join(map(str, shape))}"


def _keep(batch: Tensor) -> Tensor:
    return batch
