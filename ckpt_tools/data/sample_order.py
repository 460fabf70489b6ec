"""The order of samples in a pass, the sizes of batches, and how processes divide them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ckpt_tools.errors import UsageError

__all__ = ["FULL_SHARE", "Reading", "Share", "balanced_batch_sizes", "default_workers", "random_order"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of one process in the batches of a pass: numbers ``rank``, ``rank + world``, …

    ``rank`` is the number of the process, and ``world`` the number of processes.
    """

    rank: int = 0
    world: int = 1

    def select_items(self, items: Sequence[T]) -> Sequence[T]:
        """Return every ``world``-th item, which are those of this process."""
        return items[self.rank :: self.world]


FULL_SHARE = Share()


@dataclass(frozen=True)
class Reading:
    """How the samples of a source become batches.

    ``batch_size`` is the largest; batches differ by at most one sample. ``workers`` are the threads
    that decode, or the processes that run a user's Dataset; None: as many as ``default_workers``
    says. ``cached`` keeps what the first pass decodes, for sources that are read more than once.
    ``device``: where the batches shall be; those of a callable stay where it made them. ``share``:
    the batches that this process reads.

    Raises UsageError for a negative number of workers.
    """

    batch_size: int
    workers: int | None = None
    cached: bool = False
    device: str | torch.device = "cpu"
    share: Share = FULL_SHARE

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers is {self.workers}. Give 0 to read in this thread, or more.")

    @property
    def worker_count(self) -> int:
        """How many workers there are, the default number where none was given."""
        return default_workers() if self.workers is None else self.workers


def random_order(count: int, *, limit: int | None, seed: int) -> Tensor:
    """Return ``limit`` of ``count`` indices in random order. Every prefix is a fair sample."""
    # A generator of its own leaves the user's random state alone.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]


def balanced_batch_sizes(count: int, size: int) -> list[int]:
    """Divide ``count`` samples into ⌈count/size⌉ batches whose sizes differ by at most one.

    A small last batch would distort a batch variance, so there is none. A single sample may have
    no variance at all, so of an odd number of samples at batch size 2 three make the first batch.
    Raises UsageError if ``size`` is less than 1.
    """
    if size < 1:
        raise UsageError(f"--batch-size is {size}. Give at least 1.")
    batches = -(-count // size)  # rounded up
    if size > 1:
        batches = min(batches, max(1, count // 2))
    return [count // batches + (number < count % batches) for number in range(batches)]


def default_workers() -> int:
    """Return how many threads decode: one for each core that this process may use, at most eight.

    The ranks that torchrun starts on one machine divide its cores among them.
    """
    # A container or a job scheduler may allow fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun
    return max(1, min(8, cores // int(ranks) if ranks.isdigit() and int(ranks) else cores))
