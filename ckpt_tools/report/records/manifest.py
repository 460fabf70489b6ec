"""The manifest of a folder: one line of JSON for every checkpoint that came to an end.

Each line is one record, and the first thing in it is the checkpoint. A file counts as a manifest if every line has
exactly the fields of a record, in the right types. A line that a killed run left unfinished is passed over; it can
still be told by how records begin. Any other line means that somebody else writes to the file, too, and it is left
alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from ckpt_tools.errors import OutputError
from ckpt_tools.evaluate.scores import GateFailed
from ckpt_tools.jobs.earlier_output import EarlierOutput
from ckpt_tools.jobs.many.engine import Record
from ckpt_tools.jobs.many.folder_run import ItemResult
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.plain_text import shorten_message
from ckpt_tools.redaction import without_fragments, without_secrets
from ckpt_tools.report.records.metrics_json import metrics_json
from ckpt_tools.report.records.reestimation_json import outcome_json
from ckpt_tools.storage.output.atomic_write import check_target, deliver_file
from ckpt_tools.storage.output.integrity import FileDigest
from ckpt_tools.storage.output.own_files import (
    OwnFileKind,
    open_own_file,
    read_own_file,
    require_distinct_file,
    require_own_content,
)
from ckpt_tools.urls import is_url

__all__ = ["Manifest", "check_manifest", "make_record", "parse_records"]

_BEGINNING = b'{"checkpoint": '  # of every record
_Types = type | tuple[type, ...]
_NONE = type(None)
_FIELDS: Mapping[str, _Types] = {
    "checkpoint": str,
    "status": str,
    "output": (str, _NONE),
    "error": (str, _NONE),
    "exit_code": int,
    "seconds": (int, float),
    "source_sha256": (str, _NONE),
    "settings": (str, _NONE),
    "metrics": (dict, _NONE),
    "report": (dict, _NONE),
}
_NEWER_FIELDS: Mapping[str, _Types] = {  # which version 0.1.0 did not write
    "output_sha256": (str, _NONE),
    "output_bytes": (int, _NONE),
    "replaced": (str, _NONE),
    "also_named": list,
}


def check_manifest(place: LocationLike, others: Iterable[LocationLike | None] = ()) -> None:
    """Refuse a manifest that could not be appended to, before anything is written. ``others``: the job's other files.

    Raises UsageError if it is one of the others, OutputError if it is another file, or none that may be written to,
    RemoteError.
    """
    require_distinct_file(place, _KIND, others)
    read_own_file(place, _KIND)


class Manifest:
    """A JSONL file that is only ever appended to. What a killed run left unfinished in it is passed over.

    A remote one is fetched first and written anew by ``publish``: stores append nothing.
    """

    def __init__(self, place: LocationLike) -> None:
        """Read what earlier runs recorded. Raises OutputError if the file cannot be read and written, RemoteError."""
        self.location = Location.of(place)
        path, is_remote = self.location.path, self.location.store is not None
        self._made: dict[tuple[str, str, str], Record] = {}  # what is known of outputs, by what made them
        self._latest: dict[str, Record] = {}  # the latest record of an output, by its place
        earlier_content = read_own_file(self.location, _KIND)
        self._fresh = earlier_content is None
        if is_remote:
            check_target(self.location, overwrite=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_remote:  # records are appended to a copy, which ``publish`` uploads
                path.write_bytes(earlier_content or b"")
            content, self._file = self._begin(new=self._fresh and not is_remote)
        except OSError as error:
            raise OutputError(
                f"{self.location}: expected a manifest to append to, found: {error}. Give --manifest."
            ) from error
        for record in parse_records(content):
            self._keep(record)

    def _begin(self, *, new: bool) -> tuple[bytes, tuple[int, int]]:
        """Make the file, or look at it once more where it is written to; its content, and which file it is."""
        with self._open(new=new) as file:
            file.seek(0)
            content = file.read()
            require_own_content(self.location, _KIND, content)
            if content and not content.endswith(b"\n"):  # killed while writing
                file.write(b"\n")
            return content, _device_and_inode(file)

    def _open(self, *, new: bool) -> BinaryIO:
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        return os.fdopen(open_own_file(self.location.path, _KIND, flags), "a+b")

    def publish(self) -> None:
        """Put a remote manifest where it belongs; remove one that this run began for nothing. Raises OutputError."""
        path = self.location.path
        if self._fresh and path.exists() and not path.stat().st_size:
            path.unlink(missing_ok=True)
        elif self.location.store is not None:
            read_own_file(self.location, _KIND)  # once more: the job may have taken hours
            deliver_file(path, self.location, overwrite=True)

    def recorded_output(self, output: LocationLike) -> EarlierOutput | None:
        """What the latest record of an output says of it."""
        record = self._latest.get(_place(without_secrets(str(output))))
        if record is None or not record.get("source_sha256") or not record.get("settings"):
            return None
        sha256, size = record.get("output_sha256"), record.get("output_bytes")
        file = FileDigest(sha256, size) if sha256 is not None and size is not None else None
        return EarlierOutput(record["source_sha256"], record["settings"], file)

    def add_record(self, record: Record) -> Record:
        """Add a line and return what is known of its checkpoint.

        What was done before has its earlier line, if that tells of the same output: made of the same bytes with the
        same settings.
        """
        earlier = self._made.get(_maker(record))
        if record["status"] == "done before" and earlier is not None:
            return {**earlier, **{name: record[name] for name in _OF_THIS_RUN if name in record}}
        self._keep(record)
        self._append(json.dumps(record).encode() + b"\n")
        return record

    def _append(self, line: bytes) -> None:
        """Append to the file that was looked at in the beginning, and to no other that has its name by now."""
        try:
            new = not os.path.lexists(self.location.path)  # somebody has removed it
            with self._open(new=new) as file:
                if new:
                    self._file = _device_and_inode(file)
                if _device_and_inode(file) != self._file:
                    raise OutputError(
                        f"{self.location}: expected the manifest that was there when the run began, found another "
                        "file in its place. Nothing was written to it; run again."
                    )
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.location}: cannot be written ({error.strerror}). Give another --manifest."
            ) from error

    def _keep(self, record: Record) -> None:
        """The latest record of an output; one without a report takes the place of none with one."""
        if not record.get("output"):
            return
        self._latest[_place(str(record["output"]))] = record
        if record.get("report") or _maker(record) not in self._made:
            self._made[_maker(record)] = record


_OF_THIS_RUN = ("checkpoint", "also_named", "output", "status", "output_sha256", "output_bytes", "replaced")


def make_record(result: ItemResult) -> Record:
    """A result as a line of the manifest.

    ``report`` is what ``--json`` says of a single checkpoint; ``metrics_by_name``, what a gate said no to. ``source_sha256``
    and ``settings`` are those that stand in the output, ``output_sha256`` and ``output_bytes`` those of its file.
    ``replaced`` says what was wrong with an earlier output that this one took the place of. ``also_named`` are further
    paths to the checkpoint's file.
    """
    error = result.error
    written = result.made.file if result.made else None
    record: Record = without_secrets(
        {
            "checkpoint": str(result.item.checkpoint),
            "also_named": list(map(str, result.item.also_named)),
            "status": result.status,
            "output": str(result.item.output) if result.status in ("done", "done before") else None,
            "error": None if error is None else _message(error, known=result.error_is_expected),
            "exit_code": getattr(error, "exit_code", 1) if error else 0,
            "seconds": round(result.seconds, 3),
            "source_sha256": result.made.source_sha256 if result.made else None,
            "settings": result.made.settings if result.made else None,
            "output_sha256": written.sha256 if written else None,
            "output_bytes": written.size if written else None,
            "replaced": result.replaced or None,
            "metrics": metrics_json(error.metrics) if isinstance(error, GateFailed) else None,
            "report": None if result.outcome is None else outcome_json(result.outcome),
        }
    )
    return record


def _device_and_inode(file: BinaryIO) -> tuple[int, int]:
    there = os.fstat(file.fileno())
    return there.st_dev, there.st_ino


def _message(error: BaseException, *, known: bool) -> str:
    """What went wrong, without secrets and of bounded size; with its kind where it is none of our own errors."""
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return shorten_message(without_fragments(text))


def _maker(record: Record) -> tuple[str, str, str]:
    """What an output was made of, and where it lies, however that was written."""
    return _place(str(record.get("output"))), str(record.get("source_sha256")), str(record.get("settings"))


def _place(output: str) -> str:
    return output if is_url(output) else os.path.abspath(output)  # noqa: PTH100 - without ..


def _is_manifest(content: bytes) -> bool:
    """Whether every line is a record, or the beginning of one that a killed run left."""
    return all(_is_record(line) or _is_unfinished(line) for line in content.splitlines() if line.strip())


def _is_record(line: bytes) -> bool:
    """Whether a line has the fields of a record of this or of an earlier version, in the right types, and no others."""
    record = _parse_line(line)
    if record is None or not _FIELDS.keys() <= record.keys():
        return False
    kinds = {**_FIELDS, **_NEWER_FIELDS}
    return all(name in kinds and isinstance(value, kinds[name]) for name, value in record.items())


def _is_unfinished(line: bytes) -> bool:
    """Whether a line is a record whose end is missing."""
    return (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)) and _parse_line(line) is None


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def parse_records(content: bytes) -> Iterator[dict[str, Any]]:
    """The records in a manifest, in order; lines that are none are passed over."""
    for line in content.splitlines():
        record = _parse_line(line)
        if record is not None and isinstance(record.get("checkpoint"), str):
            yield record


_KIND = OwnFileKind("a manifest", "--manifest", _is_manifest)
