"""Reading the object in a file of any pickle format, with a clear error for a malformed file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.pickles import archive, legacy
from ckpt_tools.storage.formats.pickles.blob import Blob, open_blob
from ckpt_tools.storage.formats.pickles.instructions import read_pickle
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError
from ckpt_tools.storage.formats.pickles.tarball import is_tar, read_tar
from ckpt_tools.storage.formats.pickles.trusted_pickle import load_trusted
from ckpt_tools.storage.formats.pickles.value_resolver import SafeResolver

__all__ = ["load_archive", "load_pickle", "load_stream"]

_DAMAGED = "The file is damaged or was cut short; copy or download it again."


def load_pickle(path: Path, *, trust: bool = False) -> object:
    """Return the object in a file of ``torch.save`` or ``pickle.dump``, of any version or protocol.

    Tensors are plain ones on the CPU, without gradients, and memory-mapped where the format
    permits. Nothing is imported or called: what is neither a tensor nor plain data is an
    OpaqueObject. With ``trust`` the real classes are used, and the file may execute code.

    Raises CheckpointError.
    """
    if trust:
        return _explain_errors(path, lambda: load_trusted(path))

    def read() -> object:
        with open_blob(path) as blob:
            return _read_any_format(blob, Limits.for_file_size(len(blob.data)))

    return _explain_errors(path, read)


def load_stream(stream: BinaryIO, where: object = "the stream") -> object:
    """Do what ``load_pickle`` does for an open binary file, whose bytes are copied.

    ``where`` names it in errors.

    Raises CheckpointError.
    """

    def read() -> object:
        data = stream.read()
        return _read_any_format(Blob(data), Limits.for_file_size(len(data)))

    return _explain_errors(where, read)


def load_archive(path: Path, pickle: str = "data.pkl") -> object:
    """Return the object in one pickle of a zip archive.

    Its storages are the records in the folder of the same name. Raises CheckpointError.
    """

    def read() -> object:
        with open_blob(path) as blob:
            limits = Limits.for_file_size(len(blob.data))
            return archive.read_archive(blob, limits, _nested_reader(limits), pickle)

    return _explain_errors(path, read)


def _read_any_format(blob: Blob, limits: Limits) -> object:
    head = blob.data[:512]
    inner = _nested_reader(limits)
    if head.startswith(archive.ZIP_MAGIC):
        return archive.read_archive(blob, limits, inner)
    # The magic number is a pickle itself, so that other bytes stand before it.
    if legacy.LEGACY_MAGIC in head[:32]:
        return legacy.read_legacy(blob, limits, inner)
    if is_tar(head):
        return read_tar(blob, limits, inner)
    # Every tensor is pickled as a call of a function whose name begins with _rebuild_. Without one
    # the weights, if there are any, are numpy arrays.
    arrays = blob.data.find(b"_rebuild_") < 0
    return read_pickle(blob.data, SafeResolver(limits, inner=inner, arrays=arrays), limits)[0]


def _nested_reader(limits: Limits) -> Callable[[bytes], object]:
    return partial(_load_nested_pickle, limits=limits)


def _load_nested_pickle(raw: bytes, limits: Limits) -> object:
    if not limits.nesting:
        raise MalformedFileError("a pickle inside a pickle inside a pickle, and so on")
    # The outer pickle has the same limits, so that nesting does not multiply what a file may cost.
    limits.nesting -= 1
    try:
        return _read_any_format(Blob(raw), limits)
    finally:
        limits.nesting += 1


def _explain_errors(where: object, read: Callable[[], object]) -> object:
    """Return what ``read`` returns.

    Whatever it raises becomes a CheckpointError that names ``where``.
    """
    try:
        return read()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{where}: cannot be read ({error.strerror or error}). Check its permissions."
        ) from error
    except MalformedFileError as fault:
        raise CheckpointError(
            f"{where}: expected a complete checkpoint, found {fault}. {_DAMAGED}"
        ) from fault
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{where}: expected a complete torch.save archive, found one without the table of "
            f"contents at the end ({error}). The file was cut short; copy or download it again."
        ) from error
    except Exception as error:
        # A damaged file can make numpy, torch, tarfile and Python's codecs raise almost anything.
        detail = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
        raise CheckpointError(
            f"{where}: expected a complete checkpoint, found one that does not read to its end "
            f"({detail}). {_DAMAGED}"
        ) from error
