"""What a URL means, and which parts of it must not be shown. No network is used here.

Of a text that can be read in two ways nothing but the scheme is shown (``url_syntax.py``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ckpt_tools.errors import UsageError
from ckpt_tools.redaction import remember_secret
from ckpt_tools.url_syntax import (
    LOCAL_SCHEMES,
    URL_START,
    UnreadableUrlError,
    scheme_of,
    split_url,
)

__all__ = [
    "RemoteAddress",
    "UrlOrigin",
    "check_url",
    "is_url",
    "local_path_of_url",
    "parse_url",
    "redact_url",
    "remember_storage_options",
    "remember_url",
    "remember_urls",
]  # fmt: skip

_LIKE_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)
_LONG_USER = 12  # characters; a user name of that length may well be a token
_LONG_VALUE = 6  # characters of a value in a query; "true" and "1" are no secrets
# In a query, "inline" or "model-1.safetensors" is no secret. Masking them would remove these words
# from results.
_ORDINARY = re.compile(r"[a-z._/-]{1,20}|[\w-]+(\.[a-z]+)+")
# user:password@host:path, where user:/path@name/file may be a data set and its folder
_LIKE_CREDENTIALS = re.compile(
    r"//[^/:@]+:(.*)@[^@]*[/:]|(?:^|=)[^/:@]{2,}:(?:(?!/)(.*)@[^@]*[/:]|(/.*)@[^@]*:)", re.DOTALL
)


def is_url(text: str) -> bool:
    """Whether a text is a URL and no path of this machine.

    Besides ``scheme://…`` that is what is likelier a chain or a mistyped URL than a path:
    ``simplecache::http://…``, ``http:/user:password@host/x``, ``http:user:password@host/x``. Such a
    text may hold a password. A file that exists under such a name is a file.
    """
    return URL_START.match(text) is not None or _is_nearly_url(text)


def _is_nearly_url(text: str) -> bool:
    match = _LIKE_URL.match(text)
    if match is None or os.path.lexists(text):
        return False
    scheme, remainder = match.groups()
    if remainder.startswith("//"):  # a URL behind blanks
        return True
    if remainder[:1] in (":", "/", "\\"):
        has_credentials = re.match(r"[/\\]+[^/]*:[^@]*@", remainder) is not None
        return has_credentials or _is_scheme(scheme)
    # "data:load" is a function of a module, and a module may be called "git".
    return ("@" in remainder or "?" in remainder) and _is_scheme(scheme)


def _is_scheme(scheme: str) -> bool:
    """Whether fsspec knows a scheme, with or without the package for it."""
    from fsspec.registry import available_protocols, registry

    return scheme.lower() in {*available_protocols(), *registry}


def local_path_of_url(url: str) -> Path | None:
    """Return the path that ``file:///path`` means; None for a URL of a store."""
    return Path(unquote(url.partition("://")[2])) if scheme_of(url) in LOCAL_SCHEMES else None


@dataclass(frozen=True)
class UrlOrigin:
    """What precedes the path in a URL, with its credentials and without them."""

    with_credentials: str = field(repr=False)
    shown: str


@dataclass(frozen=True)
class RemoteAddress:
    """A URL in three parts: ``path`` begins with the host or bucket, ``query`` follows it."""

    origin: UrlOrigin
    path: str
    query: str = field(repr=False)


def parse_url(url: str) -> RemoteAddress:
    """Split a URL and remember its secrets.

    Raises UsageError for a URL that can be read in two ways, and for a path with empty parts or
    dots, which no folder can mirror.
    """
    shown = check_url(url)
    pieces = split_url(url)
    path = pieces.place.strip("/")
    if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        raise UsageError(
            f"{shown}: expected scheme://PLACE/NAME without empty parts, . and .. in it. Write it in full."
        )
    start = f"{pieces.scheme}://"
    slashes = pieces.place[: len(pieces.place) - len(pieces.place.lstrip("/"))]
    user = f"{pieces.userinfo}@" if pieces.userinfo else ""
    return RemoteAddress(UrlOrigin(f"{start}{user}{slashes}", f"{start}{slashes}"), path, pieces.query)


def check_url(url: str) -> str:
    """Remember the secrets of a URL and return what may be shown of it.

    Raises UsageError for a URL that can be read in two ways, or in none.
    """
    shown = remember_url(url)
    try:
        split_url(url)
    except UnreadableUrlError as error:
        raise UsageError(f"{shown}: {error}") from None
    return shown


def redact_url(text: str) -> str:
    """Return what may be shown of a URL: ``scheme://host/path``.

    Of a URL that can be read in two ways, or in none, that is ``scheme://…``.
    """
    try:
        return split_url(text).without_credentials
    except UnreadableUrlError:
        match = _LIKE_URL.match(text)
        return f"{match[1] if match else ''}://…"


def remember_url(url: str) -> str:
    """Remember a URL and its secrets, so that no text shows them; return what may be shown."""
    shown = redact_url(url)
    for secret in _secrets(url, shown):
        remember_secret(secret)
    if url != shown:
        remember_secret(url, shown)
    return shown


def remember_urls(texts: Iterable[str]) -> None:
    """Remember the URLs in arguments of a command or in environment variables.

    A URL reaches to the end of its text. Of a text that only looks like a host behind a user name
    and a password, as ``scp`` takes it, the password is remembered.
    """
    for text in texts:
        if ":" not in text:
            continue
        match = re.search(r"[A-Za-z][A-Za-z0-9+.-]*:[:/\\]", text) or re.search(
            r"[A-Za-z][A-Za-z0-9+.-]+:", text
        )
        if match is not None and is_url(text[match.start() :]):
            remember_url(text[match.start() :])
        elif (credentials := _LIKE_CREDENTIALS.search(text)) and not os.path.lexists(text):
            remember_secret("".join(filter(None, credentials.groups())))


def remember_storage_options(options: Any) -> None:
    """Remember what fsspec itself took for credentials, in ``storage_options`` of a file system."""
    for name, value in dict(options).items():
        if isinstance(value, str) and re.search("pass|secret|token|key|sas|sig", name, re.IGNORECASE):
            remember_secret(value)


def _secrets(url: str, shown: str) -> Iterator[str]:
    """Return the parts of a URL that are secrets in every text, not only within the URL."""
    try:
        pieces = split_url(url)
    except UnreadableUrlError:
        yield from _likely_secrets(url)
        return
    if pieces.userinfo and pieces.userinfo_is_secret:
        user, _, password = pieces.userinfo.partition(":")
        yield password
        if not password or len(user) >= _LONG_USER:
            yield user
    for value in re.split(r"[?#&;]", pieces.query):
        name, equals, assigned_value = value.partition("=")
        secret = assigned_value if equals else name
        if len(secret) >= _LONG_VALUE and secret not in shown and not _ORDINARY.fullmatch(secret):
            yield secret


def _likely_secrets(url: str) -> Iterator[str]:
    """Return what may be secret in a URL that cannot be read.

    That is what precedes the last @, the part of it behind a colon, and all values of queries.
    """
    match = _LIKE_URL.match(url)
    remainder = match[2] if match else url
    userinfo = re.split(r"://|^[:/\\]*", remainder.rpartition("@")[0])[-1]
    yield from (userinfo, userinfo.partition(":")[2])
    for value in re.split(r"[?#&;]", remainder)[1:]:
        secret = value.partition("=")[2] or value
        if len(secret) >= _LONG_VALUE:
            yield secret
