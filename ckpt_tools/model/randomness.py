"""The global random generators: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_random_generators() -> Iterator[None]:
    """All global generators come back as they were: Python's, numpy's, and torch's on every device in use."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_devices_in_use()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_random_generators(seed: int) -> None:
    """Start every global generator at ``seed``. torch.manual_seed would also seed devices not in use yet, for good."""
    torch.default_generator.manual_seed(seed)
    if _devices_in_use():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _devices_in_use() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def seed_temporarily(seed: int) -> Iterator[None]:
    """Every global generator starts from ``seed``, and afterwards stands where it stood."""
    with preserve_random_generators():
        seed_random_generators(seed)
        yield
