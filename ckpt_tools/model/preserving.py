"""A caller's models and the process around them come back as they came, whatever runs in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.randomness import preserve_random_generators
from ckpt_tools.model.restoring import run_all_steps
from ckpt_tools.model.torch_settings import preserve_torch_settings


@contextmanager
def preserve_models(*roots: object) -> Iterator[ModelState]:
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
    with preserve_random_generators(), preserve_torch_settings():
        state = ModelState(*roots)
        try:
            yield state
        finally:
            state.put_back()


@contextmanager
def preserved_evaluation_mode(model: nn.Module, *others: object) -> Iterator[None]:
    """Evaluation mode for every module of a model; it is preserved, as are the ``others``."""
    with preserve_models(model, *others), evaluation_mode(model):
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
        run_all_steps(partial(setattr, module, "training", flag) for module, flag in flags)
