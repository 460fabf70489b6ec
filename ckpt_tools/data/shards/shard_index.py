"""An index of the images in shards on disk, so that they can be read in any order."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckpt_tools.data.prefetch import read_ahead
from ckpt_tools.data.sample_order import default_workers
from ckpt_tools.data.shards.sample_grouping import (
    LABEL_EXTENSION,
    group_members,
    image_extension,
    printable_name,
)
from ckpt_tools.data.shards.tar_members import TarReader
from ckpt_tools.errors import DataError

__all__ = ["MAX_IMAGE_BYTES", "MAX_LABEL_BYTES", "ShardIndex", "index_shards", "no_images_error"]

MAX_IMAGE_BYTES = 2**28
"""Size of the largest image file that is read into memory."""

MAX_LABEL_BYTES = 64
"""Bytes of a label that are read at most. A class number has fewer."""


@dataclass(frozen=True, eq=False)
class IndexedShard:
    """One shard, and where its n images lie in it.

    ``places`` is (n, 5): offset and size of the image, offset and size of its label (size −1 if it
    has none), and the position of its name in ``names``, where a NUL ends each name. ``extensions``
    counts the members of samples without an image.
    """

    # One table and one byte string, and not n objects, because shards may hold millions of images.

    path: Path
    places: npt.NDArray[np.int64]
    names: bytes
    extensions: Counter[str]

    def name(self, row: int) -> str:
        """Return the shard and the member that hold an image, as messages show them."""
        start = int(self.places[row, 4])
        name = self.names[start : self.names.index(b"\0", start)].decode("utf-8", "surrogateescape")
        return printable_name(f"{self.path.name}/{name}")

    def read_label(self, row: int) -> bytes | None:
        """Read the beginning of the label of an image; None if it has none. Raises OSError."""
        offset, size = self.places[row, 2:4].tolist()
        return None if size < 0 else self._read(offset, min(size, MAX_LABEL_BYTES))

    def read_image(self, row: int) -> bytes:
        """Read an image file. Raises OSError, and ValueError if it is too large."""
        offset, size = self.places[row, :2].tolist()
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size:,} bytes, more than an image has")
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        # The shard is opened for every piece, so that threads share no position in the file.
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("the shard has become shorter")
        return content


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The images of several shards, numbered in the order in which they lie there.

    ``ends`` holds for each shard the number of images in it and all shards before it.
    """

    shards: Sequence[IndexedShard]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(self, number: int) -> tuple[IndexedShard, int]:
        """Return the shard of an image, and its row there."""
        # "right": shards without images, which end where the one before does, are passed over.
        shard = int(np.searchsorted(self.ends, number, "right"))
        return self.shards[shard], number - (int(self.ends[shard - 1]) if shard else 0)


def index_shards(spec: str, paths: Sequence[Path]) -> ShardIndex:
    """Read the headers of all shards, several at a time.

    Raises DataError for a shard that is no complete tar, and if there is no image.
    """
    jobs = ([partial(_index_shard, path)] for path in paths)
    shards = [shard for group in read_ahead(jobs, default_workers()) for shard in group]
    if not any(len(shard.places) for shard in shards):
        raise no_images_error(spec, sum((shard.extensions for shard in shards), Counter()))
    return ShardIndex(shards, np.cumsum([len(shard.places) for shard in shards]))


def no_images_error(spec: str, extensions: Counter[str]) -> DataError:
    """Return the error for shards without images, which says what they hold instead."""
    listed = ", ".join(f"{number:,} × .{extension}" for extension, number in extensions.most_common(5))
    return DataError(
        f"{spec}: expected images (KEY.jpg, .png, .webp, …) in these shards, found "
        f"{listed or 'no samples at all'}. The extension is all behind the first dot of a name; "
        "other data can come from package.module:callable."
    )


def _index_shard(path: Path) -> IndexedShard:
    places, names, extensions = array("q"), bytearray(), Counter[str]()
    try:
        with path.open("rb") as file:
            members = ((member.name, member) for member in TarReader(file, str(path), path.stat().st_size))
            for sample in group_members(members, str(path)):
                extension = image_extension(sample.parts)
                if extension is None:
                    extensions.update(sample.parts.keys())
                    continue
                image, label = sample.parts[extension], sample.parts.get(LABEL_EXTENSION)
                places.extend((image.offset, image.size))
                places.extend((0, -1) if label is None else (label.offset, label.size))
                places.append(len(names))
                names += image.name.encode("utf-8", "surrogateescape") + b"\0"
    except OSError as error:
        raise DataError(f"{path}: the shard cannot be read: {error.strerror or error}.") from error
    table = np.frombuffer(places, np.int64).reshape(-1, 5)
    return IndexedShard(path, table, bytes(names), extensions)
