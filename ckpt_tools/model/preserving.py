"""A caller's models and the process around them come back as they came, whatever runs in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.randomness import saved_randomness
from ckpt_tools.model.torch_settings import torch_settings_kept
from ckpt_tools.model.undoing import carry_out


@contextmanager
def preserved(*roots: object) -> Iterator[ModelState]:
    """Afterwards models, torch's settings and the global random generators are as they were, also if it raises.

    Everything that runs code of a caller's model runs within this.

    Args:
        *roots: models, and functions that may run other models. ``ModelState`` says what belongs to a model, and what
            it costs to remember it.

    Yields:
        The state of the roots, to put them back on the way, too.

    Raises:
        ModelError: a model is not initialised yet, or could not be put back.
    """
    with saved_randomness(), torch_settings_kept():
        state = ModelState(*roots)
        try:
            yield state
        finally:
            state.put_back()


@contextmanager
def evaluating(model: nn.Module, *others: object) -> Iterator[None]:
    """Evaluation mode for every module of a model; it is preserved, as are the ``others``."""
    with preserved(model, *others), evaluation_mode(model):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module; afterwards the flags are as they were.

    They are set one by one: a module's own ``eval()`` may do more than that (merge weights, say).
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        carry_out(partial(setattr, module, "training", flag) for module, flag in flags)
