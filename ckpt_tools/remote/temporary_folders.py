"""Temporary folders: each is locked by the process that works in it, and what killed processes left is removed.

A process may be killed at any moment, so the next run removes the folders of processes that are no more. Whether a
process lives is told by a lock (``flock``) on a file in its folder: the kernel drops the lock with the last process
that holds the file open, whatever ended it. Process numbers and host names tell nothing here, because containers that
share a folder have the same ones.

A lock is certain only among processes on one kernel: some cluster file systems, and folders that virtual machines
share, keep locks to each machine. Names therefore begin with the identity of the running kernel. Folders of another
kernel (another machine, or this one before it was started anew) are removed only when nothing in them has changed for
a week.
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
except ImportError:  # Windows has no flock: nothing is ever swept there
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
_ATTEMPTS = 100  # at a folder that a sweeper takes for abandoned before it is locked
_PAUSE = 0.01  # seconds between them
_UNKNOWN_KERNEL = "0" * 16


def _kernel_identity() -> str:
    """16 hex digits that all processes on this running kernel share, containers included, and no others do.

    Zeros where the system does not tell. Source: ``man 5 proc``, /proc/sys/kernel/random/boot_id.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return _UNKNOWN_KERNEL
    return hashlib.sha256(boot).hexdigest()[:16]


_KERNEL = _kernel_identity()


def large_temporary_folder() -> Path:
    """Where large temporary files go: /tmp often is memory, of which there is none left by then."""
    large = Path("/var/tmp")
    usable = "TMPDIR" not in os.environ and os.access(large, os.W_OK)
    return large if usable else Path(tempfile.gettempdir())


def new_temporary_name() -> str:
    """A name that nothing else has, by which ``remove_abandoned_folders`` knows a temporary folder of this tool."""
    return f"ckpt-tools-{_KERNEL}-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class LockedFolder:
    """A temporary folder that no sweeper touches as long as this process, or a fork of it, holds its lock."""

    folder: Path
    descriptor: int  # of the locked file
    process: int  # that made it

    def file_mode(self) -> int:
        """The permissions that the umask, or the default access list of the place, leaves to new files."""
        return stat.S_IMODE(os.fstat(self.descriptor).st_mode)

    def remove_folder(self) -> None:
        """Remove the folder with everything in it, as far as the system allows, and let go of the lock.

        In a forked child this does nothing: the folder is its parent's, who may be alive.
        """
        if os.getpid() == self.process:
            _remove(self.folder, self.descriptor)


def create_locked_folder(folder: Path) -> LockedFolder:
    """Make a folder that only this user can enter, and lock it before anything is put into it.

    Raises OSError, also if there is something of that name. Where the file system knows no locks the folder is made
    all the same: no sweeper can lock it there either, so that it is never swept.
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
    """Lock a new folder, which is made again where a sweeper has removed it. Raises OSError."""
    for _ in range(_ATTEMPTS):
        descriptor = _lock_new(folder)
        if descriptor is not None:
            return descriptor
        # A sweeper came between the making of the folder and its lock, and is removing it, or has.
        time.sleep(_PAUSE)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            _require_own_folder(folder)
    raise OSError(errno.EBUSY, "another process keeps removing it", str(folder))


def _lock_new(folder: Path) -> int | None:
    """Open and lock a new folder's lock file; None if a sweeper holds the lock or has removed the file."""
    lock = folder / LOCK_NAME
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except (FileNotFoundError, PermissionError):  # removed, or made by a sweeper of another user
        return None
    with contextlib.suppress(FileNotFoundError):
        if _take_lock(descriptor) is not False and os.path.samestat(os.fstat(descriptor), lock.lstat()):
            return descriptor
    os.close(descriptor)
    return None


def _require_own_folder(folder: Path) -> None:
    """Raise FileExistsError unless a path is a folder of this user and no link to one."""
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


def _take_lock(descriptor: int) -> bool | None:
    """Lock an open file without waiting: whether that went well, or None where there are no locks."""
    if fcntl is None:
        return None
    try:
        # Not inherited by programs that this process starts: Python opens files with O_CLOEXEC (PEP 446).
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_abandoned_folders(folder: Path) -> None:
    """Remove the temporary folders in ``folder`` whose processes are no more, as far as the system allows.

    A folder of a living process is never removed. Links, and files of these names, are left alone.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is not None:
                with contextlib.suppress(OSError):
                    _sweep_one(path, name[1])


def _sweep_one(path: Path, kernel: str) -> None:
    """Remove a temporary folder if it is abandoned. Raises OSError, also for what is no folder."""
    if fcntl is None or not stat.S_ISDIR(path.lstat().st_mode):
        return
    if (kernel != _KERNEL or kernel == _UNKNOWN_KERNEL) and time.time() - _last_change(path) < _WEEK:
        return
    within = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # The lock file is made where it is missing: the owner, if there is one, finds it locked and starts anew.
        descriptor = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=within)
        there = os.stat(LOCK_NAME, dir_fd=within, follow_symlinks=False)
        if _take_lock(descriptor) and os.path.samestat(os.fstat(descriptor), there):
            _remove(path, descriptor, within)
        else:
            os.close(descriptor)
    finally:
        os.close(within)


def _last_change(folder: Path) -> float:
    """When anything in a folder was last written to, in seconds since 1970. Raises OSError."""
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _remove(folder: Path, descriptor: int, within: int | None = None) -> None:
    """Empty a folder whose lock this process holds, and remove it.

    ``within``: the open folder, by which a folder that others may replace with a link is emptied all the same. The
    lock file goes last, so that nothing is removed without the lock. It is closed before the folder is removed,
    because NFS keeps a file that is still open under another name.
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
