"""Stores as fsspec knows them: ``s3:// gs:// hf:// http://`` and all others that are installed."""

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
from ckpt_tools.remote.address import redact_url, remember_storage_options, remember_url, scheme_of

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

_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
    "oss": "ossfs", "oci": "ocifs", "smb": "smbprotocol", "webdav": "webdav4", "hdfs": "pyarrow",
}  # fmt: skip
_REFUSED = ("credential", "accessdenied", "forbidden", "unauthorized", "authentication", "permission")
_READ, _LONGEST = 10_000, 300  # characters of what a store's client says that are looked at, and that are shown
_LARGEST = 1 << 60  # bytes: no store holds such a file, and no file system such a hole


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder behind a URL: the file system of its store, and the name it has there."""

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
        """What the store calls the file ``name``, a path with slashes, below this folder."""
        return f"{self.path.rstrip('/')}/{name}"

    def is_folder(self) -> bool:
        """Raises RemoteError if there is nothing, or nobody can tell."""
        with translate_store_errors(self.url):
            return bool(self.fs.info(self.path)["type"] == "directory")

    def size(self) -> int | None:
        """Bytes of a file, None where the store does not tell before. Raises RemoteError."""
        with translate_store_errors(self.url):
            return _size(self.fs.info(self.path))

    def names(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names of the files directly in this folder, sorted, checked as by ``sizes``. Raises RemoteError."""
        return list(self.sizes(wanted, depth=1))

    def sizes(self, wanted: Callable[[str], bool], depth: int | None = None) -> dict[str, int | None]:
        """Bytes of every file below this folder, by its path from here, sorted; with ``depth`` 1 only of those in it.

        A listing is foreign input. What it names outside of this folder is not listed. A name that could lead out of
        the folder or to another store is refused if it is ``wanted``, and left out otherwise: nobody needs a file that
        nobody wants, but half of what is wanted would pass for all of it.

        Raises RemoteError.
        """
        start = self.child_path("")
        with translate_store_errors(self.url):
            listing = self.fs.find(self.path, maxdepth=depth, detail=True)
            sizes = {
                name.removeprefix(start): _size(entry)
                for name, entry in sorted(listing.items())
                if name.startswith(start) and name != start and entry.get("type") == "file"
            }
        safe = [name for name in sizes if self._is_safe(name, wanted)]
        return {name: sizes[name] for name in safe if depth != 1 or "/" not in name}

    def matches(self, wanted: Callable[[str], bool]) -> list[str]:
        """URLs of what ``path`` matches as a pattern, sorted, checked as by ``sizes``. Raises RemoteError."""
        before, slash, _ = re.split(r"[*?\[]", self.path, maxsplit=1)[0].rpartition("/")
        start = before + slash
        with translate_store_errors(self.url):
            listed = sorted(name for name in self.fs.glob(self.path) if name.startswith(start))
            safe = [name for name in listed if self._is_safe(name.removeprefix(start), wanted)]
            return [self.fs.unstrip_protocol(name) for name in safe if wanted(name)]

    def _is_safe(self, name: str, wanted: Callable[[str], bool]) -> bool:
        """Raises RemoteError for a name that is wanted and not safe."""
        fault = spelling_fault(name)
        if fault is None and "::" in name:  # fsspec takes it for a chain of stores: a.pt::file://…
            fault = "which fsspec would take for files of two stores"
        if fault is not None and wanted(name):
            raise RemoteError(
                f"{self}: expected its listing to name files below it, found {shown_name(name)}, {fault}. Do not trust "
                "this folder; if it is yours, rename the file."
            )
        return fault is None


def _size(entry: Mapping[str, Any]) -> int | None:
    """Bytes of a file as its store lists it; None where it tells none, or a number that no file has."""
    size = entry.get("size")
    return None if size is None or not 0 <= int(size) < _LARGEST else int(size)


def open_remote(url: str) -> RemotePath:
    """What a URL stands for; no network yet. Raises UsageError for an unknown scheme, RemoteError without a package."""
    from fsspec.core import url_to_fs

    remember_url(url)
    _require_known(url)
    with translate_store_errors(url):
        fs, path = url_to_fs(url)
    remember_storage_options(fs.storage_options)
    return RemotePath(url, fs, path)


def open_url(url: str) -> IO[bytes]:
    """A file behind a URL, to be read from beginning to end. Raises RemoteError; reading raises what the store does."""
    remote = open_remote(url)
    with translate_store_errors(url):
        return cast("IO[bytes]", remote.fs.open(remote.path, "rb"))


@contextlib.contextmanager
def translate_store_errors(url: str) -> Iterator[None]:
    """Whatever a store's client raises within becomes a RemoteError that says what to do."""
    try:
        yield
    except CkptToolsError:
        raise
    except Exception as error:
        raise RemoteError(_sentence(url, error)) from error


def _require_known(url: str) -> None:
    from fsspec.registry import available_protocols, registry

    known = {*available_protocols(), *registry}
    scheme = scheme_of(url)
    if scheme not in known:
        near = get_close_matches(scheme, sorted(known), 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"{redact_url(url)}: expected a kind of store that fsspec knows (s3, gs, hf, http, …), found {scheme}.{hint}"
        )


def _sentence(url: str, error: Exception) -> str:
    shown, scheme = redact_url(url), scheme_of(url)
    package = _PACKAGES.get(scheme)
    if isinstance(error, ImportError):
        install = f"Run: pip install {package}" if package else one_line(without_fragments(str(error)))
        return f"{shown}: reading {scheme}:// needs {package or 'a package'}, which is not installed. {install}"
    if is_missing_file_error(error):
        return f"{shown}: expected a file or folder there, found nothing. Check the URL."
    said = describe_store_error(error)
    if is_access_refused_error(error):
        taken = f"that {package} takes " if package and package != "aiohttp" else ""
        return f"{shown}: access is refused ({said}). Check the name, and the credentials {taken}from the environment."
    return f"{shown}: cannot be reached ({said}). Check the network and the URL, and run again."


def describe_store_error(error: BaseException) -> str:
    """What a store's client says, on one line and without secrets."""
    told = _causes(error)[-1] if isinstance(error, FileNotFoundError) else error
    text = " ".join(without_fragments(str(told)[:_READ]).split())[:_LONGEST]
    return f"{type(told).__name__}: {text}" if text else type(told).__name__


def is_missing_file_error(error: BaseException) -> bool:
    """Whether an error means that there is no such file: some clients say so of every failure, but name its cause."""
    if not isinstance(error, FileNotFoundError):
        return False
    status = _status(error)
    if status is not None:
        return status == 404
    return all(isinstance(cause, (FileNotFoundError, KeyError)) for cause in _causes(error))


def is_access_refused_error(error: BaseException) -> bool:
    """Whether an error means that the credentials do not suffice, or that there are none."""
    names = [type(cause).__name__.lower() for cause in _causes(error)]
    return _status(error) in (401, 403) or any(word in name for name in names for word in _REFUSED)


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of, itself or through its cause."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        for status in (getattr(cause, "status", None), getattr(response, "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def transfer_callback(seen: Callable[[int], object]) -> Any:
    """What a transfer takes as ``callback``, to tell how many bytes have passed so far."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"seen": lambda size, value, **_: seen(value)})
