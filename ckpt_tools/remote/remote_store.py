"""Stores behind URLs, by way of fsspec: ``s3:// gs:// hf:// http://`` and all others it knows.

Whatever a store's client raises becomes a RemoteError that says what to do. A listing is input from
somebody else, so names in it are checked before anything uses them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import IO, TYPE_CHECKING, Any, cast

from ckpt_tools.errors import CkptToolsError, RemoteError, UsageError
from ckpt_tools.paths import shown_name, spelling_fault
from ckpt_tools.plain_text import one_line
from ckpt_tools.redaction import without_fragments
from ckpt_tools.url_syntax import scheme_of
from ckpt_tools.urls import redact_url, remember_storage_options, remember_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = [
    "RemotePath",
    "describe_store_error",
    "is_access_refused_error",
    "is_missing_file_error",
    "open_remote",
    "open_url",
    "transfer_callback",
    "translate_store_errors",
]

# The package that fsspec needs for a scheme, for the advice to install it.
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
    "http": "aiohttp", "https": "aiohttp", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
    "sftp": "paramiko", "ssh": "paramiko", "oss": "ossfs", "oci": "ocifs", "smb": "smbprotocol",
    "webdav": "webdav4", "hdfs": "pyarrow",
}  # fmt: skip
# Parts of the names of exceptions by which clients say that credentials do not suffice.
_ACCESS_REFUSED = (
    "credential",
    "accessdenied",
    "forbidden",
    "unauthorized",
    "authentication",
    "permission",
)
# Characters of a client's message that are searched for secrets, and that are shown: the search
# takes time, and some clients quote whole pages of HTML.
_SEARCHED, _SHOWN = 10_000, 300
_LARGEST = 1 << 60  # bytes: no store holds such a file, and no file system such a hole


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder behind a URL: the file system of its store, and its name there.

    As a text it is the URL without credentials and query.
    """

    url: str = field(repr=False)
    fs: AbstractFileSystem
    path: str

    def __str__(self) -> str:
        return redact_url(self.url)

    @property
    def scheme(self) -> str:
        """``s3`` and the like."""
        return scheme_of(self.url)

    def child_path(self, name: str) -> str:
        """Return the store's name for the file ``name``, a path with slashes, below this folder."""
        return f"{self.path.rstrip('/')}/{name}"

    def is_folder(self) -> bool:
        """Whether it is a folder. Raises RemoteError if nothing is there, or if nobody can tell."""
        with translate_store_errors(self.url):
            return bool(self.fs.info(self.path)["type"] == "directory")

    def size(self) -> int | None:
        """The bytes of a file; None where the store tells them only with the content.

        Raises RemoteError.
        """
        with translate_store_errors(self.url):
            return _listed_size(self.fs.info(self.path))

    def names(self, is_wanted: Callable[[str], bool]) -> list[str]:
        """List the files directly in this folder, sorted, checked as by ``sizes``.

        Raises RemoteError.
        """
        return list(self.sizes(is_wanted, depth=1))

    def sizes(self, is_wanted: Callable[[str], bool], depth: int | None = None) -> dict[str, int | None]:
        """List the bytes of every file below this folder by its path from here, sorted.

        With ``depth`` 1, only the files directly in the folder. What the listing names outside of
        the folder is left out. A name that could lead out of the folder or to another store is
        refused if ``is_wanted`` says that somebody will read the file: without it, an incomplete
        folder would pass for a complete one. Other such names are left out.

        Raises RemoteError.
        """
        prefix = self.child_path("")
        with translate_store_errors(self.url):
            listing = self.fs.find(self.path, maxdepth=depth, detail=True)
            sizes = {
                name.removeprefix(prefix): _listed_size(entry)
                for name, entry in sorted(listing.items())
                if name.startswith(prefix) and name != prefix and entry.get("type") == "file"
            }
        safe_names = [name for name in sizes if self._is_safe(name, is_wanted)]
        # A listing is foreign input: it may go deeper than it was asked to.
        return {name: sizes[name] for name in safe_names if depth != 1 or "/" not in name}

    def matches(self, is_wanted: Callable[[str], bool]) -> list[str]:
        """List the URLs that ``path`` matches as a pattern, sorted, checked as by ``sizes``.

        Raises RemoteError.
        """
        fixed_part = re.split(r"[*?\[]", self.path, maxsplit=1)[0]
        folder, slash, _ = fixed_part.rpartition("/")
        prefix = folder + slash
        with translate_store_errors(self.url):
            names = sorted(name for name in self.fs.glob(self.path) if name.startswith(prefix))
            return [
                self.fs.unstrip_protocol(name)
                for name in names
                if self._is_safe(name.removeprefix(prefix), is_wanted) and is_wanted(name)
            ]

    def _is_safe(self, name: str, is_wanted: Callable[[str], bool]) -> bool:
        """Whether a listed name is that of a file below the folder.

        Raises RemoteError for a name that is not, and is wanted.
        """
        fault = spelling_fault(name)
        if fault is None and "::" in name:  # fsspec takes a.pt::file://… for a chain of stores
            fault = "which fsspec would take for files of two stores"
        if fault is not None and is_wanted(name):
            raise RemoteError(
                f"{self}: expected its listing to name files below it, found {shown_name(name)}, "
                f"{fault}. Do not trust this folder; if it is yours, rename the file."
            )
        return fault is None


def _listed_size(entry: Mapping[str, Any]) -> int | None:
    """Return the bytes of a file; None where the store gives none, or a number no file has."""
    size = entry.get("size")
    return None if size is None or not 0 <= int(size) < _LARGEST else int(size)


def open_remote(url: str) -> RemotePath:
    """Return what a URL stands for; no network is used yet.

    Raises UsageError for an unknown scheme, RemoteError where a package is missing.
    """
    from fsspec.core import url_to_fs

    remember_url(url)
    _require_supported_scheme(url)
    with translate_store_errors(url):
        fs, path = url_to_fs(url)
    remember_storage_options(fs.storage_options)
    return RemotePath(url, fs, path)


def open_url(url: str) -> IO[bytes]:
    """Open a file behind a URL, to be read from beginning to end.

    Raises RemoteError. Reading the file raises what the store's client raises.
    """
    remote = open_remote(url)
    with translate_store_errors(url):
        return cast("IO[bytes]", remote.fs.open(remote.path, "rb"))


@contextlib.contextmanager
def translate_store_errors(url: str) -> Iterator[None]:
    """Let whatever a store's client raises in the block become a RemoteError."""
    try:
        yield
    except CkptToolsError:
        raise
    except Exception as error:
        raise RemoteError(_message(url, error)) from error


def _require_supported_scheme(url: str) -> None:
    """Raise UsageError for a scheme that fsspec does not know."""
    from fsspec.registry import available_protocols, registry

    supported_schemes = {*available_protocols(), *registry}
    scheme = scheme_of(url)
    if scheme not in supported_schemes:
        similar = get_close_matches(scheme, sorted(supported_schemes), 1, 0.5)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        raise UsageError(
            f"{redact_url(url)}: expected a kind of store that fsspec knows "
            f"(s3, gs, hf, http, …), found {scheme}.{hint}"
        )


def _message(url: str, error: Exception) -> str:
    """Say what an exception of a store's client means, and what to do."""
    shown, scheme = redact_url(url), scheme_of(url)
    package = _PACKAGES.get(scheme)
    if isinstance(error, ImportError):
        needed = package or "a package"
        advice = one_line(without_fragments(str(error)))
        if package:
            advice = f"Run: pip install {package}"
        return f"{shown}: reading {scheme}:// needs {needed}, which is not installed. {advice}"
    if is_missing_file_error(error):
        return f"{shown}: expected a file or folder there, found nothing. Check the URL."
    description = describe_store_error(error)
    if is_access_refused_error(error):
        accepted_by_client = f"that {package} takes " if package and package != "aiohttp" else ""
        return (
            f"{shown}: access is refused ({description}). Check the name, and the credentials "
            f"{accepted_by_client}from the environment."
        )
    return f"{shown}: cannot be reached ({description}). Check the network and the URL, and run again."


def describe_store_error(error: BaseException) -> str:
    """Return the type and the message of a client's error, on one line and without secrets."""
    # Some clients raise FileNotFoundError for every failure; then the cause says more.
    error = _causes(error)[-1] if isinstance(error, FileNotFoundError) else error
    text = " ".join(without_fragments(str(error)[:_SEARCHED]).split())[:_SHOWN]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_missing_file_error(error: BaseException) -> bool:
    """Whether an error means that there is no such file.

    Some clients raise FileNotFoundError for every failure, but keep the cause with it: a status
    of HTTP decides, and without one every cause must mean that something is missing.
    """
    if not isinstance(error, FileNotFoundError):
        return False
    status = _http_status(error)
    if status is not None:
        return status == 404
    return all(isinstance(cause, (FileNotFoundError, KeyError)) for cause in _causes(error))


def is_access_refused_error(error: BaseException) -> bool:
    """Whether an error means that the credentials do not suffice, or that there are none."""
    names = [type(cause).__name__.lower() for cause in _causes(error)]
    is_named_so = any(word in name for name in names for word in _ACCESS_REFUSED)
    return is_named_so or _http_status(error) in (401, 403)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error, its cause, the cause of that, and so on."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _http_status(error: BaseException) -> int | None:
    """Return the status of HTTP that an error or one of its causes holds, under any usual name."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        for status in (getattr(cause, "status", None), getattr(response, "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def transfer_callback(report_bytes: Callable[[int], object]) -> Any:
    """Return a callback for a transfer of fsspec that reports how many bytes have passed so far."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"bytes": lambda size, value, **_: report_bytes(value)})
