"""A copy of a model under the conditions of its training, as its owner has arranged them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.model_copy import copy_model, trains_alone


def copy_in_training_mode(model: nn.Module, *, containers: bool) -> nn.Module:
    """Copy a model and call the copy's own ``train()``, so that what it keeps frozen stays so.

    BN layers of the copy are in evaluation mode, all of them: what they normalise with is decided
    by who watches them.

    Args:
        model: is not changed.
        containers: whether modules with children can run in training mode. Detection models demand
            targets there; of those only leaf modules are set to training mode. The dropout functions that
            their containers call are then switched on by ``Interception(containers=False)``.
    """
    twin = copy_model(model, meta=False)
    if not (containers and _train(twin)):
        for module in twin.modules():
            module.training = containers or trains_alone(module)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            # Not with .eval(): BN layers of timm hold drop and activation modules.
            module.training = False
    return twin


def _train(model: nn.Module) -> bool:
    """Call the model's own ``train()``; False if it fails, or sets no module to training mode."""
    for module in model.modules():
        module.training = False
    try:
        model.train()
    except Exception:  # noqa: BLE001 - somebody else's train() may do anything
        return False
    return any(module.training for module in model.modules())
