"""The three initialisations that the paper compares.

Its own is that of ckpt-tools; Xavier's and He's are written from their publications.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bench.initialisation_rules import he, xavier
from ckpt_tools import rewrite_init

OURS, XAVIER, HE = "ours", "Xavier", "He"
Initialise = Callable[[nn.Module, Tensor, int], object]  # a fresh model, two samples, a seed


def initialisations(**ours: str) -> dict[str, Initialise]:
    """Return the initialisations by name, in the order of the tables.

    `ours` is passed to `rewrite_init`. Biases become zero in all.
    """
    return {
        OURS: lambda model, batch, seed: rewrite_init(model, batch, seed=seed, **ours),
        XAVIER: lambda model, batch, seed: xavier(model),
        HE: lambda model, batch, seed: he(model),
    }
