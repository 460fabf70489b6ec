"""A folder of images behind a URL, which is listed once and read file by file."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath

from ckpt_tools.remote.remote_store import RemotePath, is_missing_file_error, translate_store_errors

__all__ = ["RemoteFolder"]

_RETRY_PAUSES = (0.5, 2.0, 8.0)  # seconds before a read is tried again


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


@dataclass(frozen=True)
class RemoteFolder:
    """A remote folder of images, used in place of a path.

    Its methods leave hidden files and folders out, as a local search does.
    """

    remote: RemotePath

    def __str__(self) -> str:
        return str(self.remote)

    def names(self, suffixes: Collection[str]) -> list[str]:
        """List all files below the folder, without hidden files and folders.

        The names are paths within the folder. Raises RemoteError, also if the name of a file with
        one of the ``suffixes`` could lead out of the folder.
        """

        def is_wanted(name: str) -> bool:
            return _is_visible(name) and PurePosixPath(name).suffix.lower() in suffixes

        return [name for name in self.remote.sizes(is_wanted) if _is_visible(name)]

    def folders(self) -> list[str]:
        """List the names of the folders directly in it, sorted. Raises RemoteError."""
        with translate_store_errors(self.remote.url):
            entries = self.remote.fs.ls(self.remote.path, detail=True)
            names = [
                entry["name"].rstrip("/").rpartition("/")[2]
                for entry in entries
                if entry["type"] == "directory"
            ]
        return sorted({name for name in names if name and not name.startswith(".")})

    def read(self, names: Sequence[str]) -> list[BytesIO | Exception]:
        """Read the contents of files, all at once where the store can do that.

        For a file that is not there, its error is returned. Other failures are tried again a few
        times, because an image must not count as damaged when the network drops out.

        Raises RemoteError.
        """
        contents: dict[str, BytesIO | Exception] = {}
        for pause in (*_RETRY_PAUSES, None):
            missing = [name for name in names if name not in contents]
            failure = self._read_into(contents, missing)
            if failure is None:
                break
            if pause is None:
                with translate_store_errors(self.remote.url):
                    raise failure
            time.sleep(pause)
        return [contents[name] for name in names]

    def _read_into(self, contents: dict[str, BytesIO | Exception], names: Sequence[str]) -> Exception | None:
        """Read files, and return an error that a further attempt may avoid, if there was one."""
        # Without ranges, cat_ranges reads complete files, many at a time if the store can do that.
        paths = [self.remote.child_path(name) for name in names]
        failure = None
        for name, content in zip(
            names, self.remote.fs.cat_ranges(paths, None, None, on_error="return"), strict=True
        ):
            if not isinstance(content, Exception):
                contents[name] = BytesIO(content)
            elif is_missing_file_error(content):
                contents[name] = content
            else:
                failure = content
        return failure
