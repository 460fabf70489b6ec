"""WebDataset shards on disk: tars whose samples are read in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch

from ckpt_tools.data.images.image_files import ImageSource, read_images
from ckpt_tools.data.images.transforms import ImageTransform
from ckpt_tools.data.labels import Labels, parse_class_number
from ckpt_tools.data.shards.shard_index import ShardIndex, index_shards
from ckpt_tools.data.stream import Chunk
from ckpt_tools.errors import DataError

__all__ = ["ShardSource", "shard_labels"]


@dataclass(frozen=True)
class ShardSource(ImageSource):
    """The images in shards on disk, drawn from all of them at random. Nothing is unpacked; names are only labels."""

    index: ShardIndex
    kind: Literal["shards"] = field(default="shards", init=False)

    @classmethod
    def open(cls, spec: str, shards: Sequence[Path], *, limit: int | None, seed: int) -> ShardSource:
        """Reads the headers of the shards. Raises DataError if one is no tar or cut off, or no sample is an image."""
        return cls(spec, index_shards(spec, shards), limit=limit, seed=seed)

    @property
    def total(self) -> int:
        """Images in all shards."""
        return len(self.index)

    def samples(self, transform: ImageTransform) -> ShardImages:
        """What reads images by number."""
        return ShardImages(self.index, transform)


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
            values += [
                parse_class_number(shard.label(row), partial(shard.name, row)) for row in range(len(shard.places))
            ]
        except OSError as error:
            raise DataError(f"{shard.path}: the shard cannot be read: {error.strerror or error}.") from error
    return Labels(torch.tensor(values), None, "", "")
