"""Which samples make up a pass, in which order, in batches of what sizes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ckpt_tools.errors import UsageError

__all__ = ["FULL_SHARE", "Share", "balanced_batch_sizes", "default_workers", "random_order"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process's part of the batches of a pass: those number ``rank``, ``rank + world``, …"""

    rank: int = 0
    world: int = 1

    def select_items(self, items: Sequence[T]) -> Sequence[T]:
        """The part of this process."""
        return items[self.rank :: self.world]


FULL_SHARE = Share()


def random_order(count: int, *, limit: int | None, seed: int) -> Tensor:
    """A permutation of ``count`` indices, cut after ``limit``: every prefix is a fair sample."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]


def balanced_batch_sizes(count: int, size: int) -> list[int]:
    """Sizes of the ⌈count/size⌉ batches of at most ``size`` that differ by at most one.

    A small last batch would distort a batch variance, so there is none. Raises UsageError if ``size`` < 1.
    """
    if size < 1:
        raise UsageError(f"--batch-size is {size}. Give at least 1.")
    batches = -(-count // size)
    return [count // batches + (number < count % batches) for number in range(batches)]


def default_workers() -> int:
    """Threads for decoding: one for each core this process may use, at most eight; ranks of torchrun divide them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(8, cores // int(ranks) if ranks.isdigit() and int(ranks) else cores))
