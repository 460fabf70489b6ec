"""Training, held-out and test images: the bundled digits, or a data set in torchvision's layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_tools.data.arrays.datasets import DATASETS, Split, find_dataset
from ckpt_tools.demo.digits import load_digits
from ckpt_tools.errors import DataError, UsageError

DIGITS = "digits"
SPLITS: tuple[Split, Split] = ("train", "test")
_DIGITS_TRAIN = 6 / 7  # of the 1,797, as MNIST has it


@dataclass(frozen=True)
class Spec:
    """``digits``, or the ``name`` of a data set and the folder it lies in."""

    name: str = DIGITS
    root: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From ``digits`` or ``NAME:DIR``. Raises UsageError."""
        name, _, root = text.partition(":")
        if text == DIGITS:
            return cls()
        if name in DATASETS and root:
            return cls(name, Path(root))
        choices = ", ".join(f"{each}:DIR" for each in sorted(DATASETS))
        raise UsageError(f"--data {text}: expected {DIGITS} or one of {choices}.")

    @property
    def is_bundled(self) -> bool:
        """Whether these are the digits, for which an experiment is made smaller."""
        return self.root is None


@dataclass(frozen=True, eq=False)
class Part:
    """``images`` float32 (N, C, H, W), normalised; ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Part:
        """The same on a device."""
        return Part(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Sets:
    """Three disjoint parts.

    Every channel has about mean 0 and variance 1 over the images that are not for testing.
    """

    classes: int
    train: Part
    held_out: Part
    test: Part

    def to(self, device: str) -> Sets:
        """The same on a device."""
        return replace(
            self, **{name: getattr(self, name).to(device) for name in ("train", "held_out", "test")}
        )


def load_sets(
    spec: Spec,
    *,
    seed: int,
    held_out: float = 0.0,
    digits_train: float = _DIGITS_TRAIN,
    size: int | None = None,
    limit: int | None = None,
) -> Sets:
    """Split a data set; every part has the classes in proportion.

    Args:
        spec: which.
        seed: decides which of the training images are held out, and for the digits which are for
        testing.
        held_out: share of the training images that is held out.
        digits_train: share of the digits that is not for testing; other sets bring a test split.
        size: height and width that images are resized to, bilinearly; None leaves them as stored.
        limit: so many images of either split at most; for trying out.

    Raises:
        DataError: files are missing, damaged or without labels.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test, classes = _digits(generator, digits_train) if spec.is_bundled else _read_dataset(spec)
    train, test = _shuffle(train, generator, limit), _shuffle(test, generator, limit)
    mean, deviation = _channels(train.images)
    train, test = (
        Part(_resize((part.images - mean) / deviation, size), part.labels) for part in (train, test)
    )
    count = round(held_out * len(train))
    return Sets(classes, _slice(train, count, None), _slice(train, 0, count), test)


def _digits(generator: torch.Generator, share: float) -> tuple[Part, Part, int]:
    digits = load_digits(0)
    images = torch.cat([digits.train_images, digits.test_images])
    everything = _shuffle(Part(images, torch.cat([digits.train_labels, digits.test_labels])), generator, None)
    count = round(share * len(everything))
    return _slice(everything, 0, count), _slice(everything, count, None), 10


def _read_dataset(spec: Spec) -> tuple[Part, Part, int]:
    assert spec.root is not None
    parts, classes = [], 0
    for split in SPLITS:
        dataset = find_dataset(spec.name, spec.root, split)
        if dataset.labels is None or dataset.classes is None:
            raise DataError(
                f"{dataset.label}: expected labels beside the images, found none. Fetch the data set again."
            )
        classes = dataset.classes
        images = dataset.load().float() / 255
        parts.append(Part(images if images.ndim == 4 else images[:, None], dataset.labels.load().long()))
    return parts[0], parts[1], classes


def _shuffle(part: Part, generator: torch.Generator, limit: int | None) -> Part:
    order = stratified_order(part.labels, generator)[:limit]
    return Part(part.images[order], part.labels[order])


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order of which every prefix has the classes in proportion.

    It is right to within one image a class.
    """
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        start = torch.rand((), generator=generator, dtype=torch.float64)  # no class is always the first
        place[members] = (torch.randperm(len(members), generator=generator) + start) / len(members)
    return place.argsort(stable=True)


def _channels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1)."""
    deviation, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    return mean, deviation.clamp_min(1e-6)


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def _slice(part: Part, start: int, end: int | None) -> Part:
    return Part(part.images[start:end], part.labels[start:end])
