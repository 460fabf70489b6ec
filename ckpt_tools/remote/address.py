"""What a URL says: its scheme, where in a store it points, and what of it must not be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ckpt_tools.errors import UsageError
from ckpt_tools.redaction import without_secrets

__all__ = ["Origin", "is_url", "local_path", "scheme_of", "split"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = frozenset({"file", "local"})


def is_url(text: str) -> bool:
    """Whether a text is ``scheme://…``: a place that no path of this machine can name."""
    return _URL.match(text) is not None


def scheme_of(url: str) -> str:
    """``s3`` of ``s3://bucket/key``, in lower case."""
    match = _URL.match(url)
    assert match is not None, url
    return match[1].lower()


def local_path(url: str) -> Path | None:
    """The path behind ``file:///path``; None for a URL of another store."""
    return Path(unquote(url.partition("://")[2])) if scheme_of(url) in _LOCAL else None


@dataclass(frozen=True)
class Origin:
    """What stands around the path in a URL: ``before`` it with credentials, ``shown`` without, a query ``behind`` it."""

    before: str
    shown: str
    behind: str = ""


def split(url: str) -> tuple[Origin, str]:
    """A URL as its origin and its path, host or bucket first. Raises UsageError for a path that no folder can mirror."""
    clean = without_secrets(url)
    rest = clean[_URL.match(clean).end() :].strip("/")  # type: ignore[union-attr]
    parts = rest.split("/")
    if not rest or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UsageError(f"{clean}: expected scheme://PLACE/NAME without empty parts, . and .. in it. Write it in full.")
    shown = clean[: clean.index(rest, len(scheme_of(url)) + 3)]
    match = re.search(rf"(?<=[/@]){re.escape(rest)}(?=/*(?:$|[?#]))", url)
    assert match is not None, clean  # the rest is a piece of the URL as it was
    return Origin(url[: match.start()], shown, url[match.end() :].strip("/")), rest
