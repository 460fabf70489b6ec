"""Writing to a store: whole or not at all, as far as the store allows, and compared bytewise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt_tools.errors import CkptToolsError, OutputError
from ckpt_tools.machine.temporary_folders import new_temporary_name
from ckpt_tools.redaction import without_fragments
from ckpt_tools.remote.mirror import MirroredStore
from ckpt_tools.remote.remote_store import (
    RemotePath,
    describe_store_error,
    is_missing_file_error,
    transfer_callback,
    translate_store_errors,
)

__all__ = ["check_remote_target", "may_write_beside", "upload_file"]

_READ_ONLY = frozenset({"http", "https"})
# On the Hugging Face Hub every write is a commit that others see: no probe is written there, and
# no output that the user did not ask for.
_EVERY_WRITE_IS_A_COMMIT = frozenset({"hf"})
# In these an object appears when all of it has arrived. Others show a file that grows.
_APPEARS_WHOLE = frozenset(
    {
        "s3",
        "s3a",
        "gs",
        "gcs",
        "abfs",
        "abfss",
        "az",
        "oss",
        "oci",
        "tos",
        *_EVERY_WRITE_IS_A_COMMIT,
    }
)
_PIECE = 1 << 22  # bytes that are compared at a time


def may_write_beside(store: MirroredStore) -> bool:
    """Whether an output that nobody named may go into a store: not over http, not to the Hub."""
    return store.scheme not in _READ_ONLY | _EVERY_WRITE_IS_A_COMMIT


def check_remote_target(store: MirroredStore, target: Path, *, overwrite: bool) -> None:
    """Refuse at once a remote target that cannot be written at the end.

    ``target`` is the path of the copy. A small file is written beside the target and removed, once
    for each folder: whether credentials allow writing can only be found out by writing.

    Raises OutputError, RemoteError.
    """
    remote = store.remote_path(target)
    if remote.scheme in _READ_ONLY:
        raise _unwritable_scheme_error(remote)
    if store.query(target):
        raise OutputError(
            f"{remote}: nothing can be written to a URL with ? or # in it. Give --output without them."
        )
    _require_free(remote, overwrite)
    is_below_bucket = target.parent != store.folder
    probes = remote.scheme not in _EVERY_WRITE_IS_A_COMMIT and target.parent not in store.writable
    if is_below_bucket and probes:
        _probe(remote, store.remote_path(target.parent))
        store.writable.add(target.parent)
    store.mirror.make_folder(target.parent)


def upload_file(file: Path, store: MirroredStore, target: Path, *, overwrite: bool) -> None:
    """Upload a file, read it back and compare it, and make it the copy of its target.

    Stores in which an object appears when it is complete get it in one step. Others get it under
    another name, and it is renamed once it has been compared.

    Raises OutputError; then nothing new is left in the store, or the message names it.
    """
    remote = store.remote_path(target)
    size = file.stat().st_size
    with (
        _translate_write_errors(remote),
        store.mirror.watch(str(remote), size) as report_bytes,
    ):
        replaces = _require_free(remote, overwrite)
        callback = transfer_callback(report_bytes)
        if remote.scheme in _APPEARS_WHOLE:
            with _remove_on_failure(remote, remote.path, keep=replaces):
                remote.fs.put_file(str(file), remote.path, callback=callback)
            with _remove_on_failure(remote, remote.path):
                _compare(remote, file, remote.path)
        else:
            temporary = f"{remote.path.rpartition('/')[0]}/.{new_temporary_name()}.tmp"
            with _remove_on_failure(remote, temporary):
                remote.fs.put_file(str(file), temporary, callback=callback)
                _compare(remote, file, temporary)
                replaces = _require_free(remote, overwrite)
                with _remove_on_failure(remote, remote.path, keep=replaces):
                    _move(remote, temporary)
                    _require_size(remote, size)
    os.replace(file, target)
    store.fetched.add(target)


def _compare(remote: RemotePath, file: Path, name: str) -> None:
    """Read a file of the store back and compare it with the local one.

    Raises OSError if they differ, and whatever the store's client raises.
    """
    remote.fs.invalidate_cache()
    with file.open("rb") as sent, remote.fs.open(name, "rb") as stored:
        while piece := sent.read(_PIECE):
            if stored.read(len(piece)) != piece:
                raise OSError("other bytes came back than were sent")
        if stored.read(1):
            raise OSError("more bytes came back than were sent")


def _move(remote: RemotePath, temporary: str) -> None:
    """Rename a file of the store: in one step if the store can do that, else by a copy in it."""
    from fsspec import AbstractFileSystem

    if type(remote.fs).mv is not AbstractFileSystem.mv:
        remote.fs.mv(temporary, remote.path)
        return
    remote.fs.cp_file(temporary, remote.path)
    remote.fs.rm_file(temporary)


def _require_size(remote: RemotePath, size: int) -> None:
    remote.fs.invalidate_cache()
    stored_size = remote.fs.info(remote.path)["size"]
    if stored_size != size:
        raise OSError(f"{stored_size:,} bytes after the move, of {size:,}")


def _require_free(remote: RemotePath, overwrite: bool) -> bool:
    """Return whether there is a file, which may be replaced.

    Raises OutputError for a file that may not be replaced and for a folder, RemoteError.
    """
    with translate_store_errors(remote.url):
        remote.fs.invalidate_cache()
        try:
            entry = remote.fs.info(remote.path)
        except FileNotFoundError as error:
            if not is_missing_file_error(error):
                raise
            return False
    if entry["type"] == "directory":
        raise OutputError(f"{remote}: expected the name of a file to write, found a folder. Add a file name.")
    if not overwrite:
        raise OutputError(
            f"{remote}: expected no such file, found one. Pass --overwrite to replace it, or another name."
        )
    return True


def _probe(remote: RemotePath, folder: RemotePath) -> None:
    """Write an empty file into the folder of a target and remove it. Raises OutputError."""
    name = folder.child_path(f".{new_temporary_name()}.tmp")
    with _translate_write_errors(remote):
        if remote.scheme not in _APPEARS_WHOLE:  # in those, folders are only a part of names
            remote.fs.makedirs(folder.path, exist_ok=True)
        with _remove_on_failure(remote, name):
            remote.fs.pipe_file(name, b"")
            remote.fs.rm_file(name)


@contextlib.contextmanager
def _translate_write_errors(remote: RemotePath) -> Iterator[None]:
    """Let whatever a store's client raises in the block become an OutputError."""
    try:
        yield
    except CkptToolsError as error:
        error.args = (f"{error}{_notes(error)}",)
        raise
    except NotImplementedError as error:
        raise _unwritable_scheme_error(remote) from error
    except Exception as error:
        left_behind = _notes(error) or " Nothing was left behind."
        raise OutputError(
            f"{remote}: cannot be written there ({describe_store_error(error)}).{left_behind} "
            "Check the credentials, or choose another place with --output."
        ) from error


def _unwritable_scheme_error(remote: RemotePath) -> OutputError:
    return OutputError(
        f"{remote}: nothing can be written over {remote.scheme}. Choose another place with --output."
    )


def _notes(error: BaseException) -> str:
    return "".join(f" {note}" for note in getattr(error, "__notes__", ()))


@contextlib.contextmanager
def _remove_on_failure(remote: RemotePath, name: str, *, keep: bool = False) -> Iterator[None]:
    """Remove a file of the store if the block fails; if that fails, too, the error says so.

    ``keep``: the name belongs to an earlier file, which must stay.
    """
    try:
        yield
    except BaseException as error:
        if not keep and not _try_remove(remote, name):
            leftover = without_fragments(str(remote.fs.unstrip_protocol(name)))
            error.add_note(f"{leftover} may be left there; remove it.")
        raise


def _try_remove(remote: RemotePath, name: str) -> bool:
    """Try to remove a file of the store, and return whether it is gone."""
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
