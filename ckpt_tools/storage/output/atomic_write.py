"""Writing a file that appears under its name in one step, or leaves no trace."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ckpt_tools.errors import OutputError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.machine.temporary_folders import (
    create_locked_folder,
    new_temporary_name,
    remove_abandoned_folders,
)
from ckpt_tools.remote.uploads import check_remote_target, upload_file
from ckpt_tools.storage.output.permissions import set_permissions

__all__ = ["check_target", "deliver_file", "sync_to_disk", "write_atomically"]


@contextlib.contextmanager
def write_atomically(
    place: LocationLike,
    *,
    overwrite: bool,
    sources: Sequence[Path] = (),
    may_replace: Callable[[], bool] | None = None,
) -> Iterator[Path]:
    """Give a temporary path; what the block writes there takes the target's name at the end.

    The temporary path lies beside the target, in a folder of its own that only this user can enter,
    so that nobody reads the file before it has its permissions: those that new files have here,
    without those that any of ``sources`` denies. If the block raises anything, KeyboardInterrupt
    included, the folder is removed and the target stays as it was. A target behind a URL is
    uploaded at the end, see ``remote/uploads.py``.

    A target that appears meanwhile is replaced only with ``overwrite``. ``may_replace``, if it is
    given, decides that instead, just before the target is replaced. It raises an error where the
    file must not be written at all.

    Raises OutputError for a target that is taken, OSError if the file system refuses.
    """
    location = Location.of(place)
    target = location.path
    check_target(location, overwrite=overwrite)
    with location.urls_in_errors():
        claimed = create_locked_folder(target.with_name(f".{new_temporary_name()}.tmp"))
        try:
            # Not the target's name: libraries do not take every name.
            temporary = claimed.folder / "output"
            yield temporary
            set_permissions(temporary, claimed.file_mode(), sources)
            sync_to_disk(temporary)
            replace = overwrite if may_replace is None else may_replace()
            deliver_file(temporary, location, overwrite=replace)
        finally:
            claimed.remove_folder()
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        sync_to_disk(target.parent)


def deliver_file(file: Path, target: Location, *, overwrite: bool) -> None:
    """Move a finished file to its target in one step, or upload it; then ``file`` is gone.

    Raises OutputError for a target that is taken if ``overwrite`` is not set, OSError, RemoteError.
    """
    if target.store is None:
        _move(file, target.path, overwrite=overwrite)
    else:
        upload_file(file, target.store, target.path, overwrite=overwrite)


def check_target(place: LocationLike, *, overwrite: bool) -> None:
    """Raise OutputError at once for a target that could not be written at the end.

    What killed processes left in the folder is removed. Raises RemoteError for a remote target.
    """
    location = Location.of(place)
    target = location.path
    if location.store is not None:
        check_remote_target(location.store, target, overwrite=overwrite)
        return
    try:
        if target.is_dir():
            raise OutputError(
                f"{target}: expected the name of a file to write, found a folder. Add a file name."
            )
        if target.exists() and not target.is_file():
            raise OutputError(
                f"{target}: expected the name of a file to write, found a device or pipe. Choose another."
            )
        if not target.parent.is_dir():
            raise OutputError(
                f"{target}: expected the folder {target.parent} to exist, found none. Create it first."
            )
        if not os.access(target.parent, os.W_OK):
            raise OutputError(
                f"{target}: the folder {target.parent} is read-only. Choose another with --output."
            )
        remove_abandoned_folders(target.parent)
        if not overwrite and os.path.lexists(target):
            raise _target_exists_error(target)
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written there ({error.strerror}). Choose another name."
        ) from error


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file or a folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target_exists_error(target: Path) -> OutputError:
    return OutputError(
        f"{target}: expected no such file, found one. Pass --overwrite to replace it, or another name."
    )


def _move(temporary: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        # Unlike a rename, this fails if the name was taken meanwhile.
        os.link(temporary, target)
    except FileExistsError:
        raise _target_exists_error(target) from None
    except OSError:  # a file system without hard links
        # A file that is created in between is lost. Reserving the name instead would leave an empty
        # output if this process is killed.
        if os.path.lexists(target):
            raise _target_exists_error(target) from None
        os.replace(temporary, target)
