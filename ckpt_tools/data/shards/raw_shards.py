"""Samples of shards behind URLs as they lie there: read forward, several shards at a time, mixed on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from urllib.parse import urlsplit

from ckpt_tools.data.sample_order import Share, random_order
from ckpt_tools.data.shards.sample_grouping import (
    LABEL_EXTENSION,
    group_members,
    image_extension,
    printable_name,
    split_name,
)
from ckpt_tools.data.shards.sample_mixing import interleave_sources, shuffle_within_buffer
from ckpt_tools.data.shards.shard_index import MAX_IMAGE_BYTES, MAX_LABEL_BYTES
from ckpt_tools.data.shards.tar_members import TarMember, TarReader
from ckpt_tools.remote.remote_store import open_url, translate_store_errors
from ckpt_tools.urls import redact_url

__all__ = ["RawSample", "mixed_samples"]

_TOGETHER = 8  # shards that are read at the same time
_HELD_BACK = 1000  # samples among which the next one is drawn, as is usual with WebDataset
_HELD_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class RawSample:
    """A sample with an image: the file, or why it is not taken, and the beginning of its label."""

    url: str
    name: str
    image: bytes | Exception
    label: bytes | None

    @property
    def weight(self) -> int:
        """Bytes of memory, about."""
        return 1000 + (len(self.image) if isinstance(self.image, bytes) else 0)

    @property
    def file(self) -> BytesIO | Exception:
        """What is to be decoded."""
        return BytesIO(self.image) if isinstance(self.image, bytes) else self.image


def mixed_samples(
    urls: Sequence[str], seed: int, share: Share, limit: int | None, others: Counter[str], *, threads: bool
) -> Generator[RawSample]:
    """One pass over the samples of a rank, in the order that ``seed`` says, with or without threads.

    Ranks divide the shards or, if there is a ``limit`` or fewer shards than ranks, the samples: then together they take
    what one alone would. What samples without image consist of is counted in ``others``. Raises DataError for a shard
    that is no complete tar, and RemoteError.
    """
    order = [urls[number] for number in random_order(len(urls), limit=None, seed=seed).tolist()]
    by_shard = limit is None and len(order) >= share.world
    with ExitStack() as stack:
        sources = [_samples(url, others) for url in (share.select_items(order) if by_shard else order)]
        for source in sources:
            stack.callback(source.close)
        pool = stack.enter_context(ThreadPoolExecutor(_TOGETHER, "ckpt-tools-shard")) if threads else None
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)
        samples: Iterator[RawSample] = interleave_sources(sources, _TOGETHER, pool, _weight)
        samples = shuffle_within_buffer(samples, seed, most=_HELD_BACK, weight=_weight, heaviest=_HELD_BYTES)
        yield from samples if by_shard else islice(samples, share.rank, limit, share.world)


def _weight(sample: RawSample) -> int:
    return sample.weight


def _samples(url: str, others: Counter[str]) -> Generator[RawSample]:
    shown = redact_url(url)
    shard = urlsplit(shown).path.rpartition("/")[2]
    with translate_store_errors(url), open_url(url) as file:
        tar = TarReader(file, shown)
        members = ((member.name, (member.name, _content(tar, member))) for member in tar)
        for sample in group_members(members, shown):
            extension = image_extension(sample.parts)
            if extension is None:
                others.update(sample.parts.keys())
                continue
            name, image = sample.parts[extension]
            label = sample.parts[LABEL_EXTENSION][1] if LABEL_EXTENSION in sample.parts else None
            yield RawSample(
                url, printable_name(f"{shard}/{name}"), image or b"", label if isinstance(label, bytes) else None
            )


def _content(tar: TarReader, member: TarMember) -> bytes | Exception | None:
    """What is needed of a member: an image, the beginning of a label."""
    extension = (split_name(member.name) or ("", ""))[1]
    if extension == LABEL_EXTENSION:
        return bytes(tar.read(min(member.size, MAX_LABEL_BYTES)))
    if image_extension((extension,)) is None:
        return None
    if member.size > MAX_IMAGE_BYTES:
        return ValueError(f"{member.size:,} bytes, more than an image has")
    return bytes(tar.read(member.size))
