"""What a URL says: its scheme, where in a store it points, and what of it must not be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ckpt_tools.errors import UsageError
from ckpt_tools.redaction import without_secrets

__all__ = ["Address", "Origin", "is_url", "local_path", "parted", "scheme_of"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = frozenset({"file", "local"})


def is_url(text: str) -> bool:
    """Whether a text is ``scheme://…``: a place that no path of this machine can name."""
    return _URL.match(text) is not None


def scheme_of(url: str) -> str:
    """``s3`` of ``s3://bucket/key``, in lower case."""
    return url.partition("://")[0].lower()


def local_path(url: str) -> Path | None:
    """The path behind ``file:///path``; None for a URL of another store."""
    return Path(unquote(url.partition("://")[2])) if scheme_of(url) in _LOCAL else None


@dataclass(frozen=True)
class Origin:
    """What stands before the path in a URL: with credentials, and as it may be shown."""

    said: str
    shown: str


@dataclass(frozen=True)
class Address:
    """A URL in three parts. ``path`` begins with the host or bucket; ``query`` is all that follows it."""

    origin: Origin
    path: str
    query: str


def parted(url: str) -> Address:
    """The parts of a URL. Raises UsageError for one whose path no folder could mirror."""
    clean = without_secrets(url)
    start = clean.index("://") + 3
    path = clean[start:].strip("/")
    if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        raise UsageError(
            f"{clean}: expected scheme://PLACE/NAME without empty parts, . and .. in it. Write it in full."
        )
    match = re.search(rf"(?<=[/@]){re.escape(path)}(?=/*(?:$|[?#]))", url)
    assert match is not None, clean  # the path is a piece of the URL
    origin = Origin(url[: match.start()], clean[: clean.index(path, start)])
    return Address(origin, path, url[match.end() :].lstrip("/"))
