"""The global random generators: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_random_generators() -> Iterator[None]:
    """Put all global generators back as they were at the end of the context.

    That are Python's, numpy's, and torch's on the CPU and on every device in use.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_devices_in_use()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_random_generators(seed: int) -> None:
    """Seed every global generator."""
    # torch.manual_seed would also seed devices that are not in use yet, for good.
    torch.default_generator.manual_seed(seed)
    if _devices_in_use():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy refuses larger seeds


class TorchRandomness:
    """Notices draws from torch's global generators that no operation shows, as in a custom operator."""

    def __init__(self) -> None:
        self._states = self._read_states()

    def has_advanced(self) -> bool:
        """Tell whether anything has been drawn since this object was made."""
        return any(not torch.equal(*pair) for pair in zip(self._states, self._read_states(), strict=True))

    @staticmethod
    def _read_states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _devices_in_use())]


def _devices_in_use() -> list[int]:
    # To read the generators of GPUs that nobody has used would initialise CUDA.
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def seed_temporarily(seed: int) -> Iterator[None]:
    """Seed every global generator; at the end of the context they stand where they stood before."""
    with preserve_random_generators():
        seed_random_generators(seed)
        yield
