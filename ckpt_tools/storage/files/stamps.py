"""What the files of a checkpoint were like when they were read, to notice a later change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files.checkpoint_files import Source

__all__ = ["Stamp", "StoredCheckpoint", "stamp_of", "take_stamps"]


@dataclass(frozen=True)
class Stamp:
    """One file's identity. A file written anew has another inode, one written in place another time."""

    device: int
    inode: int
    size: int  # bytes
    modified: int  # ns


@dataclass(frozen=True)
class StoredCheckpoint(Checkpoint):
    """A checkpoint from files; ``stamps`` are theirs from just before they were read.

    Its tensors cannot tell of a change: mapped ones show whatever the file holds now.
    """

    stamps: tuple[Stamp, ...] = ()


def take_stamps(source: Source) -> tuple[Stamp, ...]:
    """The stamps of a checkpoint's files, its index's last. Raises CheckpointError."""
    try:
        return tuple(map(stamp_of, (*source.files, *([source.index] if source.index else []))))
    except OSError as error:
        raise CheckpointError(f"{source.path}: cannot be opened ({error.strerror}). Check its permissions.") from error


def stamp_of(path: Path) -> Stamp:
    """The stamp of one file. Raises OSError."""
    stat = path.stat()
    return Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
