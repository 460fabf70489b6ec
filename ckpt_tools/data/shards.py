"""WebDataset shards on disk: tars whose samples are read in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.cache import PixelCache
from ckpt_tools.data.images import image_transforms, read_images
from ckpt_tools.data.labels import Labels, class_number
from ckpt_tools.data.order import WHOLE, Share, default_workers, random_order
from ckpt_tools.data.shard_index import ShardIndex, index_shards
from ckpt_tools.data.stream import Chunk, IndexedStream
from ckpt_tools.data.transforms import ImageTransform
from ckpt_tools.errors import DataError

__all__ = ["ShardSource", "shard_labels"]


@dataclass(frozen=True)
class ShardSource:
    """The images in shards on disk, drawn from all of them at random. Nothing is unpacked; names are only labels."""

    spec: str
    index: ShardIndex
    limit: int | None = None
    seed: int = 0
    kind: Literal["shards"] = "shards"
    preprocessed: bool = False
    sample_shape: None = None

    @classmethod
    def open(cls, spec: str, shards: Sequence[Path], *, limit: int | None, seed: int) -> ShardSource:
        """Reads the headers of the shards. Raises DataError if one is no tar or cut off, or no sample is an image."""
        return cls(spec, index_shards(spec, shards), limit, seed)

    @property
    def count(self) -> int:
        """Images in one pass."""
        return len(self.index) if self.limit is None else min(self.limit, len(self.index))

    def batches(
        self,
        input_spec: InputSpec | None,
        *,
        batch_size: int,
        workers: int | None = None,
        cached: bool = False,
        device: str | torch.device = "cpu",
        share: Share = WHOLE,
    ) -> IndexedStream:
        """Float32 batches (n, C, H, W), normalised. Raises DataError unless ``input_spec`` is an image's."""
        image, scale = image_transforms(self.spec, input_spec)
        return IndexedStream(
            ShardImages(self.index, image),
            random_order(len(self.index), limit=self.limit, seed=self.seed),
            name=self.spec,
            transform=f"{image}, {scale}",
            finish=scale,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            cache=PixelCache() if cached else None,
            device=device,
            share=share,
        )


@dataclass(frozen=True)
class ShardImages:
    """Reads images by number."""

    index: ShardIndex
    transform: ImageTransform

    def __getitem__(self, indices: list[int]) -> Chunk:
        """Uint8 (n, C, H, W) of those that can be read, and the reasons for the others."""
        return read_images(indices, map(self._file, indices), self.name, self.transform)

    def _file(self, number: int) -> BytesIO | Exception:
        shard, row = self.index.find(number)
        try:
            return BytesIO(shard.image(row))
        except (OSError, ValueError) as error:
            return error

    def name(self, number: int) -> str:
        """The shard and the member in it."""
        shard, row = self.index.find(number)
        return shard.name(row)


def shard_labels(source: ShardSource) -> Labels:
    """The ``.cls`` members. Raises DataError for an image without one, or one that is no number."""
    values = []
    for shard in source.index.shards:
        try:
            values += [class_number(shard.label(row), partial(shard.name, row)) for row in range(len(shard.places))]
        except OSError as error:
            raise DataError(f"{shard.path}: the shard cannot be read: {error.strerror or error}.") from error
    return Labels(torch.tensor(values), None, "", "")
