"""The manifest of a folder: one line of JSON for every checkpoint that came to an end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckpt_tools.errors import OutputError
from ckpt_tools.jobs.engine import Record
from ckpt_tools.jobs.folder import Result
from ckpt_tools.jobs.scores import GateFailed
from ckpt_tools.remote.address import is_url
from ckpt_tools.remote.copies import fetch, peek
from ckpt_tools.remote.delivery import deliver
from ckpt_tools.remote.mirror import as_urls, is_remote
from ckpt_tools.report.json import outcome_json
from ckpt_tools.report.metrics_json import metrics_json
from ckpt_tools.storage.atomic import check_target

__all__ = ["Manifest", "record_of", "records_in"]


class Manifest:
    """A JSONL file that is only ever appended to. What a killed run left unfinished in it is passed over.

    A remote one is fetched first and written anew by ``publish``: stores append nothing.
    """

    def __init__(self, path: Path) -> None:
        """Read what earlier runs recorded. Raises OutputError if the file cannot be read and written, RemoteError."""
        self.path = path
        self._made: dict[tuple[str, str, str], Record] = {}  # what is known of outputs, by what made them
        self._fresh = False
        if is_remote(path):
            check_target(path, overwrite=True)
            if peek(path) is not None:
                fetch(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fresh = not path.exists()
            with path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                if content and not any(records_in(content)) and not _begun(content):
                    raise OutputError(f"{path}: expected a manifest to append to, found another file. Give --manifest.")
                if content and not content.endswith(b"\n"):  # killed while writing
                    file.write(b"\n")
        except OSError as error:
            raise OutputError(f"{path}: expected a manifest to append to, found: {error}. Give --manifest.") from error
        for record in records_in(content):
            self._keep(record)

    def publish(self) -> None:
        """Put a remote manifest where it belongs; remove one that this run began for nothing. Raises OutputError."""
        if self._fresh and self.path.exists() and not self.path.stat().st_size:
            self.path.unlink(missing_ok=True)
        elif is_remote(self.path):
            deliver(self.path, self.path, overwrite=True)

    def add(self, record: Record) -> Record:
        """Add a line and return what is known of its checkpoint.

        What was done before has its earlier line, if that tells of the same output: made of the same bytes with the
        same settings.
        """
        earlier = self._made.get(_maker(record))
        if record["status"] == "done before" and earlier is not None:
            own = ("checkpoint", "also_named", "output", "status")
            return {**earlier, **{name: record[name] for name in own if name in record}}
        self._keep(record)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). Give another --manifest.") from error
        return record

    def _keep(self, record: Record) -> None:
        """The latest record of an output; one without a report takes the place of none with one."""
        if record.get("output") and (record.get("report") or _maker(record) not in self._made):
            self._made[_maker(record)] = record


def record_of(result: Result) -> Record:
    """A result as a line of the manifest.

    ``report`` is what ``--json`` says of a single checkpoint; ``metrics``, what a gate said no to. ``source_sha256``
    and ``settings`` are those that stand in the output. ``also_named``: further paths to the checkpoint's file.
    """
    error = result.error
    record: Record = as_urls(
        {
            "checkpoint": str(result.item.checkpoint),
            "also_named": [str(path) for path in result.item.also_named],
            "status": result.status,
            "output": str(result.item.output) if result.status in ("done", "done before") else None,
            "error": None if error is None else str(error) if result.known else f"{type(error).__name__}: {error}",
            "exit_code": getattr(error, "exit_code", 1) if error else 0,
            "seconds": round(result.seconds, 3),
            "source_sha256": result.made.source_sha256 if result.made else None,
            "settings": result.made.settings if result.made else None,
            "metrics": metrics_json(error.metrics) if isinstance(error, GateFailed) else None,
            "report": None if result.outcome is None else outcome_json(result.outcome),
        }
    )
    return record


def _maker(record: Record) -> tuple[str, str, str]:
    """What an output was made of, and where it lies, however that was written."""
    output = str(record.get("output"))
    place = output if is_url(output) else os.path.abspath(output)  # noqa: PTH100 - without ..
    return place, str(record.get("source_sha256")), str(record.get("settings"))


def _begun(content: bytes) -> bool:
    """Whether this can be the first line of a manifest, whose run was killed while writing it."""
    return content.startswith(b"{") and b"\n" not in content


def records_in(content: bytes) -> Iterable[dict[str, Any]]:
    """The records in a manifest, in order; lines that are none are passed over."""
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("checkpoint"), str):
            yield record
