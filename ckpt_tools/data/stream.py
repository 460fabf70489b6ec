"""Streams of batches that can be read again and again.

Every pass yields the same samples in the same order, in batches of balanced sizes. Samples that
cannot be read are skipped.
"""

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
from ckpt_tools.data.prefetch import read_ahead
from ckpt_tools.data.sample_cache import PixelCache
from ckpt_tools.data.sample_order import Reading, balanced_batch_sizes
from ckpt_tools.data.unreadable_samples import SkippedSample, SkippedSamples, translate_reading_errors

__all__ = [
    "Batch",
    "BatchStream",
    "Chunk",
    "IndexedStream",
    "SampleStream",
    "Samples",
    "SkippedSample",
    "concatenate_parts",
    "first_not_finite",
]

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor (N, …), a tuple or list whose first item is one, or keyword arguments of the model."""

_CHUNK_SIZE = 16  # samples that one thread reads at a time


@dataclass(frozen=True)
class Chunk:
    """What a reader returns: samples (n, …), and by index the samples that it could not read."""

    samples: Tensor | None
    skipped: Mapping[int, SkippedSample]


class Samples(Protocol):
    """A data set whose samples have numbers. Several threads may read from it at the same time."""

    def __getitem__(self, indices: list[int], /) -> Chunk:
        """Read the samples with these indices, in this order."""

    def name(self, index: int, /) -> str:
        """Return the name of a sample as messages show it, such as its file or row."""


class SampleStream(Protocol):
    """What streams with and without labels have in common."""

    @property
    def count(self) -> int | None:
        """Number of samples in one pass before any is skipped; None if only a pass can tell."""

    @property
    def transform(self) -> str:
        """A description of what is done to a stored sample."""

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """The samples that could not be read so far, each once, in the order of their failure."""


class BatchStream(SampleStream, Protocol):
    """Batches of training data.

    Every iteration is a new pass over the same samples in the same order.
    """

    @property
    def batch_count(self) -> int | None:
        """Number of batches in one pass; None if only a pass can tell."""

    @property
    def rows_are_samples(self) -> bool:
        """Whether the rows of a batch are independent samples, so that it may be cut by rows."""

    def sample_name(self, batch: int, row: int, /) -> str:
        """Return the name of a sample as messages show it.

        ``batch`` counts the batches of the current pass, and ``row`` the samples in that batch.
        """

    def __iter__(self) -> Iterator[Batch]:
        """Start a pass. Raises DataError where the data cannot be used."""


class IndexedStream:
    """Batches from samples that have a number: files in a folder, rows of an array.

    n samples at batch size b make ⌈n/b⌉ batches whose sizes differ by at most one, apart from
    samples that are skipped. This process reads only its share of the batches, but ``count`` is
    the number of samples in all of them. ``finish`` turns a batch that was read into float32, on
    the device. A ``cache`` keeps decoded batches for the next pass; where ``reading`` asks for one,
    it need not be given. Iterate one pass at a time.
    """

    rows_are_samples = True

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
        self._batch_numbers = reading.share.select_items(range(len(self._sizes)))
        self._workers = reading.worker_count
        if cache is None and reading.cached:
            cache = PixelCache()
        self._cache = cache
        self._device = torch.device(reading.device)
        self._skipped = SkippedSamples(name)
        # Numbers of the batches that the current pass has yielded. Those without a readable sample
        # are not among them.
        self._yielded_batches: list[int] = []

    @property
    def batch_count(self) -> int:
        """Number of batches in one pass of this process."""
        return len(self._batch_numbers)

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """The samples that could not be read so far, each once."""
        return tuple(self._skipped.by_key.values())

    def indices(self) -> Iterator[int]:
        """Iterate over the numbers of the samples in the order of a pass.

        A sample is left out if it has turned out to be unreadable by the time it is reached.
        """
        return (index for index in self._order.tolist() if index not in self._skipped.by_key)

    def sample_name(self, batch: int, row: int) -> str:
        """Return the file, or the row of the array, that this row of this batch was read from."""
        indices = self._batch_indices(self._yielded_batches[batch]).tolist()
        readable = [index for index in indices if index not in self._skipped.by_key]
        return self._samples.name(readable[row])

    def _batch_indices(self, number: int) -> Tensor:
        end = self._ends[number]
        return self._order[end - self._sizes[number] : end]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the float32 batches (n, …) of one pass.

        Raises DataError if more than 1 % of all samples are unreadable, or if reading fails.
        """
        batches = self._raw_batches()
        if self._device.type == "cuda":
            # Pixels are copied as bytes and scaled on the GPU: float32 would be four times as much.
            batches = prefetch_to_device(batches, self._device)
        for batch in batches:
            yield self._finish(batch)

    def _raw_batches(self) -> Iterator[Tensor]:
        """Yield batches as ``finish`` takes them: uint8 pixels, or floats."""
        self._yielded_batches = []
        for number, chunks in zip(self._batch_numbers, self._chunks(), strict=True):
            for chunk in chunks:
                self._skipped.add(chunk.skipped)
            self._skipped.refuse_too_many(self.count)
            parts = [chunk.samples for chunk in chunks if chunk.samples is not None]
            if parts:
                batch = concatenate_parts(parts)
                # Only decoded pixels are cached: floats are in memory, or in a mapped file.
                if batch.is_floating_point():
                    batch = batch.float()
                elif self._cache is not None:
                    self._cache.keep(number, batch)
                self._yielded_batches.append(number)
                yield batch
        self._skipped.end_pass()

    def _chunks(self) -> Iterator[list[Chunk]]:
        with translate_reading_errors(self._name), silence_decoder_warnings():
            yield from read_ahead(self._jobs(), self._workers)

    def _jobs(self) -> Iterator[list[Callable[[], Chunk]]]:
        """Yield for every batch the calls that read its parts."""
        # A generator and no list: the jobs of millions of samples would fill the memory.
        for number in self._batch_numbers:
            size, indices = self._sizes[number], self._batch_indices(number)
            if self._cache is not None and number in self._cache:
                yield [partial(_read_cached_batch, self._cache, number)]
            else:
                # Without threads there is no reason to divide a batch.
                parts = (
                    torch.split(indices, balanced_batch_sizes(size, _CHUNK_SIZE))
                    if self._workers
                    else [indices]
                )
                yield [partial(self._samples.__getitem__, part.tolist()) for part in parts]


def first_not_finite(batch: Tensor) -> int | None:
    """Return the row of the first sample in a batch (N, …) that holds NaN or infinity, if any."""
    finite = torch.isfinite(batch)
    if bool(finite.all()):
        return None
    return int((~finite).reshape(len(batch), -1).any(1).nonzero()[0])


def concatenate_parts(parts: list[Tensor]) -> Tensor:
    """Join the parts (n, …) of a batch, in the same memory format."""
    if len(parts) == 1 or parts[0].ndim != 4 or parts[0].dtype != torch.uint8:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    # Numpy copies in this thread. torch.cat would take every core from the threads that decode.
    channels_last = [part.permute(0, 2, 3, 1).numpy() for part in parts]
    return torch.from_numpy(np.concatenate(channels_last)).permute(0, 3, 1, 2)


def _read_cached_batch(cache: PixelCache, number: int) -> Chunk:
    return Chunk(cache.read(number), {})
