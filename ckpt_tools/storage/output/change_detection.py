"""Whether a checkpoint in memory is still what its files hold."""

from __future__ import annotations

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import OutputError
from ckpt_tools.storage.compare import same_bytes
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.stamps import FileStamp, StoredCheckpoint, stamp_checkpoint_files
from ckpt_tools.storage.output.memory_mappings import FileMappings, read_file_mappings
from ckpt_tools.storage.reading import reread_checkpoint

__all__ = ["require_same_stamps", "require_unchanged"]

_LARGE = 1 << 26  # bytes, which take longer to compare than it takes the system to tell about mappings
_AGAIN = "Run again, on a file that nobody is writing to."


def require_unchanged(checkpoint: Checkpoint) -> tuple[FileStamp, ...]:
    """Refuse if a checkpoint's files or its tensors in memory are no longer what was read; the files' stamps.

    An output would not match its source. Raises OutputError, CheckpointError.
    """
    stamps = checkpoint.stamps if isinstance(checkpoint, StoredCheckpoint) else ()
    stamps = stamps or stamp_checkpoint_files(find_checkpoint_files(checkpoint.path))
    require_same_stamps(checkpoint, stamps)
    if changed := _find_changed_key(checkpoint):
        raise OutputError(
            f"{checkpoint.shown_path}: expected the tensors as they were read, found {changed} changed in the file "
            f"or in memory since. {_AGAIN}"
        )
    return stamps


def require_same_stamps(checkpoint: Checkpoint, stamps: tuple[FileStamp, ...]) -> None:
    """Refuse if a checkpoint's files were written to after their stamps were taken. Raises OutputError."""
    if stamp_checkpoint_files(find_checkpoint_files(checkpoint.path)) != stamps:
        raise OutputError(
            f"{checkpoint.shown_path}: expected the file as it was read, found that it was written to since. {_AGAIN}"
        )


def _find_changed_key(checkpoint: Checkpoint) -> str | None:
    """The first key whose tensor differs from a fresh reading; memory that still maps the file needs none."""
    if checkpoint.module is not None:
        return None  # read with trust; it is not executed a second time
    stored = reread_checkpoint(checkpoint.path, weights=checkpoint.weights, prefix=checkpoint.prefix).tensors
    large = sum(tensor.nbytes for tensor in stored.values()) >= _LARGE
    mappings = read_file_mappings() if large else FileMappings()
    for key, tensor in checkpoint.tensors.items():
        if key not in stored or not (mappings.same_place(tensor, stored[key]) or same_bytes(tensor, stored[key])):
            return key
    return next((key for key in stored if key not in checkpoint.tensors), None)
