"""Temporary folders that a process locks, and the removal of those that killed processes left.

A process may be killed at any moment, so the next run removes the folders of processes that have
ended. A lock (``flock``) on a file in the folder shows whether its process lives: the kernel drops
the lock with the last process that holds the file open, whatever ended it. Process numbers and host
names are of no use, because containers that share a folder have the same ones.

A lock is certain only among processes on one kernel: some cluster file systems, and folders that
virtual machines share, keep locks to each machine. Names therefore begin with the identity of the
running kernel. Folders of another kernel (another machine, or this one before a restart) are
removed only when nothing in them has changed for a week.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: abandoned folders are never removed there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "LockedFolder",
    "create_locked_folder",
    "large_temporary_folder",
    "new_temporary_name",
    "remove_abandoned_folders",
]

LOCK_NAME = "lock"  # the locked file in a temporary folder
_NAME = re.compile(r"\.?ckpt-tools-([0-9a-f]{16})-[0-9a-f]{16}(\.tmp)?")
_WEEK = 7 * 24 * 3600.0  # seconds
_ATTEMPTS = 100  # to make a folder that other processes remove before it is locked
_PAUSE = 0.01  # seconds between them
_UNKNOWN_KERNEL = "0" * 16


def _kernel_identity() -> str:
    """Return 16 hex digits that identify the running kernel.

    All processes on it, also those in containers, get the same digits, and no others do. They are
    zeros where the system does not tell. Source: ``man 5 proc``, /proc/sys/kernel/random/boot_id.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return _UNKNOWN_KERNEL
    return hashlib.sha256(boot_id).hexdigest()[:16]


_KERNEL = _kernel_identity()


def large_temporary_folder() -> Path:
    """Return the folder for large temporary files, TMPDIR or /var/tmp.

    /tmp often is memory, which the model and its data need.
    """
    large = Path("/var/tmp")
    usable = "TMPDIR" not in os.environ and os.access(large, os.W_OK)
    return large if usable else Path(tempfile.gettempdir())


def new_temporary_name() -> str:
    """Return a unique name, by which ``remove_abandoned_folders`` recognises our folders."""
    return f"ckpt-tools-{_KERNEL}-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class LockedFolder:
    """A temporary folder that nobody removes while this process, or a fork, holds its lock."""

    folder: Path
    descriptor: int  # of the locked file
    process: int  # the number of the process that made it

    def file_mode(self) -> int:
        """Return the permissions of new files here, after the umask or a default access list.

        They are those of the lock file, which was made with all permissions that a file can have.
        """
        return stat.S_IMODE(os.fstat(self.descriptor).st_mode)

    def remove_folder(self) -> None:
        """Remove the folder with everything in it, as far as the system allows, and its lock.

        In a forked child this does nothing: the folder belongs to the parent, which may be alive.
        """
        if os.getpid() == self.process:
            _remove(self.folder, self.descriptor)


def create_locked_folder(folder: Path) -> LockedFolder:
    """Make a folder that only this user can enter, and lock it before anything is put into it.

    On a file system without locks the folder is made, too: no other process can lock it there
    either, so that it is never taken for abandoned.

    Raises OSError, also if something has that name already.
    """
    folder.mkdir(mode=0o700)
    try:
        return LockedFolder(folder, _lock_or_make_again(folder), os.getpid())
    except BaseException:  # an interrupt, too
        with contextlib.suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
            folder.rmdir()
        raise


def _lock_or_make_again(folder: Path) -> int:
    """Lock a new folder, and make it again if another process removes it before. Raises OSError."""
    for _ in range(_ATTEMPTS):
        descriptor = _lock_new(folder)
        if descriptor is not None:
            return descriptor
        # Between mkdir and flock the folder looks abandoned: another process is removing it.
        time.sleep(_PAUSE)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            _require_own_folder(folder)
    raise OSError(errno.EBUSY, "another process keeps removing it", str(folder))


def _lock_new(folder: Path) -> int | None:
    """Open and lock the lock file of a new folder, and return its descriptor.

    Returns None if a process that removes the folder holds the lock, or has removed the file.
    """
    lock = folder / LOCK_NAME
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except (FileNotFoundError, PermissionError):  # removed, or made by a process of another user
        return None
    with contextlib.suppress(FileNotFoundError):
        if _take_lock(descriptor) is not False and os.path.samestat(os.fstat(descriptor), lock.lstat()):
            return descriptor
    os.close(descriptor)
    return None


def _require_own_folder(folder: Path) -> None:
    """Raise FileExistsError unless a path is a folder of this user and no link to one."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


def _take_lock(descriptor: int) -> bool | None:
    """Try to lock an open file without waiting; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        # Programs that this process starts do not inherit the lock: Python opens files with
        # O_CLOEXEC (PEP 446).
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_abandoned_folders(folder: Path) -> None:
    """Remove temporary folders in ``folder`` whose processes have ended, as far as possible.

    A folder of a living process is never removed. Links, and files with such names, stay.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is not None:
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(path, name[1])


def _remove_if_abandoned(path: Path, kernel: str) -> None:
    """Remove a temporary folder if no process holds its lock. Raises OSError."""
    if fcntl is None or not stat.S_ISDIR(path.lstat().st_mode):
        return
    if (kernel != _KERNEL or kernel == _UNKNOWN_KERNEL) and time.time() - _last_change(path) < _WEEK:
        return
    within = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # A missing lock file is made: an owner that has not locked its new folder yet finds the
        # file locked and makes the folder again.
        descriptor = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=within)
        status = os.stat(LOCK_NAME, dir_fd=within, follow_symlinks=False)
        if _take_lock(descriptor) and os.path.samestat(os.fstat(descriptor), status):
            _remove(path, descriptor, within)
        else:
            os.close(descriptor)
    finally:
        os.close(within)


def _last_change(folder: Path) -> float:
    """Return when anything in a folder was last written to (seconds since 1970). Raises OSError."""
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _remove(folder: Path, descriptor: int, within: int | None = None) -> None:
    """Empty a folder whose lock this process holds, and remove it.

    ``within`` is the descriptor of the open folder, for a folder that somebody else may replace by
    a link meanwhile. The lock file is removed last, so that nothing is removed without the lock. It
    is closed before the folder is removed, because NFS keeps an open file under another name.
    """
    place = folder if within is None else Path()
    try:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder if within is None else within):  # noqa: PTH208 - of an open folder
                if name != LOCK_NAME:
                    _remove_entry(place / name, within)
            os.unlink(place / LOCK_NAME, dir_fd=within)
    finally:
        os.close(descriptor)
    with contextlib.suppress(OSError):
        if fcntl is None:  # Windows removes no file that is open
            (folder / LOCK_NAME).unlink(missing_ok=True)
        folder.rmdir()


def _remove_entry(path: Path, within: int | None) -> None:
    try:
        os.unlink(path, dir_fd=within)
    except OSError:  # a folder
        shutil.rmtree(path, ignore_errors=True, dir_fd=within)
