"""The files that a checkpoint is read from, as far as names tell."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.remote.mirror import is_remote
from ckpt_tools.storage.files.members import INDEX, is_of_interest, shard_names
from ckpt_tools.storage.files.sidecar import SIDECARS, has_sidecars

__all__ = ["files_of_checkpoint"]


def files_of_checkpoint(path: Path) -> tuple[Path, ...]:
    """A checkpoint's file, or those of its folder; shards that an index names; what stands beside and describes it.

    Nothing is fetched, and nothing is read but an index. What cannot be listed is left out.
    """
    try:
        if is_remote(path) or not path.exists():
            return (path,)
        if path.is_dir():
            return (path, *(file for file in path.iterdir() if is_of_interest(file.name)))
    except OSError:
        return (path,)
    names = [*(shard_names(path) if path.name.endswith(INDEX) else ()), *(SIDECARS if has_sidecars(path.name) else ())]
    return (path, *(path.parent / name for name in names))
