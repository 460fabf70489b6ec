"""Trainings by a recipe, watched epoch by epoch; the learning rate falls in steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.resuming import Training
from reproduce.sets import Part

PAD = 4  # points of zeros around an image that a random crop is taken of
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """How to train.

    The rate is divided by ten at each of ``drops``, fractions of the training. ``weight_decay``
    times a weight is added to its gradient, in Adam, too. ``forget``: every so many epochs the
    optimizer's momentum is set to zero; 0: never. ``augment``: images are mirrored and shifted at
    random.
    """

    optimizer: str  # of OPTIMIZERS
    rate: float
    epochs: int
    batch: int
    weight_decay: float
    drops: tuple[float, ...]
    forget: int = 0
    augment: bool = False

    def rate_in(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.rate * 0.1 ** sum(epoch >= round(drop * self.epochs) for drop in self.drops)


OPTIMIZERS: Mapping[str, Callable[[nn.Module, Recipe], torch.optim.Optimizer]] = {
    "Nesterov": lambda model, recipe: torch.optim.SGD(
        model.parameters(), recipe.rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    ),
    "Adam": lambda model, recipe: torch.optim.Adam(
        model.parameters(), recipe.rate, weight_decay=recipe.weight_decay
    ),
}


@dataclass(frozen=True)
class Score:
    """``error`` in percent of the images, ``nll`` in nats an image (infinite if not finite)."""

    error: float
    nll: float


Measured = dict[str, float]
DIVERGED: Measured = {"loss": math.inf, "gradient": math.inf}


def train(
    model: nn.Module,
    data: Part,
    recipe: Recipe,
    *,
    cell: object,
    seed: int,
    scratch: Path,
    watched: Tensor,
    each: Callable[[int], Measured],
) -> list[Measured]:
    """Train ``model`` where its parameters are, and tell what every epoch was like.

    ``loss`` is the mean over an epoch in nats, with dropout, ``gradient`` the mean norm of the
    watched weight's gradient over its batches, both infinite once the loss is not finite; a net
    that has diverged is trained no further. What ``each`` says of the model after an epoch (number
    of epochs done) goes along.

    The batches' order and the dropout of an epoch depend on ``seed`` and the epoch's number alone.
    A training that was interrupted goes on from its state in ``scratch``, where ``cell`` tells it
    from others.
    """
    optimizer = OPTIMIZERS[recipe.optimizer](model, recipe)
    training = Training(scratch, cell, model=model, optimizer=optimizer)
    history: list[Measured] = training.notes.setdefault("history", [])
    for number in training.epochs(recipe.epochs):
        diverged = bool(history) and not math.isfinite(history[-1]["loss"])
        measurements = DIVERGED if diverged else _epoch(model, data, recipe, optimizer, watched, seed, number)
        history.append({**measurements, **each(number + 1)})
    return history


def score(model: nn.Module, data: Part) -> Score:
    """In evaluation mode, in which the model stays."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(images) for images in data.images.split(EVALUATION_BATCH)]).double()
    nll = F.cross_entropy(logits, data.labels).item()
    wrong = (logits.argmax(1) != data.labels).double().mean().item()
    return Score(100 * wrong, nll if math.isfinite(nll) else math.inf)


def mirror_and_crop(images: Tensor) -> Tensor:
    """Mirror each image (C, H, W) with probability ½, then crop it at random within zeros."""
    count, channels, height, width = images.shape
    device = images.device
    mirror = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(mirror, images.flip(3), images)
    top, left = torch.randint(2 * PAD + 1, (2, count, 1, 1, 1), device=device)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    rows = top + torch.arange(height, device=device).view(1, 1, -1, 1)
    columns = left + torch.arange(width, device=device).view(1, 1, 1, -1)
    return F.pad(images, (PAD,) * 4)[image, channel, rows, columns]


def _epoch(
    model: nn.Module,
    data: Part,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    watched: Tensor,
    seed: int,
    number: int,
) -> Measured:
    torch.manual_seed(1_000_000 * seed + number)
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_in(number)
    if recipe.forget and number and number % recipe.forget == 0:
        optimizer.state.clear()
    model.train()
    total = gradient = torch.zeros((), device=watched.device)
    steps = 0
    for images, labels in _batches(data, recipe.batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(mirror_and_crop(images) if recipe.augment else images), labels)
        loss.backward()
        assert watched.grad is not None
        total = total + loss.detach() * len(labels)
        gradient = gradient + watched.grad.norm()
        optimizer.step()
        steps += 1
    mean = float(total) / len(data)
    return {"loss": mean, "gradient": float(gradient) / steps} if math.isfinite(mean) else DIVERGED


def _batches(data: Part, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for indices in torch.randperm(len(data)).to(data.labels.device).split(size):
        yield data.images[indices], data.labels[indices]
