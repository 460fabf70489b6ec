"""WebDataset shards behind URLs: batches of what comes by."""

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
from ckpt_tools.data.prefetch import ReadTimeoutError, read_ahead
from ckpt_tools.data.sample_cache import PixelCache
from ckpt_tools.data.sample_order import FULL_SHARE, Share, balanced_batch_sizes, default_workers
from ckpt_tools.data.shards.raw_shards import RawSample, mixed_samples
from ckpt_tools.data.shards.sample_mixing import batch_evenly
from ckpt_tools.data.shards.shard_index import no_images_error
from ckpt_tools.data.shards.shard_names import remote_shards
from ckpt_tools.data.stream import Batch, SkippedSample, concatenate_parts, refuse_unreadable
from ckpt_tools.data.user_errors import describe_error
from ckpt_tools.errors import CkptToolsError, DataError, UsageError
from ckpt_tools.urls import redact_url

__all__ = ["ShardStream", "ShardStreamSource"]

_CHUNK = 16  # samples that one thread decodes at a time
_NAMED = 4  # batches whose samples' names are remembered
_MIN_SAMPLES_TO_JUDGE = 1000  # samples after which the share of unreadable ones means something before all are read


@dataclass(frozen=True)
class ShardStreamSource:
    """The images in shards behind URLs; how many there are, only a pass can tell.

    Shards come in random order, several at a time, and the next sample is drawn among a thousand: a limit takes from
    few shards, and is as fair a sample as their contents are mixed.
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
        """Finds the shards. Raises DataError, RemoteError, UsageError."""
        return cls(redact_url(url), remote_shards(url), limit, seed)

    def batches(
        self,
        input_spec: InputSpec | None,
        *,
        batch_size: int,
        workers: int | None = None,
        cached: bool = False,
        device: str | torch.device = "cpu",
        share: Share = FULL_SHARE,
        labelled: bool = False,
    ) -> ShardStream:
        """Float32 batches (n, C, H, W), normalised; ``labelled``: pairs with class numbers (n,).

        Raises DataError unless ``input_spec`` is an image's.
        """
        image, scale = image_transforms(self.spec, input_spec)
        workers = default_workers() if workers is None else workers
        if workers < 0:
            raise UsageError(f"--workers is {workers}. Give 0 to read in this thread, or more.")
        cache = PixelCache() if cached else None
        return ShardStream(self, image, scale, batch_size, workers, cache, torch.device(device), share, labelled)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A part of a batch: pixels of what could be read, the labels of that, and the others."""

    pixels: Tensor | None
    labels: Sequence[int]
    skipped: Mapping[tuple[str, str], SkippedSample]  # by URL and name
    count: int
    names: Sequence[str]  # of what could be read


class ShardStream:
    """Passes over shards behind URLs, each in the same order. Ranks divide them; see ``mixed_samples``.

    Batches are of one size, except that the last two share what is left, and for samples that were skipped. With a
    ``cache`` that holds all of the first pass, nothing is read again.
    """

    count: None = None
    batch_count: None = None

    def __init__(
        self,
        source: ShardStreamSource,
        image: ImageTransform,
        scale: PixelScale,
        batch_size: int,
        workers: int,
        cache: PixelCache | None,
        device: torch.device,
        share: Share,
        labelled: bool,
    ) -> None:
        balanced_batch_sizes(1, batch_size)  # raises for a size below 1
        self.transform = f"{image}, {scale}"
        self._source, self._image, self._finish = source, image, scale
        self._batch_size, self._workers, self._device, self._share = batch_size, workers, device, share
        self._labelled, self._cache = labelled, cache
        self._skipped: dict[tuple[str, str], SkippedSample] = {}
        self._kept: list[list[int]] | None = None  # labels of the batches in the cache, if all are there
        self._names: dict[int, list[str]] = {}  # of the samples in the batches that were read last
        self._passed = False

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """Samples that no pass so far could read, each once."""
        return tuple(self._skipped.values())

    def sample_name(self, batch: int, row: int) -> str:
        """The shard and the member that became this row of a batch that was just read; of cached ones, the place."""
        names = self._names.get(batch)
        return f"sample {row} of batch {batch}" if names is None else names[row]

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Raises DataError, RemoteError where the shards or more than 1 % of the samples cannot be read."""
        labels: deque[list[int]] = deque()
        batches = self._pixels(labels)
        if self._device.type == "cuda":
            batches = prefetch_to_device(batches, self._device)
        for batch in batches:
            known = labels.popleft()
            yield (self._finish(batch), torch.tensor(known)) if self._labelled else self._finish(batch)

    def _pixels(self, labels: deque[list[int]]) -> Iterator[Tensor]:
        """Uint8 batches; the labels of each are added before it comes."""
        self._names = {}
        if self._kept is not None and self._cache is not None:
            for number, known in enumerate(self._kept):
                labels.append(known)
                yield self._cache.read(number)
            return
        seen: list[list[int]] = []
        for parts in self._parts():
            read = [part.pixels for part in parts if part.pixels is not None]
            if read:
                batch = concatenate_parts(read)
                if self._cache is not None:
                    self._cache.keep(len(seen), batch)
                self._names[len(seen)] = [name for part in parts for name in part.names]
                self._names.pop(len(seen) - _NAMED, None)
                seen.append([label for part in parts for label in part.labels])
                labels.append(seen[-1])
                yield batch
        self._passed = True
        if self._cache is not None and all(number in self._cache for number in range(len(seen))):
            self._kept = seen

    def _parts(self) -> Iterator[list[_Decoded]]:
        """What becomes of every batch, and the end that too many unreadable samples make of a pass."""
        count, others = 0, Counter[str]()
        for parts in self._read(others):
            count += sum(part.count for part in parts)
            for part in parts:
                self._note(part.skipped)
            if count >= _MIN_SAMPLES_TO_JUDGE:
                refuse_unreadable(self._source.spec, self.skipped_samples, count)
            yield parts
        refuse_unreadable(self._source.spec, self.skipped_samples, count)
        if not count and self._share.world == 1:
            raise no_images_error(self._source.spec, others)

    def _read(self, others: Counter[str]) -> Iterator[list[_Decoded]]:
        source = self._source
        samples = mixed_samples(source.urls, source.seed, self._share, source.limit, others, threads=self._workers > 0)
        try:
            with closing(samples), silence_decoder_warnings():
                groups = map(self._jobs, batch_evenly(samples, self._batch_size))
                yield from read_ahead(groups, self._workers)
        except CkptToolsError:
            raise
        except ReadTimeoutError as error:
            raise DataError(
                f"{source.spec}: {error}. Look at that file, and at the disk or network it comes from; leave it "
                "out, or run again."
            ) from error
        except Exception as error:  # whatever reading raised
            raise DataError(
                f"{source.spec}: reading failed with {describe_error(error)}. If memory ran out, try fewer --workers, "
                f"--workers 0, or a smaller --batch-size."
            ) from error

    def _jobs(self, samples: list[RawSample]) -> list[Callable[[], _Decoded]]:
        jobs: list[Callable[[], _Decoded]] = []
        start = 0
        for size in balanced_batch_sizes(len(samples), _CHUNK):
            jobs.append(partial(self._decode_samples, samples[start : start + size]))
            start += size
        return jobs

    def _decode_samples(self, samples: list[RawSample]) -> _Decoded:
        names = [sample.name for sample in samples]
        chunk = read_images(range(len(samples)), (sample.file for sample in samples), names.__getitem__, self._image)
        labels = [
            parse_class_number(sample.label, partial(names.__getitem__, number))
            for number, sample in enumerate(samples if self._labelled else ())
            if number not in chunk.skipped
        ]
        skipped = {(samples[number].url, what.name): what for number, what in chunk.skipped.items()}
        read = [name for number, name in enumerate(names) if number not in chunk.skipped]
        return _Decoded(chunk.samples, labels, skipped, len(samples), read)

    def _note(self, skipped: Mapping[tuple[str, str], SkippedSample]) -> None:
        for place, what in skipped.items():
            if self._passed and place not in self._skipped:
                raise DataError(
                    f"{self._source.spec}: {what.name} was readable in the first pass, now: {what.reason}. All passes "
                    f"must see the same samples: leave the data alone while it is read, and run again."
                )
            self._skipped[place] = what
