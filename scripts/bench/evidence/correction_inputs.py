"""What a correction is given: inputs as in training, plain, few, of half of the classes, wrong, or random."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evidence.image_data import ImageData
from bench.evidence.net_training import Training, augment
from bench.evidence.wrong_images import WRONG_INPUTS

IMAGES = 600
COPIES = 4  # of every image, each augmented on its own
FEW = 32
BATCH = 100
AS_IN_TRAINING, PLAIN, NO_DATA = "as in training", "plain", "none"
FEW_PLAIN, HALF_OF_CLASSES, WRONG_NORMALISATION = POOR_INPUTS = (
    "32 plain",
    "half of the classes",
    "wrong normalisation",
)

Batches = list[Tensor]


def training_inputs(training: Training, data: ImageData) -> dict[str, Batches]:
    """Normalised batches of every kind that is made of training images; the same for each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + training.seed)
        rows = torch.randperm(len(data.train_images))[:IMAGES]
        copies = [augment(training.changes, data, part).images for part in (rows.repeat(COPIES)).split(BATCH)]
    raw = data.train_images[rows]
    plain = data.normalise(raw)
    wrong = {kind: _split(make(data, raw)) for kind, make in WRONG_INPUTS.items()}
    return {
        AS_IN_TRAINING: copies,
        PLAIN: _split(plain),
        FEW_PLAIN: [plain[:FEW]],
        HALF_OF_CLASSES: _split(plain[data.train_labels[rows] < 5]),
        WRONG_NORMALISATION: _split(0.5 * plain + 0.3),
        **wrong,
    }


def _split(images: Tensor) -> Batches:
    return list(images.split(BATCH))


def smooth_noise(grid: int, shape: tuple[int, ...]) -> Tensor:
    """White noise on a coarse grid, enlarged bicubically to 600 images (C, H, W)."""
    coarse = torch.randn(IMAGES, shape[0], grid, grid)
    return F.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)


def spectral_noise(exponent: float, shape: tuple[int, ...]) -> Tensor:
    """Noise whose amplitude falls with the frequency f as 1 / f^exponent; 0 is white noise."""
    vertical, horizontal = torch.fft.fftfreq(shape[1])[:, None], torch.fft.rfftfreq(shape[2])[None, :]
    frequency = (vertical.square() + horizontal.square()).sqrt()
    lowest = 1 / max(shape[1:])
    spectrum = torch.fft.rfft2(torch.randn(IMAGES, *shape)) * frequency.clamp_min(lowest) ** -exponent
    return torch.fft.irfft2(spectrum, s=shape[1:])


PROBES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "smooth 7×7": functools.partial(smooth_noise, 7),
    "smooth 3×3": functools.partial(smooth_noise, 3),
    "1/f²": functools.partial(spectral_noise, 2.0),
    "1/f": functools.partial(spectral_noise, 1.0),
    "white": functools.partial(spectral_noise, 0.0),
}


def probe_inputs(training: Training, data: ImageData) -> dict[str, Batches]:
    """Random images with mean 0 and variance 1, which is what normalised images have, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2000 + training.seed)
        images = {name: make(data.shape) for name, make in PROBES.items()}
    return {name: _split((x - x.mean()) / x.std()) for name, x in images.items()}
