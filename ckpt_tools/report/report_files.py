"""Reports as files: .html, .md or .json, by their suffix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckpt_tools.errors import OutputError, UsageError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.redaction import without_secrets
from ckpt_tools.report.marks import add_mark, report_kind
from ckpt_tools.report.pages.html_page import checkpoint_html, folder_html, require_templates
from ckpt_tools.report.pages.markdown_page import checkpoint_markdown, folder_markdown
from ckpt_tools.storage.output.atomic_write import check_target, write_atomically
from ckpt_tools.storage.output.own_files import read_own_file, require_distinct_file
from ckpt_tools.version import VERSION

__all__ = ["check_reports", "write_report"]

_SUFFIXES = (".html", ".md", ".json")
ReportFacts = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def check_reports(
    places: Sequence[LocationLike],
    job_files: Iterable[LocationLike | None] = (),
    *,
    new_folder: LocationLike | None = None,
) -> None:
    """Refuse before any work what could not be written at the end.

    ``job_files`` are the other files of the job. An earlier report that nobody has changed is
    replaced, and so is an empty file. ``new_folder`` is a folder that the job makes before it
    writes reports.

    Raises:
        UsageError: another suffix, one name twice, or jinja2 is missing.
        OutputError: a folder that is not there, or a file that is no report of ours.
    """
    taken = [file for file in job_files if file is not None]
    for report in map(Location.of, places):
        suffix = report.path.suffix
        if suffix.lower() not in _SUFFIXES:
            raise UsageError(
                f"--report {report}: expected a name that ends in .html, .md or .json, found "
                f"{repr(suffix) if suffix else 'no suffix'}. Rename it."
            )
        if suffix.lower() == ".html":
            require_templates()
        require_distinct_file(report, report_kind(suffix.lower()), taken)
        taken.append(report)
        read_own_file(report, report_kind(suffix.lower()))
        if new_folder is None or not _will_be_in(report, Location.of(new_folder)):
            check_target(report, overwrite=True)


def _will_be_in(report: Location, folder: Location) -> bool:
    """Whether a report goes into a folder that does not exist yet."""
    if folder.path.exists():
        return False
    return report.path.absolute().parent == folder.path.absolute()


def write_report(place: LocationLike, facts: ReportFacts) -> None:
    """Write a report in one step: of one checkpoint, or of a folder.

    ``facts`` are those of ``outcome_json``, or a sequence of the records of a manifest.

    Credentials and query strings of URLs are left out. An existing report is replaced, a file that
    is none is not.

    Raises:
        UsageError: another suffix than .html, .md or .json, or jinja2 is missing.
        OutputError: the file cannot be written.
    """
    report = Location.of(place)
    check_reports([report])
    suffix = report.path.suffix.lower()
    content = _content(suffix, facts)

    def may_replace() -> bool:
        # Once more, just before it happens: the job may have taken hours.
        return read_own_file(report, report_kind(suffix)) is not None

    try:
        with write_atomically(report, overwrite=True, may_replace=may_replace) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OutputError(
            f"{report}: expected to write a report there, found: {error}. No report is left there; "
            "choose another place."
        ) from error


def _content(suffix: str, facts: ReportFacts) -> bytes:
    content = _text(suffix, facts).encode("utf-8", errors="replace")  # a file name may hold lone surrogates
    return add_mark(content, suffix) if suffix == ".md" else content


def _text(suffix: str, facts: ReportFacts) -> str:
    if isinstance(facts, Mapping):
        if suffix == ".json":
            return json.dumps(without_secrets(facts), indent=2) + "\n"
        return checkpoint_html(facts) if suffix == ".html" else checkpoint_markdown(facts)
    if suffix == ".json":
        tool = {"name": "ckpt-tools", "version": VERSION}
        report = {"tool": tool, "checkpoints": without_secrets(list(facts))}
        return json.dumps(report, indent=2) + "\n"
    return folder_html(facts) if suffix == ".html" else folder_markdown(facts)
