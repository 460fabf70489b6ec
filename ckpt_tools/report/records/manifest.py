"""The manifest of a folder: one line of JSON for every checkpoint that was done or has failed.

Each line is one record, and its first field is the checkpoint. A file counts as a manifest if every
line has the fields of a record, in the right types, and no others. A killed run may leave an
unfinished last line: it is recognised by how every record begins, and passed over. Any other line
means that somebody else writes to the file, too, and then this tool does not touch it.
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

_BEGINNING = b'{"checkpoint": '  # of every record, since json.dumps keeps the order of the fields
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
_NEWER_FIELDS: Mapping[str, _Types] = {  # version 0.1.0 did not write these, so they may be missing
    "output_sha256": (str, _NONE),
    "output_bytes": (int, _NONE),
    "replaced": (str, _NONE),
    "also_named": list,
}
# The report on a checkpoint of an earlier run has its earlier record, with these fields of the new.
_FIELDS_OF_THIS_RUN = (
    "checkpoint",
    "also_named",
    "output",
    "status",
    "output_sha256",
    "output_bytes",
    "replaced",
)


def check_manifest(place: LocationLike, job_files: Iterable[LocationLike | None] = ()) -> None:
    """Refuse a manifest that could not be appended to, before any work is done.

    ``job_files`` are the job's other files.

    Raises:
        UsageError: the path is one of the job's other files.
        OutputError: the file there is no manifest, or it cannot be written to.
        RemoteError: a remote manifest cannot be read.
    """
    require_distinct_file(place, _KIND, job_files)
    read_own_file(place, _KIND)


class Manifest:
    """A JSONL file to which records are appended, and what its records say of earlier outputs.

    A line is never changed, so a run that is killed loses one record at most. Object stores cannot
    append: a remote manifest is fetched first, appended to on this machine, and uploaded as a whole
    by ``publish``.
    """

    def __init__(self, place: LocationLike) -> None:
        """Read what earlier runs recorded, and make the file if it is not there.

        Raises:
            OutputError: the file cannot be read and written, or it is no manifest.
            RemoteError: a remote manifest cannot be read.
        """
        self.location = Location.of(place)
        path, is_remote = self.location.path, self.location.store is not None
        self._by_origin: dict[tuple[str, str, str], Record] = {}  # best record by `_output_origin`
        self._by_output: dict[str, Record] = {}  # latest record by `_absolute_output`
        earlier_content = read_own_file(self.location, _KIND)
        self._is_new = earlier_content is None
        if is_remote:
            check_target(self.location, overwrite=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_remote:
                path.write_bytes(earlier_content or b"")  # the path of the copy on this machine
            content, self._file = self._begin(create=self._is_new and not is_remote)
        except OSError as error:
            raise OutputError(
                f"{self.location}: expected a manifest to append to, found: {error}. Give --manifest."
            ) from error
        for record in parse_records(content):
            self._remember(record)

    def _begin(self, *, create: bool) -> tuple[bytes, os.stat_result]:
        """Return the content and the status of the file that will be appended to.

        The content is checked again here: the file may have been replaced since it was first read.
        """
        with self._open(create=create) as file:
            file.seek(0)
            content = file.read()
            require_own_content(self.location, _KIND, content)
            if content and not content.endswith(b"\n"):  # an earlier run was killed while it wrote
                file.write(b"\n")
            return content, os.fstat(file.fileno())

    def _open(self, *, create: bool) -> BinaryIO:
        # O_EXCL: a file or a link that somebody puts there in the meantime is not written to.
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if create else 0)
        return os.fdopen(open_own_file(self.location.path, _KIND, flags), "a+b")

    def publish(self) -> None:
        """Upload a remote manifest; remove one that this run has made and written nothing to.

        Raises OutputError if the file at the remote place is no manifest any more, or cannot be
        replaced.
        """
        path = self.location.path
        if self._is_new and path.exists() and not path.stat().st_size:
            path.unlink(missing_ok=True)
        elif self.location.store is not None:
            read_own_file(self.location, _KIND)  # checked again, since the job may have taken hours
            deliver_file(path, self.location, overwrite=True)

    def recorded_output(self, output: LocationLike) -> EarlierOutput | None:
        """Return source, settings and digest of an output, as its latest record has them.

        None if no record says both what the output was made of and with which settings.
        """
        record = self._by_output.get(_absolute_output(without_secrets(str(output))))
        if record is None or not record.get("source_sha256") or not record.get("settings"):
            return None
        sha256, size = record.get("output_sha256"), record.get("output_bytes")
        file = FileDigest(sha256, size) if sha256 is not None and size is not None else None
        return EarlierOutput(record["source_sha256"], record["settings"], file)

    def add_record(self, record: Record) -> Record:
        """Append a record, and return it for the report of this run.

        A checkpoint that an earlier run has done has no new results. Where the manifest has its
        earlier record, made of the same bytes with the same settings, no line is added and that
        record is returned instead, with this run's names and status.
        """
        earlier = self._by_origin.get(_output_origin(record))
        if record["status"] == "done before" and earlier is not None:
            return {**earlier, **{name: record[name] for name in _FIELDS_OF_THIS_RUN if name in record}}
        self._remember(record)
        self._append(json.dumps(record).encode() + b"\n")
        return record

    def _append(self, line: bytes) -> None:
        """Append to the file that was checked in the beginning, and to no other of its name.

        The line is on the disk when this returns, so that a crash of the machine does not lose the
        record.
        """
        try:
            # If somebody has removed the manifest, it is made anew.
            is_gone = not os.path.lexists(self.location.path)
            with self._open(create=is_gone) as file:
                status = os.fstat(file.fileno())
                if is_gone:
                    self._file = status
                if not os.path.samestat(status, self._file):
                    raise OutputError(
                        f"{self.location}: expected the manifest that was there when the run "
                        "began, found another file in its place. Nothing was written to it; run again."
                    )
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.location}: cannot be written ({error.strerror}). Give another --manifest."
            ) from error

    def _remember(self, record: Record) -> None:
        if not record.get("output"):
            return
        self._by_output[_absolute_output(str(record["output"]))] = record
        # A later record without a report ("done before") must not hide an earlier one that has it.
        if record.get("report") or _output_origin(record) not in self._by_origin:
            self._by_origin[_output_origin(record)] = record


def make_record(result: ItemResult) -> Record:
    """Return a result as a record of the manifest.

    ``report`` is the dict that ``--json`` prints for a single checkpoint. ``metrics`` stands where
    a gate was not passed. ``source_sha256`` and ``settings`` are those in the metadata of the
    output, ``output_sha256`` and ``output_bytes`` those of its file. ``replaced`` says what was
    wrong with an earlier output that this one replaces. ``also_named`` are further paths to the
    checkpoint's file.
    """
    error, written = result.error, result.written
    file = written.file if written else None
    record: Record = without_secrets(
        {
            "checkpoint": str(result.item.checkpoint),
            "also_named": list(map(str, result.item.also_named)),
            "status": result.status,
            "output": str(result.item.output) if result.status in ("done", "done before") else None,
            "error": None if error is None else _message(error, expected=result.error_is_expected),
            "exit_code": getattr(error, "exit_code", 1) if error else 0,
            "seconds": round(result.seconds, 3),
            "source_sha256": written.source_sha256 if written else None,
            "settings": written.settings if written else None,
            "output_sha256": file.sha256 if file else None,
            "output_bytes": file.size if file else None,
            "replaced": result.replaced or None,
            "metrics": metrics_json(error.metrics) if isinstance(error, GateFailed) else None,
            "report": None if result.outcome is None else outcome_json(result.outcome),
        }
    )
    return record


def _message(error: BaseException, *, expected: bool) -> str:
    """Return the error's message without secrets and of bounded size.

    The message of an error that this program does not raise itself may say little, so its class
    stands before it.
    """
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    return shorten_message(without_fragments(text))


def _output_origin(record: Record) -> tuple[str, str, str]:
    """Return where an output lies, the digest of its source, and the digest of its settings."""
    output = _absolute_output(str(record.get("output")))
    return output, str(record.get("source_sha256")), str(record.get("settings"))


def _absolute_output(output: str) -> str:
    # abspath also removes "..", so that two spellings of a path are equal; Path.absolute keeps it.
    return output if is_url(output) else os.path.abspath(output)  # noqa: PTH100


def _is_manifest(content: bytes) -> bool:
    """Return whether every line is a record, or the beginning of one that a killed run left."""
    return all(_is_record(line) or _is_unfinished(line) for line in content.splitlines() if line.strip())


def _is_record(line: bytes) -> bool:
    """Return whether a line has the fields of a record, of any version, and no others."""
    record = _parse_line(line)
    if record is None or not _FIELDS.keys() <= record.keys():
        return False
    types = {**_FIELDS, **_NEWER_FIELDS}
    return all(name in types and isinstance(value, types[name]) for name, value in record.items())


def _is_unfinished(line: bytes) -> bool:
    """Return whether a line is a record whose end is missing, however early it was cut off."""
    return (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)) and _parse_line(line) is None


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def parse_records(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the records in a manifest in order; a line that is none is passed over."""
    for line in content.splitlines():
        record = _parse_line(line)
        if record is not None and isinstance(record.get("checkpoint"), str):
            yield record


_KIND = OwnFileKind("a manifest", "--manifest", _is_manifest)
