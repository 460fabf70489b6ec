"""Frozen BN layers: training left their running statistics as they were.

Their statistics are not those of the last training's data. They may come from another data set, and
the weights behind them were tuned to them as they stand. Such a layer is therefore kept, and it
cannot tell whether some data is the training data.

Two signs are reliable:

1. ``model.train()`` leaves the layer in evaluation mode. Classes that freeze BN layers override
   ``train`` to do this. In a model that is in training mode, as other BN layers are, its own flag
   says the same.
2. The layer has counted no batch (``num_batches_tracked`` is 0) while others have, and either its
   statistics are still the initial ones, or it belongs to the first layers of the network, none of
   which has counted a batch. The latter is a backbone whose published weights have no counters,
   with its BN layers frozen, and a new head behind it.

Other counters tell nothing, because every pattern of them has a harmless cause as well:

- A low counter also belongs to a new head on a backbone that was trained for longer, whose own
  counters go on from those of its first training, and to a layer that only some batches reach
  (auxiliary heads, stochastic depth that skips whole blocks).
- A high counter also belongs to a layer that every batch reaches several times.
- A counter of 0 beside real statistics *behind* layers that have counted is also what an
  exponential moving average of a new head has: averaged in whole numbers, 0 stays 0.

So in a loaded model, a layer that was frozen by calling ``eval()`` on it from outside, with a
counter above 0, is not recognised. ``--keep`` names such layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.model_copy import copy_model
from ckpt_tools.model.randomness import preserve_random_generators
from ckpt_tools.observation.training_history import batches_seen
from ckpt_tools.results import Walk

__all__ = ["frozen_layers"]


def frozen_layers(model: nn.Module, walk: Walk) -> dict[str, str]:
    """Return the BN layers of the walk that training left as they were, each with the reason.

    ``model`` is not changed: its ``train`` is called on a copy without contents. Where it is in
    evaluation mode as a whole, as after loading, the flags of its layers mean nothing.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    # In order of execution, which the second sign needs.
    layers = {
        layer.name: modules[layer.name]
        for layer in walk.batch_norms
        if layer.reached and layer.name in modules
    }
    never_trained = _layers_left_in_evaluation_mode(model)
    # A model whose BN layers are all in evaluation mode may have been put there for any reason.
    if model.training and any(module.training for module in layers.values()):
        never_trained |= {name for name, module in layers.items() if not module.training}
    frozen = {
        name: "frozen: left in evaluation mode by the model's train()"
        for name in layers
        if name in never_trained
    }
    trained = {name: module for name, module in layers.items() if name not in frozen}
    return frozen | _layers_that_counted_nothing(trained)


def _layers_left_in_evaluation_mode(model: nn.Module) -> frozenset[str]:
    try:
        # The copy is on the meta device, so that a large model costs no memory.
        with preserve_random_generators(), torch.no_grad():
            twin = copy_model(model, meta=True)
            twin.eval()
            twin.train()
            modules = dict(twin.named_modules())
    except Exception:  # noqa: BLE001 - a model's own train() may raise anything
        return frozenset()
    # A model whose train() does nothing at all (exported programs, modules whose train() was
    # replaced to use them as they are) says nothing about its BN layers.
    if not any(module.training for module in modules.values()):
        return frozenset()
    return frozenset(
        name for name, module in modules.items() if isinstance(module, _BatchNorm) and not module.training
    )


def _layers_that_counted_nothing(layers: Mapping[str, _BatchNorm]) -> dict[str, str]:
    """Return the layers with the second sign. ``layers`` are in order of execution."""
    counters = {name: batches_seen(module) for name, module in layers.items()}
    largest = max(counters.values(), default=0)
    if not largest:
        # A checkpoint without counters, or one that was converted from a framework without them.
        return {}
    initial = {
        name: f"untrained: initial statistics and no batch counted, elsewhere up to {largest:,}"
        for name, module in layers.items()
        if not counters[name] and _has_initial_statistics(module)
    }
    others = [name for name in layers if name not in initial]
    first = itertools.takewhile(lambda name: not counters[name], others)
    reason = f"frozen: no batch counted up to here, but as many as {largest:,} behind"
    return initial | dict.fromkeys(first, reason)


def _has_initial_statistics(module: _BatchNorm) -> bool:
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        return False
    return not bool(mean.any()) and bool((variance == 1).all())
