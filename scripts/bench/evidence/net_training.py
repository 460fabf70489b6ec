"""Train the small nets, and keep the state dicts of half-way and of the end in a scratch folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bench.evidence.augmentations import MNIST_TRAININGS, TRAININGS, Augmentation, MixedBatch
from bench.evidence.image_data import LOADERS, ImageData
from bench.evidence.small_nets import MNIST_NETS, NETS, SmallNet

Moment = Literal["final", "halfway"]
DataName = Literal["digits", "mnist"]
MOMENTS: tuple[Moment, ...] = ("final", "halfway")
BATCH = 50


@dataclass(frozen=True)
class Training:
    """One training of a net: `net` and `augmentation` are the names in their tables."""

    data: DataName
    net: str
    augmentation: str
    seed: int

    @property
    def small_net(self) -> SmallNet:
        return (MNIST_NETS if self.data == "mnist" else NETS)[self.net]

    @property
    def changes(self) -> Augmentation:
        return TRAININGS[self.augmentation]

    def load_images(self) -> ImageData:
        name = "mnist" if self.data == "mnist" else "coloured" if self.changes.coloured else "grey"
        return LOADERS[name](self.seed)

    def build(self) -> nn.Module:
        channels = 3 if self.changes.coloured else 1
        return self.small_net.build(self.small_net.drop_rate, channels)

    @property
    def file_name(self) -> str:
        return "-".join([self.data, self.net, self.augmentation.replace(" ", "_"), f"seed{self.seed}.pt"])


def list_trainings(seeds: int) -> Iterator[Training]:
    """All trainings of the first seed come first, so that an unfinished run has every kind of net."""
    for seed in range(seeds):
        for augmentation in TRAININGS:
            for net in NETS:
                yield Training("digits", net, augmentation, seed)
    for seed in range(seeds):
        for augmentation in MNIST_TRAININGS:
            for net in MNIST_NETS:
                yield Training("mnist", net, augmentation, seed)


def train(training: Training) -> dict[Moment, dict[str, Tensor]]:
    """Train a net with SGD and a cosine schedule; return its state dicts half-way and at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        images = training.load_images()
        model = training.build().train()
        return dict(_fit(model, training, images))


def _fit(model: nn.Module, training: Training, data: ImageData) -> Iterator[tuple[Moment, dict[str, Tensor]]]:
    rate, epochs = training.small_net.learning_rate, training.small_net.epochs
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = epochs * (len(data.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        if epoch == epochs // 2:
            yield "halfway", _copy_state(model)
        for rows in torch.randperm(len(data.train_images)).split(BATCH):
            batch = augment(training.changes, data, rows)
            optimizer.zero_grad()
            batch.loss(model(batch.images)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    yield "final", _copy_state(model)


def augment(changes: Augmentation, data: ImageData, rows: Tensor) -> MixedBatch:
    """A batch of training images as the net sees it in training."""
    images = data.normalise(changes.change(data.train_images[rows]))
    return changes.mix(images, data.train_labels[rows])


def _copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def load_or_train(training: Training, scratch: Path) -> dict[Moment, nn.Module]:
    """The net at both moments, in evaluation mode; the scratch folder holds what was trained before."""
    file = scratch / training.file_name
    if not file.exists():
        store(training, scratch)
    states = torch.load(file, weights_only=True)
    models = {}
    for moment in MOMENTS:
        models[moment] = training.build()
        models[moment].load_state_dict(states[moment])
        models[moment].eval()
    return models


def store(training: Training, scratch: Path) -> float:
    """Train a net and write its file in one step; return the seconds that it took."""
    started = time.perf_counter()
    states = train(training)
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / training.file_name
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(states, temporary)
    temporary.replace(file)
    return time.perf_counter() - started
