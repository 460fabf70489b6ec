"""Which samples make up a pass, in which order, in batches of what sizes."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ckpt_tools.errors import UsageError

__all__ = ["balanced", "default_workers", "random_order"]


def random_order(count: int, *, limit: int | None, seed: int) -> Tensor:
    """A permutation of ``count`` indices, cut after ``limit``: every prefix is a fair sample."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]


def balanced(count: int, size: int) -> list[int]:
    """Sizes of the ⌈count/size⌉ batches of at most ``size`` that differ by at most one.

    A small last batch would distort a batch variance, so there is none. Raises UsageError if ``size`` < 1.
    """
    if size < 1:
        raise UsageError(f"--batch-size is {size}. Give at least 1.")
    batches = -(-count // size)
    return [count // batches + (number < count % batches) for number in range(batches)]


def default_workers() -> int:
    """Threads for decoding: one for each core this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)
