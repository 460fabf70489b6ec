"""Reports as files: .html, .md or .json, by their suffix."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_tools.errors import OutputError, UsageError
from ckpt_tools.report.html import checkpoint_html, folder_html, require_templates
from ckpt_tools.report.markdown import checkpoint_markdown, folder_markdown
from ckpt_tools.report.redaction import without_secrets
from ckpt_tools.storage.atomic import check_target, new_file
from ckpt_tools.version import VERSION

__all__ = ["check_reports", "write_report"]

_SUFFIXES = (".html", ".md", ".json")
_HEAD, _MARK = 2048, b"ckpt-tools"  # each of our reports says in its first bytes whose it is
Facts = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def check_reports(paths: Sequence[Path], others: Iterable[Path | None] = ()) -> None:
    """Refuse before any work what could not be written at the end.

    ``others`` are the files of the job itself. An existing report of ours is replaced, and so is an empty file.

    Raises:
        UsageError: another suffix, one name twice, or jinja2 is missing.
        OutputError: a folder that is not there, or a file that is no report of ours.
    """
    taken = {os.path.realpath(path) for path in others if path is not None}
    for path in paths:
        if path.suffix.lower() not in _SUFFIXES:
            raise UsageError(
                f"--report {path}: expected a name that ends in .html, .md or .json, found "
                f"{repr(path.suffix) if path.suffix else 'no suffix'}. Rename it."
            )
        if path.suffix.lower() == ".html":
            require_templates()
        check_target(path, overwrite=True)
        if os.path.realpath(path) in taken:
            raise UsageError(f"--report {path}: expected a file of its own, found another file of this job. Rename it.")
        taken.add(os.path.realpath(path))
        _refuse_strangers(path)


def write_report(path: Path, facts: Facts) -> None:
    """Write a report in one step: of one checkpoint (``outcome_json``), or of a folder (a sequence of its records).

    Credentials and query strings of URLs are left out. An existing report is replaced, a file that is none is not.

    Raises:
        UsageError: another suffix than .html, .md or .json, or jinja2 is missing.
        OutputError: the file cannot be written.
    """
    check_reports([path])
    text = _text(path.suffix.lower(), facts)
    try:
        with new_file(path, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # a file name may hold lone surrogates
    except OSError as error:
        raise OutputError(
            f"{path}: expected to write a report there, found: {error}. No report is left there; choose another place."
        ) from error


def _text(suffix: str, facts: Facts) -> str:
    if isinstance(facts, Mapping):
        if suffix == ".json":
            return json.dumps(without_secrets(facts), indent=2) + "\n"
        return checkpoint_html(facts) if suffix == ".html" else checkpoint_markdown(facts)
    if suffix == ".json":
        whole = {"tool": {"name": "ckpt-tools", "version": VERSION}, "checkpoints": without_secrets(list(facts))}
        return json.dumps(whole, indent=2) + "\n"
    return folder_html(facts) if suffix == ".html" else folder_markdown(facts)


def _refuse_strangers(path: Path) -> None:
    """Raise OutputError if a file is in the way that is no report of ours."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be replaced ({error.strerror}). Choose another name.") from error
    if head.strip() and _MARK not in head:
        raise OutputError(
            f"{path}: expected no file, or an earlier report to replace, found another file. Choose another name."
        )
