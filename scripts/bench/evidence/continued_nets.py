"""Nets whose weights were averaged, merged, fine-tuned or pruned, so that their statistics fit them badly.

All start half-way through a training and go on at a constant learning rate. The data is right for
each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from bench.evidence.image_data import ImageData
from bench.evidence.net_training import BATCH, Training, augment, load_or_train

EPOCHS = 6
LEARNING_RATE = 0.03
FINE_TUNING_RATE = 0.003
PRUNED_SHARE = 0.5
AVERAGES = {
    "SWA": get_swa_multi_avg_fn(),
    "EMA .99": get_ema_multi_avg_fn(0.99),
    "EMA .999": get_ema_multi_avg_fn(0.999),
}


def continue_training(training: Training, scratch: Path) -> dict[str, nn.Module]:
    """The nets by kind, in evaluation mode; the scratch folder holds what was trained before."""
    file = scratch / f"continued-{training.file_name}"
    if not file.exists():
        nets = _train_kinds(training, load_or_train(training, scratch)["halfway"])
        torch.save({kind: net.state_dict() for kind, net in nets.items()}, file)
    nets = {}
    for kind, state in torch.load(file, weights_only=True).items():
        nets[kind] = training.build()
        nets[kind].load_state_dict(state)
        nets[kind].eval()
    return nets


def _train_kinds(training: Training, start: nn.Module) -> dict[str, nn.Module]:
    data = training.load_images()
    last, averages = _train_with_averages(training, start, data)
    other = copy.deepcopy(start)
    for _ in _steps(training, other.train(), data, seed=1):
        pass
    fine_tuned = copy.deepcopy(last).train()
    for module in fine_tuned.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    for _ in _steps(training, fine_tuned, data, seed=2, rate=FINE_TUNING_RATE):
        pass
    # The statistics of an averaged model are copies of the last one's, as swa_utils leaves them.
    nets = {kind: average.module for kind, average in averages.items()}
    return {**nets, "frozen": fine_tuned, "merged": _merge(last, other), "pruned": _prune(last)}


def _train_with_averages(
    training: Training, start: nn.Module, data: ImageData
) -> tuple[nn.Module, dict[str, AveragedModel]]:
    model = copy.deepcopy(start).train()
    averages = {kind: AveragedModel(model, multi_avg_fn=average) for kind, average in AVERAGES.items()}
    for ends_epoch in _steps(training, model, data, seed=0):
        for kind, average in averages.items():
            if ends_epoch or kind != "SWA":
                average.update_parameters(model)
    for average in averages.values():
        for buffer, value in zip(average.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)
    return model, averages


def _steps(
    training: Training, model: nn.Module, data: ImageData, seed: int, rate: float = LEARNING_RATE
) -> Iterator[bool]:
    """Train, and yield after each step whether it ends an epoch. Modules in evaluation mode stay in it."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3000 + 10 * training.seed + seed)
        for _ in range(EPOCHS):
            batches = torch.randperm(len(data.train_images)).split(BATCH)
            for number, rows in enumerate(batches, 1):
                batch = augment(training.changes, data, rows)
                optimizer.zero_grad()
                batch.loss(model(batch.images)).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                yield number == len(batches)


def _merge(model: nn.Module, other: nn.Module) -> nn.Module:
    """The mean of two nets, statistics included."""
    merged, others = copy.deepcopy(model), other.state_dict()
    merged.load_state_dict(
        {
            key: (value + others[key]) / 2 if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
    )
    return merged


def _prune(model: nn.Module) -> nn.Module:
    """Half of the weights of all convolutions and linear layers together, the smallest, are 0."""
    pruned = copy.deepcopy(model)
    weights = [
        (module, "weight")
        for module in pruned.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    ]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=PRUNED_SHARE)
    for module, name in weights:
        prune.remove(module, name)
    return pruned
