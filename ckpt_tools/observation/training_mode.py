"""A model under the conditions of its training, as its owner has arranged them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.model_copy import copy_model, set_mode
from ckpt_tools.results import DeclaredDropout
from ckpt_tools.walker.declared_dropout import add_declared_dropout


def copy_in_training_mode(
    model: nn.Module, *, containers: bool, dropout: Sequence[DeclaredDropout] = ()
) -> nn.Module:
    """Copy a model and call the copy's own ``train()``, so that what it keeps frozen stays so.

    BN layers of the copy are in evaluation mode, all of them: what they normalise with is decided
    by who watches them.

    Args:
        model: is not changed.
        containers: whether modules with children can run in training mode. Detection models demand
            targets there; of those only leaf modules are set to training mode. The dropout functions that
            their containers call are then switched on by ``Interception(containers=False)``.
        dropout: which the training had and the model has not, as ``Walk.declared_dropout``.
    """
    twin = copy_model(model, meta=False)
    set_mode(twin, "training" if containers else "leaves")
    add_declared_dropout(twin, dropout)
    return twin


def switch_dropout_on(model: nn.Module, *, containers: bool) -> None:
    """Set the flags of all modules but BN layers as the model's own ``train()`` does.

    The caller restores the flags. They are set one by one, as a copy without contents shows them:
    a model's own ``train()`` may do more.
    """
    twin = copy_model(model, meta=True)
    set_mode(twin, "training" if containers else "leaves")
    modules = dict(model.named_modules())
    for name, copied in twin.named_modules():
        if name in modules and not isinstance(copied, _BatchNorm):
            modules[name].training = copied.training
