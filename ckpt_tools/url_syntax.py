"""The parts of a URL, split as fsspec does it.

fsspec splits at ``://`` and, where it looks for credentials, follows ``urllib.parse.urlsplit``. A
URL that can be read in two ways is refused: a part of a password might pass for a part of the path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = [
    "LOCAL_SCHEMES",
    "URL_START",
    "UnreadableUrlError",
    "UrlPieces",
    "scheme_of",
    "split_url",
]

URL_START = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
LOCAL_SCHEMES = frozenset({"file", "local"})
# In these the part before @ is the name of a container or a repository, which is no secret.
_NAME_BEFORE_AT = frozenset({"abfs", "abfss", "az", "adl", "github", "git"})
# In these a path may hold an @, and no client takes a user name from the URL.
_AT_IN_PATH = frozenset(
    {"hf", "s3", "s3a", "gs", "gcs", "oss", "tos", "oci", "memory", "wandb", "lakefs"}
    | _NAME_BEFORE_AT
    | LOCAL_SCHEMES
)
# What can be nothing but a host. A name with a dot and a colon behind it may be a user's name.
_HOST = re.compile(
    r"([\w-]+\.)+[a-z]{2,}|(localhost|\d+(\.\d+){3}|\[[0-9a-f:.]*\])(:\d*)?",
    re.IGNORECASE | re.ASCII,
)
# Parameters of a path, as in http://host/x.pt;token=…: the token may hold slashes.
_PARAMETERS = re.compile(r";[^/;=]*=")
_WITH_PARAMETERS = frozenset({"http", "https", "ftp", "sftp"})


@dataclass(frozen=True)
class UrlPieces:
    """A URL as ``scheme://``, ``userinfo@``, ``place`` and ``query``.

    The query begins with ``;``, ``?`` or ``#``.
    """

    scheme: str
    userinfo: str
    place: str
    query: str

    @property
    def userinfo_is_secret(self) -> bool:
        """Whether the part before the @ names a user, and not a container or a repository."""
        return self.scheme not in _NAME_BEFORE_AT

    @property
    def without_credentials(self) -> str:
        """The URL as it may be shown."""
        return f"{self.scheme}://{self.place}"


class UnreadableUrlError(ValueError):
    """A URL that can be read in two ways, or in none. The message says why, without the URL."""


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case: ``s3`` of ``s3://bucket/key``."""
    return url.partition("://")[0].lower()


def split_url(url: str) -> UrlPieces:
    """Split a URL. Raises UnreadableUrlError for one that can be read in two ways, or in none."""
    match = URL_START.match(url)
    if "::" in url:  # fsspec takes every one for a link of a chain
        raise UnreadableUrlError(
            "expected one URL, found several chained with :: (in a name or a password, write "
            "%3A%3A). Give the URL of the file itself; its copy on this machine is made in any "
            "case."
        )
    if match is None:
        raise UnreadableUrlError(
            "expected scheme://PLACE/NAME or a path, found neither. Write // behind the colon, or "
            "./ before a path."
        )
    scheme, remainder = match[1].lower(), url[match.end() :]
    authority = re.split(r"[/?#]", remainder, maxsplit=1)[0]
    userinfo = authority.rpartition("@")[0]
    if "@" in remainder[len(authority) :] and not _is_in_path(scheme, authority):
        raise UnreadableUrlError(
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
    return UrlPieces(scheme, userinfo, remainder[start:end], query)


def _is_in_path(scheme: str, authority: str) -> bool:
    """Whether an @ behind the authority must be a part of the path.

    In ``ftp://user:5/x@host`` it may end a password.
    """
    if "@" in authority:
        return False
    return _HOST.fullmatch(authority) is not None or (scheme in _AT_IN_PATH and ":" not in authority)


def _refuse_bad_port(url: str, authority: str) -> None:
    if authority.startswith("arn:"):  # an access point of S3
        return
    try:
        urlsplit(url).port  # noqa: B018 - it raises
    except ValueError:
        raise UnreadableUrlError(
            "expected a host, and perhaps a port as a number, found something else. In a password "
            "write / as %2F, ? as %3F, # as %23 and [ as %5B."
        ) from None
