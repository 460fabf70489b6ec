"""A copy of a model under the conditions of its training, as its owner has arranged them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

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
