"""Batches from WebDataset shards behind URLs, which can only be read forward."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.decoder_warnings import silence_decoder_warnings
from ckpt_tools.data.device_transfer import prefetch_to_device
from ckpt_tools.data.images.image_files import image_transforms, read_images
from ckpt_tools.data.images.transforms import ImageTransform, PixelScale
from ckpt_tools.data.labels import parse_class_number
from ckpt_tools.data.prefetch import read_ahead
from ckpt_tools.data.sample_cache import PixelCache
from ckpt_tools.data.sample_order import Reading, balanced_batch_sizes
from ckpt_tools.data.shards.raw_shards import RawSample, mixed_samples
from ckpt_tools.data.shards.sample_mixing import batch_evenly
from ckpt_tools.data.shards.shard_index import no_images_error
from ckpt_tools.data.shards.shard_names import remote_shards
from ckpt_tools.data.stream import Batch, concatenate_parts
from ckpt_tools.data.unreadable_samples import SkippedSample, SkippedSamples, translate_reading_errors
from ckpt_tools.urls import redact_url

__all__ = ["ShardStream", "ShardStreamSource"]

_CHUNK_SIZE = 16  # samples that one thread decodes at a time
_NAMED_BATCHES = 4  # batches whose samples' names are remembered
# The share of unreadable samples is judged from so many samples on, and at the end of a pass.
_MIN_SAMPLES_TO_JUDGE = 1000


@dataclass(frozen=True)
class ShardStreamSource:
    """The images in shards behind URLs. How many there are, only a pass can tell.

    Shards are read in random order, several at a time, and the next sample is drawn among a
    thousand. So a limit takes samples from few shards, and they represent the data set only as well
    as the contents of the shards are mixed.
    """

    spec: str
    urls: tuple[str, ...]
    limit: int | None = None
    seed: int = 0
    kind: Literal["shards"] = "shards"
    is_preprocessed: bool = False
    sample_shape: None = None
    count: None = None

    @classmethod
    def open(cls, url: str, *, limit: int | None, seed: int) -> ShardStreamSource:
        """Find the shards that a URL names. Raises DataError, RemoteError, UsageError."""
        return cls(redact_url(url), remote_shards(url), limit, seed)

    def batches(
        self, input_spec: InputSpec | None, reading: Reading, *, labelled: bool = False
    ) -> ShardStream:
        """Float32 batches (n, C, H, W), normalised; ``labelled``: pairs with class numbers (n,).

        Raises DataError unless ``input_spec`` is an image's.
        """
        image, scale = image_transforms(self.spec, input_spec)
        return ShardStream(self, image, scale, reading, labelled)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A part of a batch: pixels, labels and names of readable images, and the samples skipped."""

    pixels: Tensor | None
    labels: Sequence[int]
    skipped: Mapping[tuple[str, str], SkippedSample]  # by URL and name
    count: int
    names: Sequence[str]


class ShardStream:
    """Passes over shards behind URLs, each in the same order. Ranks divide them among each other.

    Batches are of one size, except that the last two divide the remaining samples evenly, and that
    skipped samples are missing. If a ``cache`` holds all of the first pass, nothing is read again.
    """

    count: None = None
    batch_count: None = None
    rows_are_samples = True

    def __init__(
        self,
        source: ShardStreamSource,
        image: ImageTransform,
        scale: PixelScale,
        reading: Reading,
        labelled: bool,
    ) -> None:
        balanced_batch_sizes(1, reading.batch_size)  # raises for a size below 1
        self.transform = f"{image}, {scale}"
        self._source, self._image, self._finish = source, image, scale
        self._batch_size, self._workers = reading.batch_size, reading.worker_count
        self._device, self._share = torch.device(reading.device), reading.share
        self._labelled, self._cache = labelled, PixelCache() if reading.cached else None
        self._skipped = SkippedSamples(source.spec)
        self._cached_labels: list[list[int]] | None = None  # by batch, if the cache holds all batches
        self._names: dict[int, list[str]] = {}  # of the samples in the batches that were read last

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """The samples that could not be read so far, each once."""
        return tuple(self._skipped.by_key.values())

    def sample_name(self, batch: int, row: int) -> str:
        """Return the shard and the member that this row of this batch was read from.

        They are known for the batches that were read last; for others, and for cached ones, the
        numbers of row and batch are returned.
        """
        names = self._names.get(batch)
        return f"sample {row} of batch {batch}" if names is None else names[row]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass.

        Raises DataError or RemoteError if shards or more than 1 % of the samples are unreadable.
        """
        labels: deque[list[int]] = deque()
        batches = self._pixel_batches(labels)
        if self._device.type == "cuda":
            batches = prefetch_to_device(batches, self._device)
        for batch in batches:
            batch_labels = labels.popleft()
            inputs = self._finish(batch)
            yield (inputs, torch.tensor(batch_labels)) if self._labelled else inputs

    def _pixel_batches(self, labels: deque[list[int]]) -> Iterator[Tensor]:
        """Yield uint8 batches, and append the labels of each to ``labels`` before it is yielded.

        The labels do not travel with the pixels, because those may pass through
        ``prefetch_to_device``, which asks for a batch in advance.
        """
        self._names = {}
        if self._cached_labels is not None and self._cache is not None:
            for number, batch_labels in enumerate(self._cached_labels):
                labels.append(batch_labels)
                yield self._cache.read(number)
            return
        pass_labels: list[list[int]] = []
        for parts in self._checked_parts():
            pixels = [part.pixels for part in parts if part.pixels is not None]
            if pixels:
                batch = concatenate_parts(pixels)
                number = len(pass_labels)
                if self._cache is not None:
                    self._cache.keep(number, batch)
                self._names[number] = [name for part in parts for name in part.names]
                # Older names are dropped: those of all samples would fill the memory.
                self._names.pop(number - _NAMED_BATCHES, None)
                pass_labels.append([label for part in parts for label in part.labels])
                labels.append(pass_labels[-1])
                yield batch
        self._skipped.end_pass()
        if self._cache is not None and all(number in self._cache for number in range(len(pass_labels))):
            self._cached_labels = pass_labels

    def _checked_parts(self) -> Iterator[list[_Decoded]]:
        """Yield the parts of every batch. Raises DataError once too many samples are unreadable."""
        count, ignored = 0, Counter[str]()
        for parts in self._read_parts(ignored):
            for part in parts:
                count += part.count
                self._skipped.add(part.skipped)
            if count >= _MIN_SAMPLES_TO_JUDGE:
                self._skipped.refuse_too_many(count)
            yield parts
        self._skipped.refuse_too_many(count)
        # One of several ranks may have no sample of a small data set.
        if not count and self._share.world == 1:
            raise no_images_error(self._source.spec, ignored)

    def _read_parts(self, ignored: Counter[str]) -> Iterator[list[_Decoded]]:
        source = self._source
        threads = self._workers > 0
        samples = mixed_samples(source.urls, source.seed, self._share, source.limit, ignored, threads=threads)
        with translate_reading_errors(source.spec), closing(samples), silence_decoder_warnings():
            groups = map(self._jobs, batch_evenly(samples, self._batch_size))
            yield from read_ahead(groups, self._workers)

    def _jobs(self, samples: list[RawSample]) -> list[Callable[[], _Decoded]]:
        jobs: list[Callable[[], _Decoded]] = []
        start = 0
        for size in balanced_batch_sizes(len(samples), _CHUNK_SIZE):
            jobs.append(partial(self._decode_samples, samples[start : start + size]))
            start += size
        return jobs

    def _decode_samples(self, samples: list[RawSample]) -> _Decoded:
        names = [sample.name for sample in samples]
        chunk = read_images(
            range(len(samples)), (sample.file for sample in samples), names.__getitem__, self._image
        )
        labels = [
            parse_class_number(sample.label, partial(names.__getitem__, number))
            for number, sample in enumerate(samples if self._labelled else ())
            if number not in chunk.skipped
        ]
        skipped = {(samples[number].url, sample.name): sample for number, sample in chunk.skipped.items()}
        readable = [name for number, name in enumerate(names) if number not in chunk.skipped]
        return _Decoded(chunk.samples, labels, skipped, len(samples), readable)
