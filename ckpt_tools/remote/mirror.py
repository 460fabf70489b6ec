"""Where remote files have their places on this machine while a run lasts.

A mirror is a temporary folder: ``s3://bucket/runs/model.pt`` has its place at ``MIRROR/0/bucket/runs/model.pt``.
Whoever reads calls ``fetch`` on a path first, whoever writes delivers what stands at a place, and all others work with
paths as ever. ``restore_urls`` turns places in a text back into URLs, without their secrets.
"""

from __future__ import annotations

import atexit
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.errors import RemoteError, UsageError
from ckpt_tools.paths import path_below
from ckpt_tools.redaction import without_secrets
from ckpt_tools.remote.address import UrlOrigin, is_url, local_path_of_url, parse_url, scheme_of
from ckpt_tools.remote.remote_store import RemotePath, open_remote
from ckpt_tools.remote.temporary_folders import (
    LockedFolder,
    create_locked_folder,
    large_temporary_folder,
    new_temporary_name,
    remove_abandoned_folders,
)

__all__ = ["Mirror", "find_mirror", "is_remote", "open_mirror", "resolve_location", "restore_urls", "store_folder"]

TransferWatch = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], object]]]
"""Told the URL and the bytes of a transfer, if they are known; what comes out of it is told the bytes so far."""

_LIVING: list[Mirror] = []


def _ignore_transfer(name: str, size: int | None) -> contextlib.AbstractContextManager[Callable[[int], object]]:
    return contextlib.nullcontext(lambda seen: None)


class Mirror:
    """Places for remote files. Its folder is made for the first copy and removed by ``close``.

    ``present``: places at which the file stands as it is behind its URL; ``surveyed``: those of folders whose files all
    have places; ``writable``: those of folders that have proved to be.
    """

    def __init__(self, watch: TransferWatch = _ignore_transfer) -> None:
        self.watch = watch
        self.present: set[Path] = set()
        self.surveyed: set[Path] = set()
        self.writable: set[Path] = set()
        self._folder: Path | None = None
        self._claim: LockedFolder | None = None  # of the folder, once it is made
        self._origins: list[UrlOrigin] = []  # a subfolder for each
        self._queries: dict[Path, str] = {}

    @property
    def folder(self) -> Path:
        """The temporary folder, which need not be there yet."""
        if self._folder is None:
            self._folder = large_temporary_folder().resolve() / new_temporary_name()
        return self._folder

    def make_folder(self, folder: Path) -> None:
        """Make a folder among the places, and all above it. Raises RemoteError."""
        try:
            if self._claim is None:
                remove_abandoned_folders(self.folder.parent)
                self._claim = create_locked_folder(
                    self.folder
                )  # which only we may enter: copies are nobody else's business
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RemoteError(
                f"{folder}: no copy of it can be put into {self.folder.parent} ({error.strerror}). Set TMPDIR to a "
                "folder that can be written."
            ) from error

    def path_for_url(self, url: str) -> Path:
        """Where a remote file stands once it is fetched. Raises UsageError for a URL that means no place."""
        address = parse_url(url)
        for number, origin in enumerate(self._origins):
            store = self.folder / str(number)
            place = path_below(store, address.path, origin=address.origin.shown, error=UsageError, nested=True)
            if origin == address.origin and self._queries.setdefault(place, address.query) == address.query:
                return place
        self._origins.append(address.origin)
        return self.path_for_url(url)

    def holds(self, path: Path) -> bool:
        """Whether a path is a place in this mirror."""
        return self._folder is not None and path.is_relative_to(self._folder)

    def remote(self, path: Path) -> RemotePath:
        """What a place stands for. Raises UsageError, RemoteError where its store cannot be opened."""
        number, _, rest = path.relative_to(self.folder).as_posix().partition("/")
        return open_remote(f"{self._origins[int(number)].said}{rest}{self.query(path)}")

    def scheme(self, path: Path) -> str:
        """``s3`` and the like, of the URL of a place."""
        return scheme_of(self._origins[int(path.relative_to(self.folder).parts[0])].said)

    def query(self, path: Path) -> str:
        """What follows the path in the URL of a place; below a folder, what follows the folder's."""
        return next((self._queries[place] for place in (path, *path.parents) if self._queries.get(place)), "")

    def restore_urls_in_text(self, text: str) -> str:
        """A text with URLs in the stead of places."""
        if self._folder is None or str(self._folder) not in text:
            return text
        pattern = re.escape(str(self._folder)) + r"/(\d+)(?:/|(?!\w))"
        return re.sub(pattern, lambda match: self._origins[int(match[1])].shown, text)

    def close(self) -> None:
        """Remove everything."""
        if self._claim is not None:
            self._claim.remove_folder()
        self._folder = self._claim = None
        self.present.clear()


@contextlib.contextmanager
def open_mirror(watch: TransferWatch = _ignore_transfer) -> Iterator[Mirror]:
    """A mirror for the URLs that are met within; ``watch`` is told of every transfer, the URL and its bytes."""
    mirror = Mirror(watch)
    _LIVING.append(mirror)
    try:
        yield mirror
    finally:
        _LIVING.remove(mirror)
        mirror.close()


def resolve_location(path: Path | str) -> Path:
    """The path that a user means: the place of a URL, and any other as it is. Asks no network. Raises UsageError."""
    if not isinstance(path, str) or not is_url(path):
        return Path(path)
    return local_path_of_url(path) or _current().path_for_url(path)


def find_mirror(path: Path) -> Mirror | None:
    """The mirror in which a path is a place; None for a path that only stands for itself."""
    return next((mirror for mirror in _LIVING if mirror.holds(path)), None)


def is_remote(path: Path) -> bool:
    """Whether a path is the place of a remote file."""
    return find_mirror(path) is not None


def store_folder(path: Path) -> Path | None:
    """The folder in which all places of a path's store are; None for a path that only stands for itself."""
    mirror = find_mirror(path)
    return None if mirror is None else mirror.folder / path.relative_to(mirror.folder).parts[0]


def restore_urls(value: Any) -> Any:
    """The same plain value (text, mapping, list, …) with URLs instead of places, and without secrets in any URL."""
    if isinstance(value, str):
        for mirror in _LIVING:
            value = mirror.restore_urls_in_text(value)
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {restore_urls(key): restore_urls(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [restore_urls(item) for item in value]
    return value


def _current() -> Mirror:
    """The innermost mirror; outside of all one that lasts as long as the process."""
    if not _LIVING:
        mirror = Mirror()
        atexit.register(mirror.close)
        _LIVING.append(mirror)
    return _LIVING[-1]
