"""Batches that can be read again and again: one order, balanced sizes, unreadable samples skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ckpt_tools.data.blame import named
from ckpt_tools.data.order import balanced
from ckpt_tools.errors import DataError, UsageError

__all__ = ["Batch", "BatchStream", "Chunk", "IndexedStream", "Samples", "Skipped", "first_not_finite"]

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor (N, …), a tuple or list whose first item is one, or the keyword arguments of the model."""

TOLERATED = 0.01
"""Share of unreadable samples above which the data set is refused."""

_CHUNK = 16  # samples that travel together: 16 of 3×224×224 fit eight workers into Docker's 64 MB of /dev/shm


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """What a worker sends: the samples it read, (n, …), and by index those it could not."""

    samples: Tensor | None
    skipped: Mapping[int, Skipped]


class Samples(Protocol):
    """A data set that reads several samples at once; workers get a pickled copy."""

    def __getitem__(self, indices: list[int], /) -> Chunk:
        """The samples with these indices, in this order."""
        ...


class BatchStream(Protocol):
    """Batches of training data. Every iteration is a new pass over the same samples in the same order."""

    @property
    def count(self) -> int | None:
        """Samples in one pass before any is skipped; None if only a pass can tell."""
        ...

    @property
    def batch_count(self) -> int | None:
        """Batches in one pass; None if only a pass can tell."""
        ...

    @property
    def transform(self) -> str:
        """What is done to a stored sample, in words."""
        ...

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples that no pass so far could read, each once, in the order in which they were met."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass. Raises DataError where the data cannot be used."""
        ...


class IndexedStream:
    """Batches from samples that have a number: files in a folder, rows of an array.

    n samples at batch size b come as ⌈n/b⌉ batches whose sizes differ by at most one, less the samples that
    were skipped. ``finish`` turns what was read into float32, in this process. Iterate one pass at a time;
    worker processes live until the stream is dropped.
    """

    def __init__(
        self,
        samples: Samples,
        order: Tensor,
        *,
        name: str,
        transform: str,
        finish: Callable[[Tensor], Tensor],
        batch_size: int,
        workers: int,
    ) -> None:
        if workers < 0:
            raise UsageError(f"--workers is {workers}. Give 0 to read in this process, or more.")
        self.count = len(order)
        self.transform = transform
        self._name = name
        self._finish = finish
        self._order = order
        self._sizes = balanced(len(order), batch_size)
        self._plan = _Plan(order, [balanced(size, _CHUNK if workers else size) for size in self._sizes])
        self._loader = _loader(samples, self._plan, workers)
        self._skipped: dict[int, Skipped] = {}
        self._passed = False

    @property
    def batch_count(self) -> int:
        """Batches in one pass."""
        return len(self._sizes)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples that no pass so far could read, each once."""
        return tuple(self._skipped.values())

    def __iter__(self) -> Iterator[Tensor]:
        """One pass of float32 CPU tensors (n, …).

        Raises DataError when more than 1 % of all samples are unreadable, when a value is not finite, or when
        a worker process fails.
        """
        chunks = self._chunks()
        for number, sizes in enumerate(self._plan.sizes):
            parts = [next(chunks) for _ in sizes]
            for part in parts:
                self._note(part.skipped)
            read = [part.samples for part in parts if part.samples is not None]
            if read:
                batch = self._finish(read[0] if len(read) == 1 else torch.cat(read))
                if read[0].is_floating_point():
                    self._check_finite(batch, number)
                yield batch
        self._passed = True

    def _chunks(self) -> Iterator[Chunk]:
        try:
            yield from self._loader
        except Exception as error:  # whatever a worker raised, or its death
            raise DataError(
                f"{self._name}: reading failed with {named(error)}. If a worker process was killed, memory or "
                f"/dev/shm ran out: try fewer --workers, or --workers 0."
            ) from error

    def _note(self, skipped: Mapping[int, Skipped]) -> None:
        new = {index: what for index, what in skipped.items() if index not in self._skipped}
        if new and self._passed:
            first = next(iter(new.values()))
            raise DataError(
                f"{self._name}: {first.name} was readable in the first pass, now: {first.reason}. All passes "
                f"must see the same samples: leave the data alone while it is read, and run again."
            )
        self._skipped.update(new)
        if len(self._skipped) > TOLERATED * self.count:
            first_few = "; ".join(f"{what.name} ({what.reason})" for what in self.skipped[:5])
            raise DataError(
                f"{self._name}: {len(self._skipped)} of {self.count} samples are unreadable so far, expected "
                f"at most {TOLERATED:.0%}: {first_few}. Repair or remove them."
            )

    def _check_finite(self, batch: Tensor, number: int) -> None:
        bad = first_not_finite(batch)
        if bad is not None:
            row = int(self._order[sum(self._sizes[:number]) + bad])
            raise DataError(
                f"{self._name}: batch {number} holds NaN or infinity (as float32), first in sample {row}. "
                f"Expected finite numbers: remove or repair that sample."
            )


def first_not_finite(batch: Tensor) -> int | None:
    """Position of the first sample of a batch (N, …) with NaN or infinity; None if all values are finite."""
    finite = torch.isfinite(batch)
    if bool(finite.all()):
        return None
    return int((~finite).reshape(len(batch), -1).any(1).nonzero()[0])


class _Plan:
    """The index lists to read, made one by one: lists for millions of samples would fill memory."""

    def __init__(self, order: Tensor, sizes: list[list[int]]) -> None:
        self._order = order
        self.sizes = sizes  # of the chunks of every batch

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in (size for sizes in self.sizes for size in sizes):
            yield self._order[start : start + size].tolist()
            start += size

    def __len__(self) -> int:
        return sum(len(sizes) for sizes in self.sizes)


def _loader(samples: Samples, plan: _Plan, workers: int) -> DataLoader[Chunk]:
    workers = min(workers, len(plan))
    return DataLoader(
        samples,  # type: ignore[arg-type]  # torch wants the class Dataset, uses only __getitem__
        batch_size=None,  # the sampler's items are lists of indices, and the data set takes them whole
        sampler=plan,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # otherwise every pass would draw from the user's random state
    )


def _as_it_is(chunk: Any) -> Any:
    return chunk
