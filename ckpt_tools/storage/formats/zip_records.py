"""The records of a zip archive that is no torch.save file: programs and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.pickles.archive import Archive
from ckpt_tools.storage.formats.pickles.blob import open_blob
from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError

__all__ = ["open_zip_archive", "record_names"]


@contextmanager
def open_zip_archive(path: Path, what: str) -> Iterator[Archive]:
    """The records of ``what``, as a message calls it.

    Raises CheckpointError for a damaged archive, and for whatever shows inside the ``with`` that it is none.
    """
    try:
        with open_blob(path) as blob:
            archive = Archive(blob)
            # An archive cut short may end in a whole one that was a record of it; zipfile takes that.
            if min((record.header_offset for record in archive.records.values()), default=0) > 0:
                raise MalformedFileError("one whose end belongs to another archive")
            yield archive
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions."
        ) from error
    except Exception as error:  # zipfile and its codecs raise errors of many kinds
        found = (
            error
            if isinstance(error, MalformedFileError)
            else f"one that cannot be read ({type(error).__name__}: {error})"
        )
        raise CheckpointError(
            f"{path}: expected {what}, found {found}. The file is damaged or was cut short; copy or download it again."
        ) from error


def record_names(path: Path) -> set[str]:
    """The names of a zip archive's records, without the folder that holds them all. Raises CheckpointError."""
    with open_zip_archive(path, f"a complete archive of {path.stat().st_size:,} bytes") as archive:
        return set(archive.records)
