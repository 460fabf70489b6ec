"""The bundled images of the demo: 1797 handwritten digits of 8×8 points (see ``DIGITS.txt``)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

TRAIN_IMAGES = 600
# Mean and standard deviation of all points on their own scale 0–16. Constants, so that any split is
# scaled alike.
POINT_MEAN, POINT_STD = 4.884, 6.017


@dataclass(frozen=True, eq=False)
class Digits:
    """One split: 600 images for training and correction, 1197 for testing alone.

    Images are float32 (N, 1, 8, 8) with mean 0 and variance 1, roughly; labels are int64 (N,), from
    0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """Load the bundled digits; ``seed`` decides which 600 are for training."""
    with files("ckpt_tools.demo").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        points, digits = stored["images"], stored["labels"]
    images = torch.from_numpy((points.astype(np.float32) - POINT_MEAN) / POINT_STD).unsqueeze(1)
    labels = torch.from_numpy(digits.astype(np.int64))
    # A generator of our own: the caller's random state is neither read nor moved.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])
