"""Training conditions without training: dropout at its rates, nothing learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.randomness import saved_randomness, seed_all


def switch_dropout_on(model: nn.Module, *, containers: bool) -> None:
    """Training mode for all but BN layers; with ``containers=False`` for leaf modules only.

    Flags are set one by one, and whoever calls this restores them.
    """
    for module in model.modules():
        leaf = not any(True for _ in module.children())
        if not isinstance(module, _BatchNorm) and (containers or leaf):
            module.training = True


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every global generator starts from ``seed``, and afterwards stands where it stood."""
    with saved_randomness():
        seed_all(seed)
        yield
