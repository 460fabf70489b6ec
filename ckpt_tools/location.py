"""A path of this machine or a URL, as a user names a checkpoint, data, an output or a report.

Requests, options of the command line and Python functions hold a ``Location``. It becomes a plain
path in four places: where a checkpoint is opened (``storage/reading.py``,
``storage/discovery.py``), where data is opened (``data/``), where an output is delivered
(``storage/output/``) and where a report or a manifest is written (``report/``). Everything in
between works with local paths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from ckpt_tools.remote.local_copies import fetch_file
from ckpt_tools.remote.mirror import MirroredStore, current_mirror
from ckpt_tools.remote.uploads import may_write_beside
from ckpt_tools.urls import is_url, local_path_of_url

__all__ = ["Location", "LocationLike"]


@dataclass(frozen=True)
class Location:
    """A path of this machine, or a file or folder of a store.

    ``path`` is where the content is on this machine. For a URL it is the path of a copy, which
    need not exist yet: the functions that open or deliver something fetch or upload it. ``store``
    is None for a local path. As a text it is the path, or the URL without credentials and query.
    """

    path: Path
    store: MirroredStore | None = None

    @classmethod
    def of(cls, place: LocationLike) -> Location:
        """Return the location that a user means; no network is used.

        ``file://`` URLs are local paths. Raises UsageError for a URL that can be read in two ways.
        """
        if isinstance(place, Location):
            return place
        if isinstance(place, Path) or not is_url(place):
            return cls(Path(place))
        local_path = local_path_of_url(place)
        if local_path is not None:
            return cls(local_path)
        store, path = current_mirror().place_for_url(place)
        return cls(path, store)

    def __str__(self) -> str:
        return self.restore_urls(str(self.path))

    def __truediv__(self, name: str | PurePath) -> Location:
        return self.with_path(self.path / name)

    @property
    def parent(self) -> Location:
        """The folder that it lies in."""
        return self.with_path(self.path.parent)

    @property
    def name(self) -> str:
        """The last part of the path or URL."""
        return self.path.name

    @property
    def url(self) -> str:
        """The URL without credentials and query; empty for a local path."""
        return "" if self.store is None else str(self)

    def with_path(self, path: Path) -> Location:
        """Return the location of another file of the same store, or of this machine."""
        return replace(self, path=path)

    def fetch(self) -> Path:
        """Return the path of the file on this machine, after copying it from its store.

        Raises RemoteError.
        """
        return self.path if self.store is None else fetch_file(self.store, self.path)

    def may_write_beside(self) -> bool:
        """Whether an output that nobody named may go beside it; see ``remote/uploads.py``."""
        return self.store is None or may_write_beside(self.store)

    def restore_urls(self, text: str) -> str:
        """Return a text with URLs in the place of the paths of copies from the same store."""
        return text if self.store is None else self.store.restore_urls(text)

    @contextlib.contextmanager
    def urls_in_errors(self) -> Iterator[None]:
        """Let errors that are raised in the block name URLs instead of paths of copies.

        The functions in between know only the copy; a user has never heard of it.
        """
        try:
            yield
        except Exception as error:
            error.args = tuple(
                self.restore_urls(part) if isinstance(part, str) else part for part in error.args
            )
            if isinstance(error, OSError) and isinstance(error.filename, str):
                error.filename = self.restore_urls(error.filename)
            raise


LocationLike = Location | Path | str
"""What public functions take for a location: a text may be a URL."""
