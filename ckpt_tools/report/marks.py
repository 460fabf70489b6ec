"""The mark at the end of a report, by which it is known that ckpt-fix wrote it and that nothing was changed since.

The mark holds the SHA-256 of all that stands before it. Notes that mention this tool, or quote a report with its mark,
do not carry the digest of themselves, and neither does a report to which somebody has added notes: such files are not
replaced. JSON has no place for a mark: there the object ``tool`` comes first and no foreign key stands beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib

from ckpt_tools.storage.output.own_files import OwnFileKind

__all__ = ["REPORT_KEYS", "add_mark", "is_own_report", "report_kind"]

_JSON_HEAD = re.compile(rb'\s*\{\s*"tool"\s*:\s*\{\s*"name"\s*:\s*"ckpt-tools"\s*,\s*"version"\s*:\s*"')
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG file (specification, section 11.2.5)

# The keys at the top of a report in JSON, of one checkpoint or of a folder.
# fmt: off
REPORT_KEYS = frozenset({
    "tool", "libraries", "checkpoint", "architecture", "model_kwargs", "recognised_by", "twins", "scores",
    "rates", "data", "estimator", "statistics", "passes", "residual", "stopped_early", "precision",
    "deviation", "why", "layers", "controls", "outliers", "common_outliers", "left_alone", "dropout_sites",
    "metrics", "output", "command", "containers_trained", "device", "processes", "seconds",
})
# fmt: on
_FOLDER_KEYS = frozenset({"tool", "checkpoints"})


def report_kind(suffix: str) -> OwnFileKind:
    """Reports of a suffix, as a kind of file that this tool replaces."""
    return OwnFileKind("an earlier report", "--report", lambda content: is_own_report(content, suffix))


def add_mark(content: bytes, suffix: str) -> bytes:
    """Put the mark to the end of a report in HTML or Markdown, or of a picture in PNG, SVG or PDF."""
    body = content.removesuffix(_PNG_END) if suffix == ".png" else content
    return body + _mark(body, suffix)


def is_own_report(content: bytes, suffix: str) -> bool:
    """Whether a file is a report of this tool, unchanged since it was written."""
    if suffix == ".json":
        return _is_own_json(content)
    length = len(_mark(b"", suffix))
    body, mark = content[:-length], content[-length:]
    return mark == _mark(body, suffix)


def _mark(body: bytes, suffix: str) -> bytes:
    text = b"ckpt-tools sha256:" + hashlib.sha256(body).hexdigest().encode()
    if suffix == ".png":
        chunk = b"tEXtComment\0" + text
        return (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + _PNG_END
    return b"% " + text + b"\n" if suffix == ".pdf" else b"<!-- " + text + b" -->\n"


def _is_own_json(content: bytes) -> bool:
    """Whether a file has the structure of a report in JSON. Nothing is parsed that does not begin like one."""
    if not _JSON_HEAD.match(content):
        return False
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        return False
    tool, keys = report["tool"], report.keys()
    if not isinstance(tool, dict) or tool.keys() != {"name", "version"}:
        return False
    if keys == _FOLDER_KEYS:
        return isinstance(report["checkpoints"], list)
    return "checkpoint" in keys and keys <= REPORT_KEYS
