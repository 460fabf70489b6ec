"""Refusing a checkpoint whose files, or whose tensors in memory, changed after it was read."""

from __future__ import annotations

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import OutputError
from ckpt_tools.storage.compare import same_bytes
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.stamps import FileStamp, StoredCheckpoint, stamp_checkpoint_files
from ckpt_tools.storage.output.memory_mappings import FileMappings
from ckpt_tools.storage.reading import reread_checkpoint

__all__ = ["require_same_stamps", "require_unchanged"]

# From this many bytes on, asking the system for its mappings takes less time than comparing the
# tensors.
_LARGE = 1 << 26
_AGAIN = "Run again, on a file that nobody is writing to."


def require_unchanged(checkpoint: Checkpoint) -> tuple[FileStamp, ...]:
    """Raise OutputError if a checkpoint's files or tensors in memory changed since they were read.

    An output made of them would not match its source. Returns the files' stamps. Raises
    CheckpointError.
    """
    stamps = checkpoint.stamps if isinstance(checkpoint, StoredCheckpoint) else ()
    stamps = stamps or stamp_checkpoint_files(find_checkpoint_files(checkpoint.path))
    require_same_stamps(checkpoint, stamps)
    if changed := _find_changed_key(checkpoint):
        raise OutputError(
            f"{checkpoint.shown_path}: expected the tensors as they were read, found {changed} "
            f"changed in the file or in memory since. {_AGAIN}"
        )
    return stamps


def require_same_stamps(checkpoint: Checkpoint, stamps: tuple[FileStamp, ...]) -> None:
    """Raise OutputError if a checkpoint's files were written to after their stamps were taken."""
    if stamp_checkpoint_files(find_checkpoint_files(checkpoint.path)) != stamps:
        raise OutputError(
            f"{checkpoint.shown_path}: expected the file as it was read, found that it was written "
            f"to since. {_AGAIN}"
        )


def _find_changed_key(checkpoint: Checkpoint) -> str | None:
    """Return the first key whose tensor differs from a fresh reading.

    Memory that still maps the same place of the file is not compared: it is equal.
    """
    if checkpoint.module is not None:
        # The checkpoint was read with trust, and the code in it must not run a second time.
        return None
    stored = reread_checkpoint(checkpoint.path, weights=checkpoint.weights, prefix=checkpoint.prefix).tensors
    large = sum(tensor.nbytes for tensor in stored.values()) >= _LARGE
    mappings = FileMappings() if large else None
    for key, tensor in checkpoint.tensors.items():
        if key not in stored:
            return key
        is_mapped = mappings is not None and mappings.same_place(tensor, stored[key])
        if not is_mapped and not same_bytes(tensor, stored[key]):
            return key
    return next((key for key in stored if key not in checkpoint.tensors), None)
