"""What a URL says: its scheme, where in a store it points, and what of it must not be shown.

A URL is taken apart as fsspec does it, which splits at ``://`` and, where it looks for credentials, follows
``urllib.parse.urlsplit``. A text that can be read in two ways is refused, and nothing but its scheme is shown.
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
    {"hf", "s3", "s3a", "gs", "gcs", "oss", "tos", "oci", "memory", "wandb", "lakefs", *_NAME_BEFORE_AT, *_LOCAL}
)
# What can be nothing but a host. A user's name may hold a dot, too: with a colon behind it, it need not be one.
_HOST = re.compile(r"([\w-]+\.)+[a-z]{2,}|(localhost|\d+(\.\d+){3}|\[[0-9a-f:.]*\])(:\d*)?", re.IGNORECASE | re.ASCII)
_PARAMETERS = re.compile(r";[^/;=]*=")  # of a path, as of http://host/x.pt;token=…; a token may hold slashes
_WITH_PARAMETERS = frozenset({"http", "https", "ftp", "sftp"})
_LONG_USER = 12  # characters of a user name that may well be a token
_LONG_VALUE = 6  # of a value in a query; "true" and "1" are no secrets
# In a query, "inline" or "model-1.safetensors" is no secret, and masking it would take these words out of results.
_ORDINARY = re.compile(r"[a-z._/-]{1,20}|[\w-]+(\.[a-z]+)+")
# user:password@host:path, where user:/path@name/file may be a data set and its folder
_LIKE_CREDENTIALS = re.compile(
    r"//[^/:@]+:(.*)@[^@]*[/:]|(?:^|=)[^/:@]{2,}:(?:(?!/)(.*)@[^@]*[/:]|(/.*)@[^@]*:)", re.DOTALL
)


def is_url(text: str) -> bool:
    """Whether a text means a place in a store, which no path of this machine can name.

    That is ``scheme://…``, and also what is likelier a chain or a mistyped URL than a path: ``simplecache::http://…``,
    ``http:/user:password@host/x``, ``http:user:password@host/x``. A file that is there under such a name is a file.
    """
    return _URL.match(text) is not None or _is_nearly_url(text)


def _is_nearly_url(text: str) -> bool:
    match = _LIKE_URL.match(text)
    if match is None or os.path.lexists(text):
        return False
    scheme, rest = match.groups()
    if rest.startswith("//"):  # behind blanks
        return True
    if rest[:1] in (":", "/", "\\"):
        return _is_known(scheme) or re.match(r"[/\\]+[^/]*:[^@]*@", rest) is not None
    # "data:load" is a function of a module, "git:" may be any.
    return ("@" in rest or "?" in rest) and _is_known(scheme)


def _is_known(scheme: str) -> bool:
    from fsspec.registry import available_protocols, registry

    return scheme.lower() in {*available_protocols(), *registry}


def scheme_of(url: str) -> str:
    """``s3`` of ``s3://bucket/key``, in lower case."""
    return url.partition("://")[0].lower()


def local_path_of_url(url: str) -> Path | None:
    """The path behind ``file:///path``; None for a URL of another store."""
    return Path(unquote(url.partition("://")[2])) if scheme_of(url) in _LOCAL else None


@dataclass(frozen=True)
class UrlOrigin:
    """What stands before the path in a URL: with credentials, and as it may be shown."""

    said: str = field(repr=False)
    shown: str


@dataclass(frozen=True)
class RemoteAddress:
    """A URL in three parts. ``path`` begins with the host or bucket; ``query`` is all that follows it."""

    origin: UrlOrigin
    path: str
    query: str = field(repr=False)


@dataclass(frozen=True)
class _Pieces:
    """A URL: ``scheme://`` ``userinfo@`` ``place`` ``query``; the query begins with ``;``, ``?`` or ``#``."""

    scheme: str
    userinfo: str
    place: str
    query: str

    @property
    def without_credentials(self) -> str:
        return f"{self.scheme}://{self.place}"


class _UnreadableError(ValueError):
    """A URL that can be read in no way, or in two. The message says why, without the URL."""


def parse_url(url: str) -> RemoteAddress:
    """Take a URL apart and remember its secrets.

    Raises UsageError for a URL that can be read in two ways, and for one whose path no folder could mirror.
    """
    shown = check_url(url)
    pieces = _split(url)
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
        _split(url)
    except _UnreadableError as error:
        raise UsageError(f"{shown}: {error}") from None
    return shown


def redact_url(text: str) -> str:
    """What may be shown of a URL: ``scheme://host/path``, or ``scheme://…`` of one that cannot be read for sure."""
    try:
        return _split(text).without_credentials
    except _UnreadableError:
        match = _LIKE_URL.match(text)
        return f"{match[1] if match else ''}://…"


def remember_url(url: str) -> str:
    """Remember a URL and the secrets in it, so that no text shows them, and return what may be shown of it."""
    shown = redact_url(url)
    for secret in _secrets(url, shown):
        remember_secret(secret)
    if url != shown:
        remember_secret(url, shown)
    return shown


def remember_urls(texts: Iterable[str]) -> None:
    """Do so for the URLs in arguments of a command, or in environment variables. A URL reaches to the end of its text.

    Texts that merely look like a host behind a user name and a password lose the password, too.
    """
    for text in texts:
        if ":" not in text:
            continue
        match = re.search(r"[A-Za-z][A-Za-z0-9+.-]*:[:/\\]", text) or re.search(r"[A-Za-z][A-Za-z0-9+.-]+:", text)
        if match is not None and is_url(text[match.start() :]):
            remember_url(text[match.start() :])
        elif (credentials := _LIKE_CREDENTIALS.search(text)) and not os.path.lexists(text):
            remember_secret("".join(filter(None, credentials.groups())))


def remember_storage_options(options: Any) -> None:
    """Remember what fsspec itself took for credentials in a URL: ``storage_options`` of a file system."""
    for name, value in dict(options).items():
        if isinstance(value, str) and re.search("pass|secret|token|key|sas|sig", name, re.IGNORECASE):
            remember_secret(value)


def _split(url: str) -> _Pieces:
    """Raises _UnreadableError for what is no URL, and for one that can be read in two ways."""
    match = _URL.match(url)
    if "::" in url:  # fsspec takes every one for a link of a chain
        raise _UnreadableError(
            "expected one URL, found several chained with :: (in a name or a password, write %3A%3A). Give the URL of "
            "the file itself; its copy on this machine is made in any case."
        )
    if match is None:
        raise _UnreadableError(
            "expected scheme://PLACE/NAME or a path, found neither. Write // behind the colon, or ./ before a path."
        )
    scheme, rest = match[1].lower(), url[match.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    userinfo = authority.rpartition("@")[0]
    if "@" in rest[len(authority) :] and not _is_in_path(scheme, authority):
        raise _UnreadableError(
            "expected a URL that can be read in one way only, found an @ which may end a password or belong to a name. "
            "In a password write / as %2F, ? as %3F and # as %23; in a name write @ as %40."
        )
    _refuse_bad_port(url, authority)
    start = len(userinfo) + 1 if "@" in authority else 0
    end = next((at for at in range(start, len(rest)) if rest[at] in "?#"), len(rest))
    if scheme in _WITH_PARAMETERS and (parameters := _PARAMETERS.search(rest, start, end)):
        end = parameters.start()
    query = rest[end:].lstrip("/")
    return _Pieces(scheme, userinfo, rest[start:end], query)


def _is_in_path(scheme: str, authority: str) -> bool:
    """Whether an @ behind the authority must be a part of the path: it may end a password in ``ftp://user:5/x@host``."""
    if "@" in authority:
        return False
    return _HOST.fullmatch(authority) is not None or (scheme in _AT_IN_PATH and ":" not in authority)


def _refuse_bad_port(url: str, authority: str) -> None:
    if authority.startswith("arn:"):  # an access point of S3
        return
    try:
        urlsplit(url).port  # noqa: B018 - it raises
    except ValueError:
        raise _UnreadableError(
            "expected a host, and perhaps a port as a number, found something else. In a password write / as %2F, "
            "? as %3F, # as %23 and [ as %5B."
        ) from None


def _secrets(url: str, shown: str) -> Iterator[str]:
    """What of a URL is secret by itself, wherever it stands."""
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
        name, equals, said = value.partition("=")
        secret = said if equals else name
        if len(secret) >= _LONG_VALUE and secret not in shown and not _ORDINARY.fullmatch(secret):
            yield secret


def _likely_secrets(url: str) -> Iterator[str]:
    """Of a URL that cannot be read: what stands between a colon and an @, and the values of all queries."""
    match = _LIKE_URL.match(url)
    rest = match[2] if match else url
    before = rest.rpartition("@")[0]
    userinfo = re.split(r"://|^[:/\\]*", before)[-1]
    yield from (userinfo, userinfo.partition(":")[2])
    for value in re.split(r"[?#&;]", rest)[1:]:
        secret = value.partition("=")[2] or value
        if len(secret) >= _LONG_VALUE:
            yield secret
