"""Writing to a store: whole or not at all, as far as the store allows, and compared with what was sent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt_tools.errors import CkptToolsError, OutputError
from ckpt_tools.redaction import without_fragments
from ckpt_tools.remote.mirror import find_mirror
from ckpt_tools.remote.remote_store import (
    RemotePath,
    describe_store_error,
    is_missing_file_error,
    transfer_callback,
    translate_store_errors,
)
from ckpt_tools.remote.temporary_folders import new_temporary_name

__all__ = ["check_remote_target", "may_write_beside", "upload_file"]

_READ_ONLY = frozenset({"http", "https"})
_COMMITS = frozenset({"hf"})  # every write is a commit that others see: no probe, and nothing unasked
# An object appears when all of it has arrived; others show a file that grows.
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "tos", *_COMMITS})
_PIECE = 1 << 22  # bytes that are compared at a time


def may_write_beside(path: Path) -> bool:
    """Whether an output that nobody named may go beside a file: not over http, and not into a repository."""
    mirror = find_mirror(path)
    return mirror is None or mirror.scheme(path) not in _READ_ONLY | _COMMITS


def check_remote_target(target: Path, *, overwrite: bool) -> None:
    """Refuse at once a remote target that cannot be written at the end; a small file beside it is written and removed.

    Raises OutputError, RemoteError.
    """
    mirror = find_mirror(target)
    assert mirror is not None
    remote = mirror.remote(target)
    if remote.scheme in _READ_ONLY:
        raise OutputError(f"{remote}: nothing can be written over {remote.scheme}. Choose another place with --output.")
    if mirror.query(target):
        raise OutputError(f"{remote}: nothing can be written to a URL with ? or # in it. Give --output without them.")
    _require_free(remote, overwrite)
    folder = mirror.remote(target.parent) if len(target.relative_to(mirror.folder).parts) > 2 else None
    if folder is not None and target.parent not in mirror.writable and remote.scheme not in _COMMITS:
        _probe(remote, folder)
        mirror.writable.add(target.parent)
    mirror.make_folder(target.parent)


def upload_file(file: Path, target: Path, *, overwrite: bool) -> None:
    """Put a file of this machine behind the URL of a place, read it back, compare, and then move it to the place.

    Stores whose uploads appear whole get it in one step. Others get it under another name, from where it is moved
    once it has been compared. Raises OutputError; then nothing new is left behind, or the message names it.
    """
    mirror = find_mirror(target)
    assert mirror is not None
    remote = mirror.remote(target)
    with _translate_write_errors(remote), mirror.watch(str(remote), file.stat().st_size) as seen:
        taken = _require_free(remote, overwrite)
        if remote.scheme in _WHOLE:
            with _remove_on_failure(remote, remote.path, keep=taken):
                remote.fs.put_file(str(file), remote.path, callback=transfer_callback(seen))
            with _remove_on_failure(remote, remote.path):
                _compare(remote, file, remote.path)
        else:
            temporary = f"{remote.path.rpartition('/')[0]}/.{new_temporary_name()}.tmp"
            with _remove_on_failure(remote, temporary):
                remote.fs.put_file(str(file), temporary, callback=transfer_callback(seen))
                _compare(remote, file, temporary)
                taken = _require_free(remote, overwrite)
                with _remove_on_failure(remote, remote.path, keep=taken):
                    _move(remote, temporary)
                    _require_size(remote, file.stat().st_size)
    os.replace(file, target)
    mirror.present.add(target)


def _compare(remote: RemotePath, file: Path, name: str) -> None:
    """Read a file of the store back. Raises OSError if it is not the local one, and whatever the store raises."""
    remote.fs.invalidate_cache()
    with file.open("rb") as sent, remote.fs.open(name, "rb") as stored:
        while piece := sent.read(_PIECE):
            if stored.read(len(piece)) != piece:
                raise OSError("other bytes came back than were sent")
        if stored.read(1):
            raise OSError("more bytes came back than were sent")


def _move(remote: RemotePath, temporary: str) -> None:
    """In one step where the store can rename, else by a copy within the store."""
    from fsspec import AbstractFileSystem

    if type(remote.fs).mv is not AbstractFileSystem.mv:
        remote.fs.mv(temporary, remote.path)
        return
    remote.fs.cp_file(temporary, remote.path)
    remote.fs.rm_file(temporary)


def _require_size(remote: RemotePath, size: int) -> None:
    remote.fs.invalidate_cache()
    found = remote.fs.info(remote.path)["size"]
    if found != size:
        raise OSError(f"{found:,} bytes after the move, of {size:,}")


def _require_free(remote: RemotePath, overwrite: bool) -> bool:
    """Whether a file is there that may be replaced. Raises OutputError if it may not, or is a folder; RemoteError."""
    with translate_store_errors(remote.url):
        remote.fs.invalidate_cache()
        try:
            found = remote.fs.info(remote.path)
        except FileNotFoundError as error:
            if not is_missing_file_error(error):
                raise
            return False
    if found["type"] == "directory":
        raise OutputError(f"{remote}: expected the name of a file to write, found a folder. Add a file name.")
    if not overwrite:
        raise OutputError(
            f"{remote}: expected no such file, found one. Pass --overwrite to replace it, or another name."
        )
    return True


def _probe(remote: RemotePath, folder: RemotePath) -> None:
    name = folder.child_path(f".{new_temporary_name()}.tmp")
    with _translate_write_errors(remote):
        if remote.scheme not in _WHOLE:  # where folders are more than a part of names
            remote.fs.makedirs(folder.path, exist_ok=True)
        with _remove_on_failure(remote, name):
            remote.fs.pipe_file(name, b"")
            remote.fs.rm_file(name)


@contextlib.contextmanager
def _translate_write_errors(remote: RemotePath) -> Iterator[None]:
    """Whatever a store's client raises within becomes an OutputError."""
    try:
        yield
    except CkptToolsError as error:
        error.args = (f"{error}{_notes(error)}",)
        raise
    except NotImplementedError as error:
        raise OutputError(
            f"{remote}: nothing can be written over {remote.scheme}. Choose another place with --output."
        ) from error
    except Exception as error:
        raise OutputError(
            f"{remote}: cannot be written there ({describe_store_error(error)}).{_notes(error) or ' Nothing was left behind.'} "
            "Check the credentials, or choose another place with --output."
        ) from error


def _notes(error: BaseException) -> str:
    return "".join(f" {note}" for note in getattr(error, "__notes__", ()))


@contextlib.contextmanager
def _remove_on_failure(remote: RemotePath, name: str, *, keep: bool = False) -> Iterator[None]:
    """Remove a file of the store if the block fails; if that fails, too, the error says so."""
    try:
        yield
    except BaseException as error:
        if not keep and not _try_remove(remote, name):
            left = without_fragments(str(remote.fs.unstrip_protocol(name)))
            error.add_note(f"{left} may be left there; remove it.")
        raise


def _try_remove(remote: RemotePath, name: str) -> bool:
    """Whether a file of the store is not there, after an attempt to remove it."""
    try:
        with contextlib.suppress(FileNotFoundError):
            remote.fs.rm_file(name)
    except Exception:  # noqa: BLE001 - whatever the store's client raises
        return _is_absent(remote, name)
    return True


def _is_absent(remote: RemotePath, name: str) -> bool:
    try:
        remote.fs.invalidate_cache()
        remote.fs.info(name)
    except FileNotFoundError as error:
        return is_missing_file_error(error)
    except Exception:  # noqa: BLE001 - as above
        return False
    return False
