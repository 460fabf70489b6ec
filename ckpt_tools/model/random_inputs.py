"""Random inputs for the paired measurement, where no training data is at hand.

The measurement compares two variances on the same inputs, so what the inputs have of their own cancels.
They only have to excite the channels of a network roughly as its training data did. Neighbouring pixels of
natural images are alike, and so are their colour channels; white noise has neither.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NoiseKind = Literal["smooth", "1/f^2 power", "1/f power", "white"]
"""How strongly the pixels of a random image depend on their neighbours, from strong to not at all.

- ``smooth``: a coarse grid of independent normal numbers, enlarged bicubically;
- ``1/f^2 power``: the power spectrum falls as 1/f², as that of natural images does (Field 1987);
- ``1/f power``: the power spectrum falls as 1/f;
- ``white``: every pixel is independent of all others.
"""

# The kind whose correction is least often worse than that with real images. Five networks (WRN, DenseNet,
# DropPath, MLP, Dropout2d) were trained on 600 digits of 8×8, each with and without shifts and zooms, from 3
# seeds. The ratio estimator measured 512 inputs, four times under training conditions. The change of test
# NLL, as a mean over the ten cases, and by how much the worst case is worse than with training images:
#
#                 training images   smooth   1/f² power   1/f power   white
#     mean             -0.058       -0.063     -0.060       -0.059    -0.057
#     worst case                    +0.008     +0.032       +0.054    +0.076
#
# The means differ by little more than their standard errors, so the worst case decides: for all kinds but
# smooth, it is the WRN with shifts and zooms. On MNIST (28×28, one DenseNet, one seed) the NLL falls from
# 0.158 to 0.134 with training images, 0.139 with smooth noise, 0.157 with a 1/f² power, 0.152 with white
# noise. Smooth noise is also the cheapest: 512 images of 3×224×224 take 2 s on one core, those with a 1/f²
# power 3 s.
DEFAULT_NOISE: NoiseKind = "smooth"
DEFAULT_COUNT = 512
# The correlation between two channels of an image. In natural images it is about 0.9 between red, green and
# blue, because most of what changes from pixel to pixel is the luminance.
_CHANNEL_CORRELATION = 0.9

_SPECTRAL_EXPONENTS = {"1/f^2 power": 2.0, "1/f power": 1.0}


def synthetic_images(
    count: int, shape: tuple[int, ...], *, kind: NoiseKind = DEFAULT_NOISE, generator: torch.Generator
) -> Tensor:
    """Return random images (count, C, H, W), float32, with mean 0 and variance 1.

    Mean and variance are those of the distribution: an image may be brighter or of less contrast than
    another, as natural images are. Two channels of an image have a correlation of 0.9.
    """
    numbers = _draw(generator, count, *noise_shape(shape, kind))
    return images_of_noise(numbers, shape, kind)


def synthetic_samples(
    count: int, shape: tuple[int, ...], *, kind: NoiseKind = DEFAULT_NOISE, generator: torch.Generator
) -> Tensor:
    """Return random inputs (count, *shape), float32, with mean 0 and variance 1.

    Three dimensions (C, H, W) are those of an image, as ``synthetic_images`` makes it. Vectors (F,),
    sequences (C, L) and volumes (C, D, H, W) are independent normal numbers, whatever the ``kind``.
    """
    if len(shape) == 3:
        return synthetic_images(count, shape, kind=kind, generator=generator)
    return _draw(generator, count, *shape)


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    # Without the dtype and the device, the user's defaults would count.
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)


def noise_shape(shape: tuple[int, ...], kind: NoiseKind) -> tuple[int, ...]:
    """Return the shape of the normal numbers that one image (C, H, W) is made of.

    They are fields of the luminance and, unless that is all, of each channel. A field has one number for
    every point of the grid or every pixel, or real and imaginary part of every frequency of ``irfft2``.
    """
    channels, height, width = shape
    fields = 1 if channels == 1 else 1 + channels
    if kind == "smooth":
        return (fields, _grid_side(height), _grid_side(width))
    if kind == "white":
        return (fields, height, width)
    return (fields, height, width // 2 + 1, 2)


def _grid_side(side: int) -> int:
    """Return the number of grid points along a side: 7, or fewer for small images.

    A grid of 7×7 would make white noise of images of 8×8 pixels; they get 3×3.
    """
    return max(1, min(7, round(side * 3 / 8)))


def images_of_noise(numbers: Tensor, shape: tuple[int, ...], kind: NoiseKind) -> Tensor:
    """Turn normal numbers (n, fields, …) into images (n, C, H, W) with mean 0 and variance 1.

    ``numbers`` are overwritten.
    """
    # All that follows is linear, so the channels may be mixed first, where a grid has few points.
    channels = _mix_luminance(numbers)
    height, width = shape[1:]
    if kind == "smooth":
        std = _enlargement_std(channels.shape[2], height) * _enlargement_std(channels.shape[3], width)
        return F.interpolate(channels / std, size=(height, width), mode="bicubic", align_corners=False)
    if kind == "white":
        return channels
    amplitudes = _amplitudes(height, width, _SPECTRAL_EXPONENTS[kind]).to(channels.device)
    spectra = torch.view_as_complex(channels) * amplitudes
    images: Tensor = torch.fft.irfft2(spectra, s=(height, width), norm="ortho")
    return images


def _mix_luminance(numbers: Tensor) -> Tensor:
    """Return a field for each channel: the luminance, number 0, mixed with its own, in place."""
    if numbers.shape[1] == 1:
        return numbers
    luminance, own = numbers[:, :1], numbers[:, 1:]
    own.mul_(math.sqrt(1 - _CHANNEL_CORRELATION))
    return own.add_(luminance, alpha=math.sqrt(_CHANNEL_CORRELATION))


@functools.cache
def _enlargement_std(points: int, side: int) -> float:
    """Return the standard deviation of ``points`` numbers N(0, 1), enlarged bicubically to ``side``.

    It is a mean over the pixels: those between the points vary less. Bicubic enlargement treats the two
    axes of an image one after the other, so that their factors multiply.
    """
    columns = torch.eye(points, dtype=torch.float64, device="cpu").reshape(points, 1, 1, points)
    # With align_corners=False an axis of length 1 stays as it is.
    weights = F.interpolate(columns, size=(1, side), mode="bicubic", align_corners=False)
    return math.sqrt(float(weights.square().sum(0).mean()))


@functools.lru_cache(maxsize=8)
def _amplitudes(height: int, width: int, exponent: float) -> Tensor:
    """Return factors (H, W // 2 + 1) for normal numbers that are to be the spectrum of an image.

    With them ``irfft2(…, norm="ortho")`` makes an image of variance 1 whose power falls as 1/f^``exponent``.
    Frequency 0, the brightness of the whole image, gets the power of the lowest frequency in the image:
    infinite power would leave nothing for the others.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64, device="cpu") for side in (height, width))
    frequencies = torch.sqrt(rows[:, None] ** 2 + columns**2)
    frequencies[0, 0] = 1 / max(height, width)
    powers = frequencies**-exponent
    powers /= powers.mean()
    # Half of the power stands in the imaginary part. Of the first column, and of the last for an even width,
    # irfft2 drops what corresponds to it, because there the spectrum of a real image is its own mirror image.
    powers = powers[:, : width // 2 + 1] / 2
    powers[:, 0] *= 2
    if width % 2 == 0:
        powers[:, -1] *= 2
    return powers.sqrt().float()


@dataclass(frozen=True)
class RandomBatches:
    """Batches of random inputs (n, *shape) with mean 0 and variance 1, the same in each iteration."""

    shape: tuple[int, ...]
    count: int = DEFAULT_COUNT
    batch_size: int = 128
    device: torch.device | str = "cpu"
    seed: int = 0
    rows_are_samples: ClassVar[bool] = True

    def __iter__(self) -> Iterator[Tensor]:
        """Make the batches one by one."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        batches = -(-self.count // self.batch_size)  # rounded up
        for number in range(batches):
            # The sizes differ by at most one: a single sample may have no variance.
            size = self.count // batches + (number < self.count % batches)
            yield synthetic_samples(size, self.shape, generator=generator).to(self.device)
