"""The three initialisations that the paper compares: its own by ckpt-tools, Xavier and He from their publications."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bench.initialisation_rules import he, xavier
from ckpt_tools import rewrite_init

OURS, XAVIER, HE = "ours", "Xavier", "He"
Initialise = Callable[[nn.Module, Tensor, int], object]  # a fresh model, two samples, a seed


def initialisations(**ours: str) -> dict[str, Initialise]:
    """By name, in the order of the tables; ``ours`` goes to ``rewrite_init``. Biases become zero in all."""
    return {
        OURS: lambda model, batch, seed: rewrite_init(model, batch, seed=seed, **ours),
        XAVIER: lambda model, batch, seed: xavier(model),
        HE: lambda model, batch, seed: he(model),
    }
