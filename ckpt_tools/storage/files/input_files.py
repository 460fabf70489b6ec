"""The files that a checkpoint is read from, as far as names tell: no output may replace one."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.location import Location, LocationLike
from ckpt_tools.storage.files.folder_members import (
    INDEX_SUFFIX,
    is_checkpoint_related,
    read_shard_names,
)
from ckpt_tools.storage.files.sidecar import SIDECAR_NAMES, has_sidecars

__all__ = ["files_of_checkpoint"]


def files_of_checkpoint(place: LocationLike) -> tuple[Location, ...]:
    """Return the files of a checkpoint, with the shards of an index and the descriptions beside it.

    Nothing is fetched, and nothing is read but an index. Files that cannot be listed are left out.
    """
    location = Location.of(place)
    return tuple(map(location.with_path, _local_files(location)))


def _local_files(location: Location) -> tuple[Path, ...]:
    path = location.path
    try:
        if location.store is not None or not path.exists():
            return (path,)
        if path.is_dir():
            return (path, *(file for file in path.iterdir() if is_checkpoint_related(file.name)))
    except OSError:
        return (path,)
    names = [
        *(read_shard_names(path) if path.name.endswith(INDEX_SUFFIX) else ()),
        *(SIDECAR_NAMES if has_sidecars(path.name) else ()),
    ]
    return (path, *(path.parent / name for name in names))
