"""The records of zip archives other than those of torch.save: exported programs and TorchScript."""

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
def open_zip_archive(path: Path, expected: str) -> Iterator[Archive]:
    """Open a zip archive and give its records; ``expected`` is its name in messages.

    Raises CheckpointError for a damaged archive. Other errors inside the ``with`` become
    CheckpointErrors, too, as they mean that the records are not what they should be.
    """
    try:
        with open_blob(path) as blob:
            archive = Archive(blob)
            # An archive that was cut short may end in a complete one, which was a record of it, and
            # zipfile would open that one. Its first record does not begin with the file.
            if min((record.header_offset for record in archive.records.values()), default=0) > 0:
                raise MalformedFileError("one whose end belongs to another archive")
            yield archive
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except Exception as error:  # zipfile and its codecs raise errors of many kinds
        problem = f"one that cannot be read ({type(error).__name__}: {error})"
        if isinstance(error, MalformedFileError):
            problem = str(error)
        raise CheckpointError(
            f"{path}: expected {expected}, found {problem}. The file is damaged or was cut short; "
            "copy or download it again."
        ) from error


def record_names(path: Path) -> set[str]:
    """Return the names of a zip archive's records, without the folder that holds them all.

    Raises CheckpointError.
    """
    with open_zip_archive(path, f"a complete archive of {path.stat().st_size:,} bytes") as archive:
        return set(archive.records)
