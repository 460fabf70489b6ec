"""A copy of a model under the conditions of its training, as its owner has arranged them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.model_copy import copy_model


@dataclass(frozen=True)
class TrainingCopy:
    """A copy in training mode, and the names of the BN layers that training leaves frozen.

    BN layers of the copy are in evaluation mode, all of them: what they normalise with is decided
    by who watches them.
    """

    model: nn.Module
    frozen: frozenset[str]


def copy_in_training_mode(model: nn.Module, *, containers: bool) -> TrainingCopy:
    """Copy a model and call the copy's own ``train()``, so that what it keeps frozen stays so.

    Args:
        model: is not changed.
        containers: whether modules with children can run in training mode. Detection models demand
            targets there; of those only leaf modules are set to training mode.
    """
    twin = copy_model(model, meta=False)
    if containers:
        try:
            twin.train()
        except Exception:  # noqa: BLE001 - somebody else's train() may do anything, and fail
            for module in twin.modules():
                module.training = True
    else:
        for module in twin.modules():
            module.training = not module._modules
    frozen = set()
    for name, module in twin.named_modules():
        if isinstance(module, _BatchNorm):
            if not module.training:
                frozen.add(name)
            # Not with .eval(): BN layers of timm hold drop and activation modules.
            module.training = False
    return TrainingCopy(twin, frozenset(frozen))
