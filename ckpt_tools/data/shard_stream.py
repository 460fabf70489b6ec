"""WebDataset shards behind URLs: read from beginning to end, several at a time, and mixed on the way."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.blame import blamed
from ckpt_tools.data.cache import PixelCache
from ckpt_tools.data.grouping import LABEL, grouped, image_extension, printable, split_name
from ckpt_tools.data.images import image_transforms, read_images
from ckpt_tools.data.labels import class_number
from ckpt_tools.data.mixing import evenly, shuffled, taken_in_turn
from ckpt_tools.data.order import WHOLE, Share, balanced, default_workers, random_order
from ckpt_tools.data.quiet import quiet_decoders
from ckpt_tools.data.readers import read_ahead
from ckpt_tools.data.shard_index import LARGEST, LONGEST, no_images
from ckpt_tools.data.shard_names import remote_shards
from ckpt_tools.data.stream import Skipped, joined, refuse_unreadable
from ckpt_tools.data.tar import Member, TarReader
from ckpt_tools.data.transfer import sent_ahead
from ckpt_tools.data.transforms import ImageTransform, PixelScale
from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.redaction import without_secrets
from ckpt_tools.remote.store import open_url, reaching

__all__ = ["ShardStream", "ShardStreamSource"]

_TOGETHER = 8  # shards that are read at the same time
_HELD_BACK = 1000  # samples among which the next one is drawn, as is usual with WebDataset
_HELD_BYTES = 2**28
_CHUNK = 16  # samples that one thread decodes at a time
_ENOUGH = 1000  # samples from which on the share of unreadable ones is looked at before the end


@dataclass(frozen=True)
class ShardStreamSource:
    """The images in shards behind URLs; how many there are, only a pass can tell.

    Shards come in random order, eight at a time, and a sample is drawn among the next thousand. So a limit draws from
    few shards, and is as fair as their contents are mixed. Ranks divide the shards, or, if there are fewer shards than
    ranks, the samples.
    """

    spec: str
    urls: tuple[str, ...]
    limit: int | None = None
    seed: int = 0
    kind: Literal["shards"] = "shards"
    preprocessed: bool = False
    sample_shape: None = None
    count: None = None

    @classmethod
    def open(cls, url: str, *, limit: int | None, seed: int) -> ShardStreamSource:
        """Finds the shards. Raises DataError, RemoteError, UsageError."""
        return cls(without_secrets(url), remote_shards(url), limit, seed)

    def batches(
        self,
        input_spec: InputSpec | None,
        *,
        batch_size: int,
        workers: int | None = None,
        cached: bool = False,
        device: str | torch.device = "cpu",
        share: Share = WHOLE,
        labelled: bool = False,
    ) -> ShardStream:
        """Float32 batches (n, C, H, W), normalised; ``labelled``: pairs with their classes.

        Raises DataError unless ``input_spec`` is an image's.
        """
        image, scale = image_transforms(self.spec, input_spec)
        return ShardStream(
            self,
            image,
            scale,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            cache=PixelCache() if cached else None,
            device=torch.device(device),
            share=share,
            labelled=labelled,
        )


@dataclass(frozen=True, eq=False)
class Raw:
    """A sample as it lies in a shard: its image file (None if it is too large), and its label."""

    name: str
    size: int
    image: bytearray | None
    label: bytes | None

    @property
    def weight(self) -> int:
        """Bytes of memory, about."""
        return 1000 + (0 if self.image is None else len(self.image))

    def content(self) -> bytearray:
        """The image file. Raises ValueError if it was too large."""
        if self.image is None:
            raise ValueError(f"{self.size:,} bytes, more than an image has")
        return self.image
