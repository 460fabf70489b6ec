"""Local copies of remote files: whole, or only their beginning."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckpt_tools.errors import RemoteError
from ckpt_tools.remote.mirror import find_mirror
from ckpt_tools.remote.remote_store import (
    RemotePath,
    is_access_refused_error,
    is_missing_file_error,
    transfer_callback,
    translate_store_errors,
)
from ckpt_tools.remote.temporary_folders import new_temporary_name

__all__ = ["fetch_beginning", "fetch_file", "iterate_remote_bytes", "read_remote_file", "remove_copy"]

_PIECE = 1 << 24  # bytes of a remote file in memory at a time
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def fetch_file(path: Path, *, optional: bool = False) -> Path:
    """Copy a remote file to its place, if it is not there yet, and return the path; a local one is left alone.

    ``optional``: a file that is not there, or that one may not see, is no error. Raises RemoteError; then nothing new
    is at the place.
    """
    mirror = find_mirror(path)
    if mirror is None or path in mirror.present:
        return path
    remote = mirror.remote(path)
    try:
        size = remote.size()
        with mirror.watch(str(remote), size) as seen:
            mirror.make_folder(path.parent)
            _copy(remote, path, size, transfer_callback(seen))
    except RemoteError as error:
        known = error.__cause__ or error
        if not (optional and (is_missing_file_error(known) or is_access_refused_error(known))):
            raise
        path.unlink(missing_ok=True)  # it may have been outlined
    else:
        mirror.present.add(path)
    return path


def fetch_beginning(path: Path, count: int = 0, size: int | None = None) -> bytes | None:
    """The first ``count`` bytes of a file; a remote one then has its size and this beginning at its place.

    None if there is no such file. ``size``, if it is known, spares asking for it. What is at the place as a whole
    stays. Raises RemoteError, OSError for local files.
    """
    mirror = find_mirror(path)
    if mirror is None or path in mirror.present:
        return _beginning(path, count)
    remote = mirror.remote(path)
    try:
        size = remote.size() if size is None else size
        with translate_store_errors(remote.url):
            head: bytes = remote.fs.cat_file(remote.path, 0, count) if count and size != 0 else b""
    except RemoteError as error:
        if is_missing_file_error(error.__cause__ or error):
            return None
        raise
    mirror.make_folder(path.parent)
    with _new_file(remote, path) as part, part.open("wb") as file:
        file.write(head[:count])
        with contextlib.suppress(OSError):  # a store may list sizes that no file system takes
            file.truncate(max(size or 0, len(head[:count])))  # a hole, which takes no room
    return head[:count]


def read_remote_file(path: Path, limit: int) -> bytes | None:
    """What a remote file holds now, up to one byte more than ``limit``; None if there is no such file.

    Nothing is written to its place on this machine. Raises RemoteError.
    """
    mirror = find_mirror(path)
    assert mirror is not None
    remote = mirror.remote(path)
    remote.fs.invalidate_cache()
    try:
        if remote.is_folder():
            return None  # whoever writes says best what is wrong with it
    except RemoteError as error:
        if is_missing_file_error(error.__cause__ or error):
            return None
        raise
    with translate_store_errors(remote.url):
        content: bytes = remote.fs.cat_file(remote.path, 0, limit + 1)
    return content


def iterate_remote_bytes(path: Path) -> Iterator[bytes]:
    """What a remote file holds now, from beginning to end, in pieces of which no copy is kept. Raises RemoteError."""
    mirror = find_mirror(path)
    assert mirror is not None
    remote, at = mirror.remote(path), 0
    while True:
        with translate_store_errors(remote.url):
            # Pieces by their places: a store that loses the connection is asked again for one piece only.
            size = int(remote.fs.info(remote.path)["size"])
            piece: bytes = remote.fs.cat_file(remote.path, at, min(at + _PIECE, size)) if at < size else b""
        if not piece:
            return
        yield piece
        at += len(piece)


def remove_copy(path: Path) -> None:
    """Remove the copy of a remote file; a local file is left alone."""
    mirror = find_mirror(path)
    if mirror is not None:
        mirror.present.discard(path)
        path.unlink(missing_ok=True)


def _beginning(path: Path, count: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        return None


def _copy(remote: RemotePath, path: Path, size: int | None, callback: Any) -> None:
    if size is not None and size > shutil.disk_usage(path.parent).free:
        raise _no_room(remote, path.parent, size)
    with _new_file(remote, path) as part, translate_store_errors(remote.url):
        _download(remote, part, size, callback)


@contextlib.contextmanager
def _new_file(remote: RemotePath, path: Path) -> Iterator[Path]:
    """A file that was not there, and which takes the name of a place at the end; removed if the block fails.

    Clients of stores open what they write to by its name: it must be a file of ours already, and no link. Raises
    RemoteError where the file system refuses.
    """
    part = path.with_name(new_temporary_name())
    try:
        part.open("xb").close()
        yield part
        os.replace(part, path)
    except OSError as error:
        raise RemoteError(
            f"{remote}: its copy on this machine cannot be written ({error.strerror}). Rename it if its name is "
            "unusual, or set TMPDIR to a folder of another file system."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _download(remote: RemotePath, part: Path, size: int | None, callback: Any) -> None:
    """Raises RemoteError if the disk is full, OSError for a file that ends early, and whatever the store raises."""
    try:
        remote.fs.get_file(remote.path, str(part), callback=callback)
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(remote, part.parent, size) from error
        raise
    found = part.lstat().st_size
    if size is not None and found != size:
        raise OSError(errno.EIO, f"{found:,} bytes came, of {size:,}")


def _no_room(remote: RemotePath, folder: Path, size: int | None) -> RemoteError:
    needed = "more room" if size is None else f"{size:,} bytes"
    return RemoteError(
        f"{remote}: its copy on this machine needs {needed}, {shutil.disk_usage(folder).free:,} bytes are free in the "
        "folder of temporary files. Set TMPDIR to a folder with more room."
    )
