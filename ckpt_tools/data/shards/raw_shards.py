"""Read the undecoded samples of shards behind URLs, several shards at a time, and mix them."""

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

_OPEN_SHARDS = 8  # shards that are read at the same time
_BUFFER_SAMPLES = 1000  # samples among which the next one is drawn, as is usual with WebDataset
_BUFFER_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class RawSample:
    """A sample with an image: the file, or why it is not read, and the beginning of its label.

    ``name`` is made of the shard and the member, as messages show it.
    """

    url: str
    name: str
    image: bytes | Exception
    label: bytes | None

    @property
    def file(self) -> BytesIO | Exception:
        """The image as decoders take it, or the reason why there is none."""
        return BytesIO(self.image) if isinstance(self.image, bytes) else self.image


def mixed_samples(
    urls: Sequence[str], seed: int, share: Share, limit: int | None, ignored: Counter[str], *, threads: bool
) -> Generator[RawSample]:
    """Yield the samples of one rank in one pass, in the order that ``seed`` determines.

    The order is the same with and without threads. Ranks divide the shards among them or, if there
    is a ``limit`` or fewer shards than ranks, the samples: then all ranks together read the samples
    that a single process would. ``ignored`` counts the extensions in samples without an image.

    Raises DataError for a shard that is no complete tar, and RemoteError.
    """
    order = [urls[number] for number in random_order(len(urls), limit=None, seed=seed).tolist()]
    by_shard = limit is None and len(order) >= share.world
    with ExitStack() as stack:
        sources = [_read_samples(url, ignored) for url in (share.select_items(order) if by_shard else order)]
        # The stack closes in reverse order: first the threads end, then the files that they read.
        for source in sources:
            stack.callback(source.close)
        pool = stack.enter_context(ThreadPoolExecutor(_OPEN_SHARDS, "ckpt-tools-shard")) if threads else None
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)
        samples: Iterator[RawSample] = interleave_sources(sources, _OPEN_SHARDS, pool, _memory_bytes)
        samples = shuffle_within_buffer(
            samples, seed, max_items=_BUFFER_SAMPLES, weight=_memory_bytes, max_weight=_BUFFER_BYTES
        )
        yield from samples if by_shard else islice(samples, share.rank, limit, share.world)


def _memory_bytes(sample: RawSample) -> int:
    overhead = 1000  # a rough figure for the objects, the name and the label
    return overhead + (len(sample.image) if isinstance(sample.image, bytes) else 0)


def _read_samples(url: str, ignored: Counter[str]) -> Generator[RawSample]:
    shown = redact_url(url)
    shard = urlsplit(shown).path.rpartition("/")[2]
    with translate_store_errors(url), open_url(url) as file:
        tar = TarReader(file, shown)
        # The content is read at once, because the file cannot be read backwards.
        members = ((member.name, (member.name, _read_content(tar, member))) for member in tar)
        for sample in group_members(members, shown):
            extension = image_extension(sample.parts)
            if extension is None:
                ignored.update(sample.parts.keys())
                continue
            name, image = sample.parts[extension]
            _, label = sample.parts.get(LABEL_EXTENSION, ("", None))
            label = label if isinstance(label, bytes) else None
            yield RawSample(url, printable_name(f"{shard}/{name}"), image or b"", label)


def _read_content(tar: TarReader, member: TarMember) -> bytes | Exception | None:
    """Read an image or the beginning of a label; None for other members, which are skipped."""
    extension = (split_name(member.name) or ("", ""))[1]
    if extension == LABEL_EXTENSION:
        return bytes(tar.read(min(member.size, MAX_LABEL_BYTES)))
    if image_extension((extension,)) is None:
        return None
    if member.size > MAX_IMAGE_BYTES:
        return ValueError(f"{member.size:,} bytes, more than an image has")
    return bytes(tar.read(member.size))
