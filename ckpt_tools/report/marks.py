"""The mark at the end of a report: it proves that ckpt-fix wrote it and that nobody changed it.

Only such a file is replaced by a later report. The mark holds the SHA-256 of all that stands before
it. Notes that mention this tool, or that quote a report with its mark, do not carry the digest of
themselves, and neither does a report to which somebody has added notes. JSON has no place for a
mark: a report in JSON is recognised by its object ``tool``, which comes first, and by having no
keys but those of a report.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib

from ckpt_tools.storage.output.own_files import OwnFileKind

__all__ = ["add_mark", "is_own_report", "report_kind"]

_JSON_HEAD = re.compile(rb'\s*\{\s*"tool"\s*:\s*\{\s*"name"\s*:\s*"ckpt-tools"\s*,\s*"version"\s*:\s*"')
# The last chunk of every PNG file (specification, section 11.2.5).
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

# The keys that may stand at the top of a report in JSON of one checkpoint; "checkpoint" must.
# fmt: off
_REPORT_KEYS = frozenset({
    "tool", "libraries", "checkpoint", "architecture", "model_kwargs", "recognised_by", "twins",
    "scores", "rates", "data", "estimator", "estimator_reason", "verdict", "effect", "warnings",
    "statistics", "passes", "residual", "stopped_early",
    "precision", "deviation", "why", "layers", "controls", "outliers", "common_outliers",
    "kept_outliers", "batch_spread", "left_alone", "noise_left_on", "dropout_sites", "metrics",
    "output", "command", "containers_trained", "device", "processes", "seconds",
})
# fmt: on
_FOLDER_KEYS = frozenset({"tool", "checkpoints"})  # of the report of a folder


def report_kind(suffix: str) -> OwnFileKind:
    """Return the kind of file that this tool replaces when it writes a report with this suffix.

    ``suffix`` is in lower case with its dot, here and in the functions below.
    """
    return OwnFileKind("an earlier report", "--report", lambda content: is_own_report(content, suffix))


def add_mark(content: bytes, suffix: str) -> bytes:
    """Return a report in HTML or Markdown, or a picture in PNG, SVG or PDF, with its mark.

    HTML, Markdown and SVG take it as an XML comment, PDF as a comment line, PNG as a text chunk
    before its last one.
    """
    body = content.removesuffix(_PNG_END) if suffix == ".png" else content
    return body + _mark(body, suffix)


def is_own_report(content: bytes, suffix: str) -> bool:
    """Return whether a file's content is a report of this tool that nobody has changed since."""
    if suffix == ".json":
        return _is_own_json(content)
    length = len(_mark(b"", suffix))  # a digest has the same length for every content
    body, mark = content[:-length], content[-length:]
    return mark == _mark(body, suffix)


def _mark(body: bytes, suffix: str) -> bytes:
    text = b"ckpt-tools sha256:" + hashlib.sha256(body).hexdigest().encode()
    if suffix == ".png":
        # A PNG chunk is the length of its data, its type, its data, and a CRC of type and data
        # (specification, section 5.3). A tEXt chunk holds a keyword, a zero byte and the text
        # (section 11.3.4.3).
        chunk = b"tEXtComment\0" + text
        return (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + _PNG_END
    return b"% " + text + b"\n" if suffix == ".pdf" else b"<!-- " + text + b" -->\n"


def _is_own_json(content: bytes) -> bool:
    """Return whether a file has the structure of a report in JSON.

    A file that does not begin like one is not parsed: it may be large, and it is none of ours.
    """
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
    return "checkpoint" in keys and keys <= _REPORT_KEYS
