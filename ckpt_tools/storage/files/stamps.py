"""What the files of a checkpoint were like when they were read, to notice a later change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files.checkpoint_files import CheckpointFiles

__all__ = ["FileStamp", "StoredCheckpoint", "stamp_checkpoint_files", "stamp_file"]


@dataclass(frozen=True)
class FileStamp:
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

    stamps: tuple[FileStamp, ...] = ()


def stamp_checkpoint_files(source: CheckpointFiles) -> tuple[FileStamp, ...]:
    """The stamps of a checkpoint's files, its index's last. Raises CheckpointError."""
    try:
        return tuple(map(stamp_file, (*source.files, *([source.index] if source.index else []))))
    except OSError as error:
        raise CheckpointError(
            f"{source.path}: cannot be opened ({error.strerror}). Check its permissions."
        ) from error


def stamp_file(path: Path) -> FileStamp:
    """The stamp of one file. Raises OSError."""
    stat = path.stat()
    return FileStamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
