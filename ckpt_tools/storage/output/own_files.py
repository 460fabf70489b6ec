"""Manifests and reports, which this tool appends to or replaces: they must be its own files.

A folder from somebody else may hold a foreign file of the right name, a link that leads elsewhere,
or a second name of a file that matters. Every manifest and report is therefore checked here before
anything is written to it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import OutputError, UsageError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.paths import identity
from ckpt_tools.remote.local_copies import read_remote_file

__all__ = [
    "OwnFileKind",
    "open_own_file",
    "read_own_file",
    "require_distinct_file",
    "require_own_content",
]

_MAX_BYTES = 1 << 30  # of a file that is read
# O_NOFOLLOW refuses a link. Without O_NONBLOCK, opening a pipe that takes the file's place after it
# was checked would wait for ever.
_ALWAYS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class OwnFileKind:
    """A kind of file that this tool writes.

    It has a name for messages, the option that names such a file, and a test of the content.
    """

    name: str
    option: str
    is_own: Callable[[bytes], bool]


def require_distinct_file(
    place: LocationLike, kind: OwnFileKind, job_files: Iterable[LocationLike | None]
) -> None:
    """Raise UsageError for a file that is also another file of the job, under whatever name.

    Files are compared by device and inode, those that do not exist yet by their resolved paths.
    """
    location = Location.of(place)
    file = _identify(location.path)
    for other in job_files:
        if other is not None and _identify(Location.of(other).path) == file:
            raise UsageError(
                f"{kind.option} {location}: expected a file of its own, found another file of this "
                f"job ({other}). Rename it."
            )


def _identify(path: Path) -> object:
    """Return something that is equal for all names of one file."""
    return identity(path) or os.path.realpath(path)


def read_own_file(place: LocationLike, kind: OwnFileKind) -> bytes | None:
    """Return the content of a file that this tool wrote, or of an empty one.

    This is None if there is no such file. Raises OutputError for a link, a file with several names,
    anything that is no file, one that cannot be read, and one that something else wrote. Raises
    RemoteError.
    """
    location = Location.of(place)
    if location.store is None:
        content = _read_local_content(location.path, kind)
    else:
        content = read_remote_file(location.store, location.path, _MAX_BYTES)
    if content is not None:
        require_own_content(location, kind, content)
    return content


def require_own_content(location: LocationLike, kind: OwnFileKind, content: bytes) -> None:
    """Raise OutputError for content that another program wrote. An empty file belongs to nobody."""
    if content and (len(content) > _MAX_BYTES or not kind.is_own(content)):
        raise OutputError(
            f"{location}: expected no file, or {kind.name} as ckpt-fix wrote it, found another "
            f"file. It stays as it is; give another name with {kind.option}."
        )


def _read_local_content(path: Path, kind: OwnFileKind) -> bytes | None:
    try:
        descriptor = open_own_file(path, kind, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise _unusable_file_error(path, kind, str(error.strerror)) from error


def open_own_file(path: Path, kind: OwnFileKind, flags: int) -> int:
    """Open a local file and return its descriptor.

    The file exists, or is created with the flags ``O_CREAT | O_EXCL``. No link is followed. Raises
    OutputError for a link, a file with several names, anything that is no file, and what the system
    refuses. Raises FileNotFoundError and FileExistsError.
    """
    try:
        if not flags & os.O_EXCL:
            # This is checked before it is opened, because opening a device may start it.
            _require_plain(path, path.lstat(), kind)
        descriptor = os.open(path, flags | _ALWAYS, 0o666)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        problem = "a link" if error.errno == errno.ELOOP else str(error.strerror)
        raise _unusable_file_error(path, kind, problem) from error
    try:
        # Another file may have taken the name since the first check; this one is about what was
        # opened.
        _require_plain(path, os.fstat(descriptor), kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_plain(path: Path, status: os.stat_result, kind: OwnFileKind) -> None:
    """Raise OutputError for anything but a file with a single name."""
    if stat.S_ISLNK(status.st_mode):
        raise _unusable_file_error(path, kind, "a link")
    if stat.S_ISDIR(status.st_mode):
        raise _unusable_file_error(path, kind, "a folder")
    if not stat.S_ISREG(status.st_mode):
        raise _unusable_file_error(path, kind, "a device or pipe")
    if status.st_nlink > 1:
        raise _unusable_file_error(path, kind, f"a file with {status.st_nlink} names (hard links)")


def _unusable_file_error(path: Path, kind: OwnFileKind, problem: str) -> OutputError:
    return OutputError(
        f"{path}: expected no file, or {kind.name} as ckpt-fix wrote it, found: {problem}. "
        f"Nothing was written to it; give another name with {kind.option}."
    )
