"""WebDataset shards on disk: tars whose samples are read in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch

from ckpt_tools.data.images.image_files import ImageSource
from ckpt_tools.data.labels import Labels, parse_class_number
from ckpt_tools.data.shards.shard_index import ShardIndex, index_shards
from ckpt_tools.errors import DataError

__all__ = ["ShardSource", "shard_labels"]


@dataclass(frozen=True)
class ShardSource(ImageSource):
    """The images in shards on disk, drawn from all shards at random.

    Nothing is unpacked: the names of members are labels in messages, and never paths.
    """

    index: ShardIndex
    kind: Literal["shards"] = field(default="shards", init=False)

    @classmethod
    def open(cls, spec: str, shards: Sequence[Path], *, limit: int | None, seed: int) -> ShardSource:
        """Open shards by reading the headers of their members.

        Raises DataError if one is no tar or cut off, or if no sample has an image.
        """
        return cls(spec, index_shards(spec, shards), limit=limit, seed=seed)

    @property
    def total(self) -> int:
        """Number of images in all shards."""
        return len(self.index)

    def files(self, numbers: Sequence[int]) -> Iterator[BytesIO | Exception]:
        """Yield the contents of images, or the error of one that cannot be read."""
        for number in numbers:
            shard, row = self.index.find(number)
            try:
                yield BytesIO(shard.read_image(row))
            except (OSError, ValueError) as error:
                yield error

    def name(self, number: int) -> str:
        """Return the shard of an image and the member in it."""
        shard, row = self.index.find(number)
        return shard.name(row)


def shard_labels(source: ShardSource) -> Labels:
    """Read the ``.cls`` members of all images.

    Raises DataError for an image without one, and for one that holds no number.
    """
    values = []
    for shard in source.index.shards:
        try:
            for row in range(len(shard.places)):
                values.append(parse_class_number(shard.read_label(row), partial(shard.name, row)))
        except OSError as error:
            raise DataError(f"{shard.path}: the shard cannot be read: {error.strerror or error}.") from error
    # A shard does not say how many classes there are, so any number of outputs will do.
    return Labels(torch.tensor(values), None, "", "")
