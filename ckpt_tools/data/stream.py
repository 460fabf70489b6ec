"""Batches that can be read again and again: one order, balanced sizes, unreadable samples skipped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.data.decoder_warnings import silence_decoder_warnings
from ckpt_tools.data.device_transfer import prefetch_to_device
from ckpt_tools.data.prefetch import ReadTimeoutError, read_ahead
from ckpt_tools.data.sample_cache import PixelCache
from ckpt_tools.data.sample_order import Reading, balanced_batch_sizes
from ckpt_tools.data.user_errors import describe_error
from ckpt_tools.errors import DataError, RemoteError

__all__ = [
    "Batch",
    "BatchStream",
    "Chunk",
    "IndexedStream",
    "Samples",
    "SkippedSample",
    "concatenate_parts",
    "first_not_finite",
    "refuse_unreadable",
]

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor (N, …), a tuple or list whose first item is one, or the keyword arguments of the model."""

MAX_UNREADABLE_SHARE = 0.01
"""Share of unreadable samples above which the data set is refused."""

_CHUNK = 16  # samples that one thread reads at a time


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """What a reader returns: the samples it read, (n, …), and by index those it could not."""

    samples: Tensor | None
    skipped: Mapping[int, SkippedSample]


class Samples(Protocol):
    """A data set that reads several samples at once, in several threads."""

    def __getitem__(self, indices: list[int], /) -> Chunk:
        """The samples with these indices, in this order."""
        ...

    def name(self, index: int, /) -> str:
        """What people call the sample with this index."""
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
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """Samples that no pass so far could read, each once, in the order in which they were met."""
        ...

    def sample_name(self, batch: int, row: int, /) -> str:
        """What people call a sample of the pass under way, by the number of its batch in it, and its row there."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass. Raises DataError where the data cannot be used."""
        ...


class IndexedStream:
    """Batches from samples that have a number: files in a folder, rows of an array.

    n samples at batch size b come as ⌈n/b⌉ batches whose sizes differ by at most one, less the samples that
    were skipped. Of these, the share of this process is read; ``count`` is that of all. ``finish`` turns what was
    read into float32, on the device. What one pass has decoded, a ``cache`` keeps for the next; if ``reading`` asks
    for one, it need not be given. Iterate one pass at a time.
    """

    def __init__(
        self,
        samples: Samples,
        order: Tensor,
        reading: Reading,
        *,
        name: str,
        transform: str,
        finish: Callable[[Tensor], Tensor],
        cache: PixelCache | None = None,
    ) -> None:
        self.count = len(order)
        self.transform = transform
        self._samples, self._order = samples, order
        self._name = name
        self._finish = finish
        self._sizes = balanced_batch_sizes(len(order), reading.batch_size)
        self._ends = list(itertools.accumulate(self._sizes))
        self._numbers = reading.share.select_items(range(len(self._sizes)))
        self._workers = reading.worker_count
        if cache is None and reading.cached:
            cache = PixelCache()
        self._cache = cache
        self._device = torch.device(reading.device)
        self._skipped: dict[int, SkippedSample] = {}
        self._given: list[int] = []  # numbers of the batches of this pass that were not skipped as a whole
        self._passed = False

    @property
    def batch_count(self) -> int:
        """Batches in one pass of this process."""
        return len(self._numbers)

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """Samples that no pass so far could read, each once."""
        return tuple(self._skipped.values())

    def indices(self) -> Iterator[int]:
        """Numbers of the samples of a pass, in its order; whoever is known to be unreadable by then is left out."""
        return (index for index in self._order.tolist() if index not in self._skipped)

    def sample_name(self, batch: int, row: int) -> str:
        """The file, or the row of the array, that became this row of this batch of the pass under way."""
        rows = [index for index in self._indices_of(self._given[batch]).tolist() if index not in self._skipped]
        return self._samples.name(rows[row])

    def _indices_of(self, number: int) -> Tensor:
        end = self._ends[number]
        return self._order[end - self._sizes[number] : end]

    def __iter__(self) -> Iterator[Tensor]:
        """One pass of float32 tensors (n, …).

        Raises DataError when more than 1 % of all samples are unreadable, or when reading fails otherwise.
        """
        batches = self._batches()
        if self._device.type == "cuda":
            batches = prefetch_to_device(batches, self._device)
        for batch in batches:
            yield self._finish(batch)

    def _batches(self) -> Iterator[Tensor]:
        """What ``finish`` takes: pixels, or floats."""
        self._given = []
        for number, chunks in zip(self._numbers, self._chunks(), strict=True):
            for chunk in chunks:
                self._note(chunk.skipped)
            read = [chunk.samples for chunk in chunks if chunk.samples is not None]
            if read:
                batch = concatenate_parts(read)
                if batch.is_floating_point():
                    batch = batch.float()
                elif self._cache is not None:
                    self._cache.keep(number, batch)
                self._given.append(number)
                yield batch
        self._passed = True

    def _chunks(self) -> Iterator[list[Chunk]]:
        try:
            with silence_decoder_warnings():
                yield from read_ahead(self._jobs(), self._workers)
        except RemoteError:
            raise
        except ReadTimeoutError as error:
            raise DataError(
                f"{self._name}: {error}. Look at that file, and at the disk or network it comes from; leave it out, or "
                "run again."
            ) from error
        except Exception as error:  # whatever reading raised
            raise DataError(
                f"{self._name}: reading failed with {describe_error(error)}. If memory ran out, try fewer --workers, "
                f"--workers 0, or a smaller --batch-size."
            ) from error

    def _jobs(self) -> Iterator[list[Callable[[], Chunk]]]:
        """For every batch, how its parts are read; made one by one, as lists of millions would fill memory."""
        for number in self._numbers:
            size, indices = self._sizes[number], self._indices_of(number)
            if self._cache is not None and number in self._cache:
                yield [partial(_read_cached_batch, self._cache, number)]
            else:
                parts = torch.split(indices, balanced_batch_sizes(size, _CHUNK)) if self._workers else [indices]
                yield [partial(self._samples.__getitem__, part.tolist()) for part in parts]

    def _note(self, skipped: Mapping[int, SkippedSample]) -> None:
        new = {index: what for index, what in skipped.items() if index not in self._skipped}
        if new and self._passed:
            first = next(iter(new.values()))
            raise DataError(
                f"{self._name}: {first.name} was readable in the first pass, now: {first.reason}. All passes "
                f"must see the same samples: leave the data alone while it is read, and run again."
            )
        self._skipped.update(new)
        refuse_unreadable(self._name, self.skipped_samples, self.count)


def refuse_unreadable(name: str, skipped: Sequence[SkippedSample], count: int) -> None:
    """Raise DataError if more than 1 % of ``count`` samples were skipped."""
    if len(skipped) > MAX_UNREADABLE_SHARE * count:
        first_few = "; ".join(f"{what.name} ({what.reason})" for what in skipped[:5])
        raise DataError(
            f"{name}: {len(skipped)} of {count} samples are unreadable so far, expected "
            f"at most {MAX_UNREADABLE_SHARE:.0%}: {first_few}. Repair or remove them."
        )


def first_not_finite(batch: Tensor) -> int | None:
    """Position of the first sample of a batch (N, …) with NaN or infinity; None if all values are finite."""
    finite = torch.isfinite(batch)
    if bool(finite.all()):
        return None
    return int((~finite).reshape(len(batch), -1).any(1).nonzero()[0])


def concatenate_parts(parts: list[Tensor]) -> Tensor:
    """The parts of a batch (n, …) as one, in the same memory format."""
    if len(parts) == 1 or parts[0].ndim != 4 or parts[0].dtype != torch.uint8:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    # numpy copies in this thread; torch.cat would compete with the readers for every core, at the price of decoding
    last = [part.permute(0, 2, 3, 1).numpy() for part in parts]
    return torch.from_numpy(np.concatenate(last)).permute(0, 3, 1, 2)


def _read_cached_batch(cache: PixelCache, number: int) -> Chunk:
    return Chunk(cache.read(number), {})
