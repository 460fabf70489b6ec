"""Stamps of files: their state at the time they were read, to notice a later change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files.checkpoint_files import CheckpointFiles

__all__ = ["FileStamp", "StoredCheckpoint", "stamp_checkpoint_files", "stamp_file"]


@dataclass(frozen=True)
class FileStamp:
    """The identity of one file.

    A file that was written anew has another inode, and one that was written in place another time.
    """

    device: int
    inode: int
    size: int  # bytes
    modified: int  # ns


@dataclass(frozen=True)
class StoredCheckpoint(Checkpoint):
    """A checkpoint from files; ``stamps`` were taken just before the files were read.

    Its tensors alone would not show a change: those that are memory-mapped hold whatever the file
    holds now.
    """

    stamps: tuple[FileStamp, ...] = ()


def stamp_checkpoint_files(source: CheckpointFiles) -> tuple[FileStamp, ...]:
    """Return the stamps of a checkpoint's files, that of its index last. Raises CheckpointError."""
    try:
        return tuple(map(stamp_file, (*source.files, *([source.index] if source.index else []))))
    except OSError as error:
        raise CheckpointError(
            f"{source.path}: cannot be opened ({error.strerror}). Check its permissions."
        ) from error


def stamp_file(path: Path) -> FileStamp:
    """Return the stamp of one file. Raises OSError."""
    stat = path.stat()
    return FileStamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
