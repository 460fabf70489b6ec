"""Putting a finished file in place in one step, or leaving no trace."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ckpt_tools.errors import OutputError
from ckpt_tools.remote.delivery import check_remote, deliver
from ckpt_tools.remote.mirror import is_remote
from ckpt_tools.remote.scratch import abandoned, new_name

__all__ = ["check_target", "new_file", "new_folder", "sweep", "sync"]


@contextlib.contextmanager
def new_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary path in the target's folder; what was written there takes the target's name at the end.

    If the block raises anything, KeyboardInterrupt included, the temporary file is removed and the target
    stays as it was. Without ``overwrite`` a target that appears meanwhile is not replaced.
    Raises OutputError for a target that is taken, OSError if the file system refuses.
    """
    check_target(target, overwrite=overwrite)
    temporary = target.with_name(f".{new_name()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # whoever may read files made here may read this one
        sync(temporary)
        (deliver if is_remote(target) else _move)(temporary, target, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        sync(target.parent)


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder, removed at the end. Raises OSError."""
    folder = parent / f".{new_name()}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that were killed while writing have left in a folder, as far as we may."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.suffix == ".tmp" and abandoned(path.name):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse at once what cannot be written at the end; what killed processes left in the folder is removed.

    Raises OutputError, and RemoteError for a remote target.
    """
    if is_remote(target):
        check_remote(target, overwrite=overwrite)
        return
    try:
        if target.is_dir():
            raise OutputError(f"{target}: expected the name of a file to write, found a folder. Add a file name.")
        if target.exists() and not target.is_file():
            raise OutputError(
                f"{target}: expected the name of a file to write, found a device or pipe. Choose another."
            )
        if not target.parent.is_dir():
            raise OutputError(f"{target}: expected the folder {target.parent} to exist, found none. Create it first.")
        if not os.access(target.parent, os.W_OK):
            raise OutputError(f"{target}: the folder {target.parent} is read-only. Choose another with --output.")
        sweep(target.parent)
        if not overwrite and os.path.lexists(target):
            raise _taken(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written there ({error.strerror}). Choose another name.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _taken(target: Path) -> OutputError:
    return OutputError(f"{target}: expected no such file, found one. Pass --overwrite to replace it, or another name.")


def _move(temporary: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, fails if the name was taken meanwhile
    except FileExistsError:
        raise _taken(target) from None
    except OSError:  # a file system without hard links
        # A look, then a rename: to reserve the name would leave an empty output if we are killed in between.
        if os.path.lexists(target):
            raise _taken(target) from None
        os.replace(temporary, target)
