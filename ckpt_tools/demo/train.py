"""Train and score the demo's network.

The recipe is that of the DenseNet paper (Huang et al. 2017) shrunk to 600 images: SGD with Nesterov
momentum 0.9, learning rate 0.1, weight decay 1e-4, no data augmentation. Batches hold 50 images
instead of 64, and the rate falls along a cosine instead of in two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools.demo.densenet import DenseNet, digits_densenet
from ckpt_tools.demo.digits import Digits
from ckpt_tools.errors import UsageError
from ckpt_tools.model.preserving import preserved_evaluation_mode

DROP_RATE = 0.3  # of the rates that Hendrycks & Gimpel tried (0.2 and 0.3), the one that shows more
EPOCHS = 15
BATCH_SIZE = 50
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Score:
    """Test results of a classifier: ``error`` in percent, mean ``nll`` in nats an image."""

    error: float
    nll: float


@dataclass(frozen=True)
class DemoResult:
    """The scores of a network: as trained, corrected with its training data, and without any data."""

    before: Score
    after: Score
    without_data: Score


def train(
    digits: Digits,
    *,
    seed: int,
    drop_rate: float = DROP_RATE,
    epochs: int = EPOCHS,
    progress: Callable[[int, int], None] | None = None,
) -> DenseNet:
    """Train a new network on the training images; return it in eval mode.

    ``seed`` fixes initialisation, order of the images and dropout; the caller's random state is
    left as it was. ``progress`` is called after every epoch with (epochs done, epochs in all).
    """
    if epochs < 1 or not 0 <= drop_rate < 1:
        raise UsageError(
            f"demo training: expected epochs ≥ 1 and 0 ≤ drop rate < 1, got {epochs} and "
            f"{drop_rate}. Leave them out for {EPOCHS} and {DROP_RATE}."
        )
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = digits_densenet(drop_rate=drop_rate)
        for done in _epochs(model, digits, epochs):
            if progress is not None:
                progress(done, epochs)
    return model.eval()


def score(model: nn.Module, images: Tensor, labels: Tensor) -> Score:
    """Score a model in eval mode. Images have shape (N, 1, 8, 8) as in `Digits`, labels (N,)."""
    with preserved_evaluation_mode(model), torch.no_grad():
        logits = model(images)
    wrong = (logits.argmax(dim=1) != labels).double().mean().item()
    return Score(error=100 * wrong, nll=F.cross_entropy(logits.double(), labels).item())


def _epochs(model: nn.Module, digits: Digits, epochs: int) -> Iterator[int]:
    images, labels = digits.train_images, digits.train_labels
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    model.train()
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        yield epoch + 1


@contextmanager
def _one_thread() -> Iterator[None]:
    # Maps of 8×8 are too small to share: on a busy two-core machine a second thread was measured to
    # cost forty times the time. One thread also frees the result from the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
