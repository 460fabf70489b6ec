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
from ckpt_tools.machine.temporary_folders import new_temporary_name
from ckpt_tools.remote.mirror import MirroredStore
from ckpt_tools.remote.remote_store import (
    RemotePath,
    is_access_refused_error,
    is_missing_file_error,
    transfer_callback,
    translate_store_errors,
)

__all__ = [
    "fetch_beginning",
    "fetch_file",
    "iterate_remote_bytes",
    "read_remote_file",
    "remove_copy",
]

_PIECE = 1 << 24  # bytes of a remote file in memory at a time
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def fetch_file(store: MirroredStore, path: Path, *, optional: bool = False) -> Path:
    """Copy a remote file to ``path``, unless its copy is there, and return the path.

    ``optional``: a file that does not exist, or that the user may not read, is no error.

    Raises RemoteError; then nothing new is at the path.
    """
    if path in store.fetched:
        return path
    remote = store.remote_path(path)
    try:
        size = remote.size()
        with store.mirror.watch(str(remote), size) as report_bytes:
            store.mirror.make_folder(path.parent)
            _copy(remote, path, size, transfer_callback(report_bytes))
    except RemoteError as error:
        cause = error.__cause__ or error
        if not (optional and (is_missing_file_error(cause) or is_access_refused_error(cause))):
            raise
        path.unlink(missing_ok=True)  # an outline of the file may be there
    else:
        store.fetched.add(path)
    return path


def fetch_beginning(
    store: MirroredStore, path: Path, count: int = 0, size: int | None = None
) -> bytes | None:
    """Return the first ``count`` bytes of a remote file, and write them to its copy.

    The copy has the size of the whole file, with a hole in the place of what is not fetched. A
    complete copy stays as it is. ``size``: the file's size in bytes, if a listing has told it.

    Returns None if there is no such file. Raises RemoteError.
    """
    if path in store.fetched:
        return _read_beginning(path, count)
    remote = store.remote_path(path)
    try:
        size = remote.size() if size is None else size
        with translate_store_errors(remote.url):
            # Some stores refuse to read a range of an empty file.
            has_content = count and size != 0
            head: bytes = remote.fs.cat_file(remote.path, 0, count) if has_content else b""
    except RemoteError as error:
        if is_missing_file_error(error.__cause__ or error):
            return None
        raise
    store.mirror.make_folder(path.parent)
    with _new_file(remote, path) as part, part.open("wb") as file:
        file.write(head[:count])
        with contextlib.suppress(OSError):  # a store may list sizes that no file system takes
            file.truncate(max(size or 0, len(head[:count])))  # a hole takes no room
    return head[:count]


def read_remote_file(store: MirroredStore, path: Path, limit: int) -> bytes | None:
    """Read what a remote file holds now, at most ``limit + 1`` bytes; no copy is written.

    Returns None if there is no such file, or if a folder has its name: the check of the output
    refuses that with a better message. Raises RemoteError.
    """
    remote = store.remote_path(path)
    remote.fs.invalidate_cache()
    try:
        if remote.is_folder():
            return None
    except RemoteError as error:
        if is_missing_file_error(error.__cause__ or error):
            return None
        raise
    with translate_store_errors(remote.url):
        content: bytes = remote.fs.cat_file(remote.path, 0, limit + 1)
    return content


def iterate_remote_bytes(store: MirroredStore, path: Path) -> Iterator[bytes]:
    """Read a remote file from beginning to end in pieces; no copy is kept. Raises RemoteError."""
    remote, position = store.remote_path(path), 0
    while True:
        with translate_store_errors(remote.url):
            # Each piece is a request of its own, so that a lost connection costs one piece only.
            size = int(remote.fs.info(remote.path)["size"])
            stop = min(position + _PIECE, size)
            piece: bytes = remote.fs.cat_file(remote.path, position, stop) if position < size else b""
        if not piece:
            return
        yield piece
        position += len(piece)


def remove_copy(store: MirroredStore, path: Path) -> None:
    """Remove the copy of a remote file."""
    store.fetched.discard(path)
    path.unlink(missing_ok=True)


def _read_beginning(path: Path, count: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        return None


def _copy(remote: RemotePath, path: Path, size: int | None, callback: Any) -> None:
    if size is not None and size > shutil.disk_usage(path.parent).free:
        raise _no_room_error(remote, path.parent, size)
    with _new_file(remote, path) as part, translate_store_errors(remote.url):
        _download(remote, part, size, callback)


@contextlib.contextmanager
def _new_file(remote: RemotePath, path: Path) -> Iterator[Path]:
    """Make a new file that is renamed to ``path`` at the end, and removed if the block fails.

    Clients of stores open the file that they write to by its name, so it must exist already, be
    ours, and be no link. Raises RemoteError where the file system refuses.
    """
    part = path.with_name(new_temporary_name())
    try:
        part.open("xb").close()
        yield part
        os.replace(part, path)
    except OSError as error:
        raise RemoteError(
            f"{remote}: its copy on this machine cannot be written ({error.strerror}). Rename it "
            "if its name is unusual, or set TMPDIR to a folder of another file system."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _download(remote: RemotePath, part: Path, size: int | None, callback: Any) -> None:
    """Copy a remote file into ``part``.

    Raises RemoteError if the disk is full, OSError for a file that ends early, and whatever the
    store's client raises.
    """
    try:
        remote.fs.get_file(remote.path, str(part), callback=callback)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _no_room_error(remote, part.parent, size) from error
        raise
    received = part.lstat().st_size
    if size is not None and received != size:
        raise OSError(errno.EIO, f"{received:,} bytes came, of {size:,}")


def _no_room_error(remote: RemotePath, folder: Path, size: int | None) -> RemoteError:
    needed = "more room" if size is None else f"{size:,} bytes"
    free = shutil.disk_usage(folder).free
    return RemoteError(
        f"{remote}: its copy on this machine needs {needed}, {free:,} bytes are free in the folder "
        "of temporary files. Set TMPDIR to a folder with more room."
    )
