"""The parts of a URL, and which of them must not be shown. No network is used here.

A URL is split as fsspec does it, which splits at ``://`` and, where it looks for credentials,
follows ``urllib.parse.urlsplit``. A text that can be read in two ways is refused, and nothing but
its scheme is shown: otherwise a part of a password might pass for a part of the path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ckpt_tools.errors import UsageError
from ckpt_tools.redaction import remember_secret

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
    "scheme_of",
]  # fmt: skip

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LIKE_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)
_LOCAL = frozenset({"file", "local"})
# In these the part before @ is the name of a container or a repository, which is no secret.
_NAME_BEFORE_AT = frozenset({"abfs", "abfss", "az", "adl", "github", "git"})
# In these a path may hold an @, and no client takes a user name from the URL.
_AT_IN_PATH = frozenset(
    {
        "hf",
        "s3",
        "s3a",
        "gs",
        "gcs",
        "oss",
        "tos",
        "oci",
        "memory",
        "wandb",
        "lakefs",
        *_NAME_BEFORE_AT,
        *_LOCAL,
    }
)
# What can be nothing but a host. A name with a dot and a colon behind it may be a user's name.
_HOST = re.compile(
    r"([\w-]+\.)+[a-z]{2,}|(localhost|\d+(\.\d+){3}|\[[0-9a-f:.]*\])(:\d*)?",
    re.IGNORECASE | re.ASCII,
)
_PARAMETERS = re.compile(
    r";[^/;=]*="
)  # of a path, as of http://host/x.pt;token=…; a token may hold slashes
_WITH_PARAMETERS = frozenset({"http", "https", "ftp", "sftp"})
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
    return _URL.match(text) is not None or _is_nearly_url(text)


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


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case: ``s3`` of ``s3://bucket/key``."""
    return url.partition("://")[0].lower()


def local_path_of_url(url: str) -> Path | None:
    """Return the path that ``file:///path`` means; None for a URL of a store."""
    return Path(unquote(url.partition("://")[2])) if scheme_of(url) in _LOCAL else None


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


@dataclass(frozen=True)
class _Pieces:
    """A URL as ``scheme://``, ``userinfo@``, ``place`` and ``query``.

    The query begins with ``;``, ``?`` or ``#``.
    """

    scheme: str
    userinfo: str
    place: str
    query: str

    @property
    def without_credentials(self) -> str:
        return f"{self.scheme}://{self.place}"


class _UnreadableError(ValueError):
    """A URL that can be read in two ways, or in none. The message says why, without the URL."""


def parse_url(url: str) -> RemoteAddress:
    """Split a URL and remember its secrets.

    Raises UsageError for a URL that can be read in two ways, and for a path with empty parts or
    dots, which no folder can mirror.
    """
    shown = check_url(url)
    pieces = _split(url)
    path = pieces.place.strip("/")
    if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        raise UsageError(
            f"{shown}: expected scheme://PLACE/NAME without empty parts, . and .. in it. "
            "Write it in full."
        )
    start = f"{pieces.scheme}://"
    slashes = pieces.place[: len(pieces.place) - len(pieces.place.lstrip("/"))]
    user = f"{pieces.userinfo}@" if pieces.userinfo else ""
    return RemoteAddress(
        UrlOrigin(f"{start}{user}{slashes}", f"{start}{slashes}"), path, pieces.query
    )


def check_url(url: str) -> str:
    """Remember the secrets of a URL and return what may be shown of it.

    Raises UsageError for a URL that can be read in two ways, or in none.
    """
    shown = remember_url(url)
    try:
        _split(url)
    except _UnreadableError as error:
        raise UsageError(f"{shown}: {error}") from None
    return shown


def redact_url(text: str) -> str:
    """Return what may be shown of a URL: ``scheme://host/path``.

    Of a URL that can be read in two ways, or in none, that is ``scheme://…``.
    """
    try:
        return _split(text).without_credentials
    except _UnreadableError:
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
        if isinstance(value, str) and re.search(
            "pass|secret|token|key|sas|sig", name, re.IGNORECASE
        ):
            remember_secret(value)


def _split(url: str) -> _Pieces:
    """Split a URL. Raises _UnreadableError for one that can be read in two ways, or in none."""
    match = _URL.match(url)
    if "::" in url:  # fsspec takes every one for a link of a chain
        raise _UnreadableError(
            "expected one URL, found several chained with :: (in a name or a password, write "
            "%3A%3A). Give the URL of the file itself; its copy on this machine is made in any "
            "case."
        )
    if match is None:
        raise _UnreadableError(
            "expected scheme://PLACE/NAME or a path, found neither. Write // behind the colon, or "
            "./ before a path."
        )
    scheme, remainder = match[1].lower(), url[match.end() :]
    authority = re.split(r"[/?#]", remainder, maxsplit=1)[0]
    userinfo = authority.rpartition("@")[0]
    if "@" in remainder[len(authority) :] and not _is_in_path(scheme, authority):
        raise _UnreadableError(
            "expected a URL that can be read in one way only, found an @ which may end a password "
            "or belong to a name. In a password write / as %2F, ? as %3F and # as %23; in a name "
            "write @ as %40."
        )
    _refuse_bad_port(url, authority)
    start = len(userinfo) + 1 if "@" in authority else 0
    end = next((at for at in range(start, len(remainder)) if remainder[at] in "?#"), len(remainder))
    if scheme in _WITH_PARAMETERS and (parameters := _PARAMETERS.search(remainder, start, end)):
        end = parameters.start()
    query = remainder[end:].lstrip("/")
    return _Pieces(scheme, userinfo, remainder[start:end], query)


def _is_in_path(scheme: str, authority: str) -> bool:
    """Whether an @ behind the authority must be a part of the path.

    In ``ftp://user:5/x@host`` it may end a password.
    """
    if "@" in authority:
        return False
    return _HOST.fullmatch(authority) is not None or (
        scheme in _AT_IN_PATH and ":" not in authority
    )


def _refuse_bad_port(url: str, authority: str) -> None:
    if authority.startswith("arn:"):  # an access point of S3
        return
    try:
        urlsplit(url).port  # noqa: B018 - it raises
    except ValueError:
        raise _UnreadableError(
            "expected a host, and perhaps a port as a number, found something else. In a password "
            "write / as %2F, ? as %3F, # as %23 and [ as %5B."
        ) from None


def _secrets(url: str, shown: str) -> Iterator[str]:
    """Return the parts of a URL that are secrets in every text, not only within the URL."""
    try:
        pieces = _split(url)
    except _UnreadableError:
        yield from _likely_secrets(url)
        return
    if pieces.userinfo and pieces.scheme not in _NAME_BEFORE_AT:
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
