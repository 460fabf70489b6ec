"""Context managers that put a caller's models, and the process around them, back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.randomness import preserve_random_generators
from ckpt_tools.model.restoring import run_all_steps
from ckpt_tools.model.torch_settings import preserve_torch_settings, suspend_autocast


@contextmanager
def preserve_models(*roots: object) -> Iterator[ModelState]:
    """Put models, torch's settings and the global random generators back as they were.

    This happens at the end of the context, also when it raises. Everything that runs code of a
    caller's model runs within such a context. A caller's ``torch.autocast`` has no effect in it.

    Args:
        *roots: models, and functions that may run other models. ``ModelState`` says what belongs to
            a model, and what it costs to remember it.

    Yields:
        The state of the roots, with which they can also be put back on the way.

    Raises:
        ModelError: a model is not initialised yet, or could not be put back.
    """
    with preserve_random_generators(), preserve_torch_settings(), suspend_autocast():
        state = ModelState(*roots)
        try:
            yield state
        finally:
            state.put_back()


@contextmanager
def preserved_evaluation_mode(model: nn.Module, *further_roots: object) -> Iterator[None]:
    """Set every module of a model to evaluation mode, and preserve the model meanwhile.

    ``further_roots`` are preserved as well; only ``model`` changes its mode.
    """
    with preserve_models(model, *further_roots), evaluation_mode(model):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode; afterwards the flags are as they were.

    Flags are set one by one: a module's own ``eval()`` may do more (merge weights, say).
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        run_all_steps(partial(setattr, module, "training", flag) for module, flag in flags)
