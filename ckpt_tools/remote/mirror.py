"""The folder for copies of remote files, which lasts as long as a run.

A mirror is a temporary folder with a subfolder for each store: the copy of
``s3://bucket/runs/model.pt`` is ``MIRROR/0/bucket/runs/model.pt``. The layout is the store's own,
so that all files of a checkpoint lie beside each other and a folder of checkpoints can be searched
like a local one.
"""

from __future__ import annotations

import atexit
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt_tools.errors import RemoteError, UsageError
from ckpt_tools.machine.temporary_folders import (
    LockedFolder,
    create_locked_folder,
    large_temporary_folder,
    new_temporary_name,
    remove_abandoned_folders,
)
from ckpt_tools.paths import path_below
from ckpt_tools.remote.remote_store import RemotePath, open_remote
from ckpt_tools.url_syntax import scheme_of
from ckpt_tools.urls import RemoteAddress, UrlOrigin, parse_url

__all__ = ["Mirror", "MirroredStore", "TransferWatch", "current_mirror", "open_mirror"]

TransferWatch = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], object]]]
"""Is called with the URL and the bytes of a transfer (None if the store does not tell them). The
context manager that it returns yields a function that is called with the bytes so far."""


def _ignore_transfer(
    name: str, size: int | None
) -> contextlib.AbstractContextManager[Callable[[int], object]]:
    return contextlib.nullcontext(lambda bytes_so_far: None)


class Mirror:
    """A temporary folder for copies of remote files.

    The folder is made for the first copy and removed by ``close``. ``watch`` sees every transfer.
    """

    def __init__(self, watch: TransferWatch = _ignore_transfer) -> None:
        self.watch = watch
        self._folder: Path | None = None
        self._lock: LockedFolder | None = None  # None until the folder is made
        self._stores: list[MirroredStore] = []

    @property
    def folder(self) -> Path:
        """The temporary folder, which need not exist yet."""
        if self._folder is None:
            self._folder = large_temporary_folder().resolve() / new_temporary_name()
        return self._folder

    def make_folder(self, folder: Path) -> None:
        """Make a folder inside the mirror, and all folders above it. Raises RemoteError."""
        try:
            if self._lock is None:
                remove_abandoned_folders(self.folder.parent)
                # Only this user may enter it: the store's permissions may be stricter than /tmp's.
                self._lock = create_locked_folder(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RemoteError(
                f"{self.folder.parent}: no copy of a remote file can be put there "
                f"({error.strerror}). Set TMPDIR to a folder that can be written."
            ) from error

    def place_for_url(self, url: str) -> tuple[MirroredStore, Path]:
        """Return the store of a URL and the path of the file's copy; no network is used.

        Two URLs that differ in credentials or in the query have copies of their own: a query may
        choose a version of a file.

        Raises UsageError for a URL that cannot be read, or whose path no folder could mirror.
        """
        address = parse_url(url)
        for store in self._stores:
            path = store.reserve_path(address)
            if path is not None:
                return store, path
        self._stores.append(MirroredStore(self, self.folder / str(len(self._stores)), address.origin))
        return self.place_for_url(url)

    def close(self) -> None:
        """Remove the folder with everything in it."""
        if self._lock is not None:
            self._lock.remove_folder()
        self._folder = self._lock = None
        self._stores.clear()


class MirroredStore:
    """The part of a mirror for one store, that is for URLs with the same scheme and credentials.

    ``fetched``: paths of complete copies, of files and of folders that are one checkpoint.
    ``outlined``: folders all of whose files have a copy, most of them without content.
    ``writable``: folders in which a probe has been written.
    """

    def __init__(self, mirror: Mirror, folder: Path, origin: UrlOrigin) -> None:
        self.mirror = mirror
        self.folder = folder
        self.fetched: set[Path] = set()
        self.outlined: set[Path] = set()
        self.writable: set[Path] = set()
        self._origin = origin
        self._queries: dict[Path, str] = {}

    def __str__(self) -> str:
        return self._origin.shown

    @property
    def scheme(self) -> str:
        """``s3`` and the like."""
        return scheme_of(self._origin.shown)

    def reserve_path(self, address: RemoteAddress) -> Path | None:
        """Return the path for a URL's copy; None if another store, or another query, has that path.

        Raises UsageError for a name that no file here can have.
        """
        path = path_below(
            self.folder, address.path, origin=address.origin.shown, error=UsageError, nested=True
        )
        if self._origin != address.origin:
            return None
        if self._queries.setdefault(path, address.query) != address.query:
            return None
        return path

    def remote_path(self, path: Path) -> RemotePath:
        """Return the file or folder of the store whose copy has this path.

        Raises UsageError for an unknown scheme, RemoteError where a package is missing.
        """
        name = path.relative_to(self.folder).as_posix()
        return open_remote(f"{self._origin.with_credentials}{name}{self.query(path)}")

    def query(self, path: Path) -> str:
        """Return what follows the path in its URL: its own query, or that of a folder above it."""
        parents = (path, *path.parents)
        return next((self._queries[place] for place in parents if self._queries.get(place)), "")

    def restore_urls(self, text: str) -> str:
        """Return a text that names URLs, without credentials and queries, instead of copies."""
        # A store's folder is a number: without the look ahead, 1 would match the beginning of 12.
        pattern = re.escape(str(self.folder)) + r"(?:/|(?!\w))"
        return re.sub(pattern, lambda _: self._origin.shown, text)


_current: Mirror | None = None


def current_mirror() -> Mirror:
    """Return the mirror of the innermost ``open_mirror``.

    Outside of all, as in Python functions that are given a URL, it lasts as long as the process.
    """
    global _current
    if _current is None:
        _current = Mirror()
        atexit.register(_current.close)
    return _current


@contextlib.contextmanager
def open_mirror(watch: TransferWatch = _ignore_transfer) -> Iterator[Mirror]:
    """Put copies into a new mirror within the block, and remove them at its end."""
    global _current
    outer, mirror = _current, Mirror(watch)
    _current = mirror
    try:
        yield mirror
    finally:
        _current = outer
        mirror.close()
