"""The files that a checkpoint is read from, as far as names tell: no output may replace one."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.remote.mirror import is_remote
from ckpt_tools.storage.files.folder_members import (
    INDEX_SUFFIX,
    is_checkpoint_related,
    read_shard_names,
)
from ckpt_tools.storage.files.sidecar import SIDECAR_NAMES, has_sidecars

__all__ = ["files_of_checkpoint"]


def files_of_checkpoint(path: Path) -> tuple[Path, ...]:
    """Return the files of a checkpoint, with the shards of an index and the descriptions beside it.

    Nothing is fetched, and nothing is read but an index. Files that cannot be listed are left out.
    """
    try:
        if is_remote(path) or not path.exists():
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
