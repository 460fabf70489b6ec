"""How precise the paired measurement is: the inputs it needs, and how often its error bars hold the truth.

The truth is the same quantity on all 600 digits. For the error bars, samples are drawn with
replacement, so that the 600 digits are their whole population, in batches as the command reads them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import ckpt_tools
from bench.evidence.net_training import Training, load_or_train
from ckpt_tools.model.calling import call_model
from ckpt_tools.model.preserving import preserved_evaluation_mode
from ckpt_tools.model.randomness import seed_temporarily
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.paired_layer import PairedLayer
from ckpt_tools.observation.running import PairedRunner, Runner
from ckpt_tools.observation.training_mode import copy_in_training_mode
from ckpt_tools.reestimate.batches import Batches
from ckpt_tools.reestimate.estimators import dropout_shift, ratio
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.reestimate.screening import Screening

NEEDED_NETS = ("densenet", "wrn", "resnet-droppath", "mlp")
COVERAGE_NETS = ("densenet", "wrn", "resnet-droppath")
FEW, SAMPLE = 64, 256  # inputs whose errors are compared, and whose error bars are checked
BATCH = 64
MANY_REPEATS = 64
TRUTH_EPOCHS, TRUTH_REPEATS = 16, 8  # each epoch holds every digit once, in other batches

Channels = dict[str, Tensor]


def load_net(name: str, scratch: Path) -> tuple[nn.Module, Tensor]:
    """A net that was trained without augmentation, and its 600 training images."""
    training = Training("digits", name, "none", 0)
    images = training.load_images()
    return load_or_train(training, scratch)["final"], images.normalise(images.train_images)


def measure_shift(
    model: nn.Module, batches: Sequence[Tensor], *, repeats: int | None = None, seed: int = 0
) -> tuple[Channels, Channels]:
    """The dropout shift of each layer behind dropout, and its stated relative error, each (C,)."""
    walk = ckpt_tools.walk(model, batches[0][:4])
    twin = copy_in_training_mode(model, containers=True)
    modules, twins = dict(model.named_modules()), dict(twin.named_modules())
    layers = {
        layer.name: PairedLayer(
            layer.name,
            modules[layer.name],
            twins[layer.name],
            rewritten=bool(layer.downstream_of),
            frozen=False,
        )
        for layer in walk.batch_norms
    }
    runner = PairedRunner(
        Runner(model, call_model, Interception()),
        Runner(twin, call_model, Interception(dropout=True)),
        repeats=repeats,
    )
    screening = Screening(model, lambda batch, row: "", keep=False, rows_are_samples=True)
    context = PassContext(model, Batches(batches), runner, layers, screening)
    with preserved_evaluation_mode(model), torch.no_grad(), seed_temporarily(seed):
        estimate = ratio(context, None)
    evidence = {name: estimate.last_pass.evidence[name] for name in estimate.statistics}
    errors = {name: item.relative_error(layers[name].stored.mean) for name, item in evidence.items()}
    return {name: dropout_shift(item) for name, item in evidence.items()}, errors


def pool(model: nn.Module, images: Tensor, names: Sequence[str]) -> Channels:
    """The variance (C,) that `pooled` gives the layers with these names."""
    corrected = copy.deepcopy(model)
    ckpt_tools.reestimate_bn(corrected, [images], estimator="pooled", force=True)
    modules = dict(corrected.named_modules())
    return {name: modules[name].running_var.double() for name in names}


def inputs_needed(name: str, scratch: Path, repeats: Sequence[int], trials: int) -> dict[int, float]:
    """How many times more inputs `pooled` needs than the dropout shift, for the same error.

    The error is the root mean square over trials and channels of the logarithm against the full
    data; it falls with the square root of the number of inputs.
    """
    model, images = load_net(name, scratch)
    full_shift = measure_shift(model, [images], repeats=MANY_REPEATS)[0]
    full_pooled = pool(model, images, list(full_shift))
    squares: dict[int, list[Tensor]] = {number: [] for number in (0, *repeats)}
    for trial in range(trials):
        sample = draw(images, FEW, trial)
        squares[0].append(_squares(pool(model, sample, list(full_shift)), full_pooled))
        for number in repeats:
            shift = measure_shift(model, [sample], repeats=number, seed=100 + trial)[0]
            squares[number].append(_squares(shift, full_shift))
    mean = {number: float(torch.cat(parts).mean()) for number, parts in squares.items()}
    return {number: mean[0] / mean[number] for number in repeats}


def covered_share(name: str, scratch: Path, trials: int) -> float:
    """Share of the channels whose shift on all digits lies within ±1.96 stated errors of a sample's."""
    model, images = load_net(name, scratch)
    epochs = torch.cat([draw(images, len(images), epoch) for epoch in range(TRUTH_EPOCHS)])
    truth = measure_shift(model, epochs.split(BATCH), repeats=TRUTH_REPEATS)[0]
    inside: list[Tensor] = []
    for trial in range(trials):
        rows = torch.randint(len(images), (SAMPLE,), generator=torch.Generator().manual_seed(trial))
        shifts, errors = measure_shift(model, images[rows].split(BATCH), seed=100 + trial)
        for layer, shift in shifts.items():
            varies = errors[layer] > 0  # a channel that no noise reaches is known exactly
            misses = (shift / truth[layer]).log().abs()
            inside.append((misses <= 1.96 * errors[layer])[varies])
    return float(torch.cat(inside).double().mean())


def draw(images: Tensor, count: int, seed: int) -> Tensor:
    """``count`` of the images, drawn at random."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:count]]


def _squares(measured: Channels, truth: Channels) -> Tensor:
    return torch.cat([(measured[name] / truth[name]).log().square() for name in truth])


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
