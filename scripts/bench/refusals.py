"""How often the check of the data refuses right data, and wrong data, as floats and without hints.

It runs on the nets of ``bench evidence``, whose trainings change the images in seven ways. What the
check refuses ends a run of `pooled`, `exact` or `ema`; `ratio` does not depend on the data, and is
what `auto` takes where the drop rates are known.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

import ckpt_tools
from bench.evidence.image_data import ImageData
from bench.evidence.net_training import MOMENTS, list_trainings, load_or_train
from ckpt_tools.demo.digits import POINT_MEAN, POINT_STD
from ckpt_tools.diagnosis.data_check import check_data

IMAGES = 256
RIGHT = "right"
Kind = Callable[[ImageData, Tensor], Tensor]


def count_refusals(
    scratch: Path, seeds: int, subsets: int, moments: tuple[str, ...] = MOMENTS
) -> Iterator[tuple[str, str, Counter[str]]]:
    """Yield for each net and kind of data how many subsets got which verdict."""
    for training in list_trainings(seeds):
        if training.data != "digits" or not (scratch / training.file_name).exists():
            continue
        data = training.load_images()
        for moment, model in load_or_train(training, scratch).items():
            if moment not in moments:
                continue
            name = f"{training.net}, {training.augmentation}, {moment}, seed {training.seed}"
            for kind, change in kinds(data).items():
                verdicts: Counter[str] = Counter()
                for number in range(subsets):
                    verdicts[_judge(model, change(data, draw(data, number)), number)] += 1
                yield name, kind, verdicts


def kinds(data: ImageData) -> dict[str, Kind]:
    """What is handed to the check; reversed channels exist for coloured images only."""
    makers: dict[str, Kind] = {
        RIGHT: lambda data, raw: data.normalise(raw),
        "no normalisation": lambda data, raw: to_pixels(raw),
        "0–255": lambda data, raw: 255 * to_pixels(raw),
        "another data set": lambda data, raw: data.normalise(from_pixels(photographs(raw), raw)),
    }
    if data.shape[0] == 3:
        makers["reversed channels"] = lambda data, raw: data.normalise(raw.flip(1))
    return makers


def draw(data: ImageData, number: int) -> Tensor:
    """256 raw images: of the training split for even numbers, held out for odd ones."""
    images = data.test_images if number % 2 else data.train_images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))
    return images[order[:IMAGES]]


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
    return [torch.from_numpy(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]


def _judge(model: torch.nn.Module, batch: Tensor, seed: int) -> str:
    walk = ckpt_tools.walk(model, batch[:4])
    verdict = check_data(
        model, [batch], walk, None, preprocessed=True, rates_known=True, images=IMAGES, seed=seed
    )
    return verdict.verdict
