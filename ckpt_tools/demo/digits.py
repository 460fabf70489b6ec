"""The bundled digits, split for the demo."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
import torch
from torch import Tensor

TRAIN_IMAGES = 600
PIXEL_MEAN, PIXEL_STD = 4.884, 6.017  # of all 1797 images, on their own scale 0–16


@dataclass(frozen=True)
class Digits:
    """Images are float32 (N, 1, 8, 8), normalised to mean 0 and variance 1; labels int64 (N,), 0–9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """600 training and 1197 test images; ``seed`` decides which are which. Source: ``DIGITS.txt``."""
    with as_file(files("ckpt_tools.demo") / "digits.npz") as path, np.load(path) as stored:
        pixels, labels = stored["images"], stored["labels"]
    images = torch.from_numpy((pixels.astype(np.float32) - PIXEL_MEAN) / PIXEL_STD).unsqueeze(1)
    answers = torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return Digits(images[train], answers[train], images[test], answers[test])
