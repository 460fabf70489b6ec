"""A report as GitHub-flavoured Markdown, for the summary of a CI job."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckpt_tools.report.page_content import Column, FolderPage, KeyFigure, Page, Section, Table, Tone
from ckpt_tools.report.pages.chart import describe_chart, measured_points
from ckpt_tools.report.pages.checkpoint_page import checkpoint_page
from ckpt_tools.report.pages.evaluation_page import evaluation_page
from ckpt_tools.report.pages.folder_page import folder_page
from ckpt_tools.version import VERSION

__all__ = ["checkpoint_markdown", "evaluation_markdown", "folder_markdown"]

_SIGNS: Mapping[Tone, str] = {"good": "✅ ", "doubt": "⚠️ ", "bad": "❌ ", "quiet": "", "": ""}
# Characters that Markdown could take for markup. An underscore within a word is none, so that the
# names of layers stay readable.
_SPECIAL = re.compile(r"([\\`*{}\[\]~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#>+=-]|(?<=^\d)[.)](?=\s|$))")
_FIRST_LINE = f"<!-- ckpt-tools {VERSION} report -->"
_LAST_LINE = f"Made by ckpt-tools {VERSION}."
_LARGEST_SUMMARY = 1_000_000  # bytes; GitHub takes up to 1 MiB


def checkpoint_markdown(facts: Mapping[str, Any]) -> str:
    """Return the report of one checkpoint from the facts of ``outcome_json``."""
    return _page(checkpoint_page(facts))


def evaluation_markdown(facts: Mapping[str, Any]) -> str:
    """Return the metrics from the facts of ``evaluation_json`` or ``refusal_json``."""
    return _page(evaluation_page(facts))


def _page(page: Page) -> str:
    head = [_FIRST_LINE, "", f"# {escape_markdown(page.title)}", "", escape_markdown(page.subtitle), ""]
    return "\n".join([*head, *_body(page, 2), _LAST_LINE, ""])


def folder_markdown(records: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """Return the report of many checkpoints: a table, and below it a report for each.

    The reports are folded away. GitHub refuses a summary that is too long. So if it does not fit,
    the long tables are left out, and if that is not enough, the checkpoints' own reports, and a
    note says so.
    """
    page = folder_page(records, title)
    pages = [item for _, item in page.pages]
    for shown_pages, note in (
        (pages, ""),
        ([_without_long_tables(item) for item in pages], "Layers are left out: they would not fit."),
        ([], "The checkpoints' own reports are left out: they would not fit."),
    ):
        text = _folder(page, shown_pages, note)
        if len(text.encode(errors="replace")) <= _LARGEST_SUMMARY:
            break
    return text


def _folder(page: FolderPage, shown_pages: Iterable[Page], note: str) -> str:
    lines = [_FIRST_LINE, "", f"# {escape_markdown(page.title)}", "", escape_markdown(page.headline), ""]
    lines += [*_figures(page.figures), "## Checkpoints", "", *_table(page.table)]
    if note:
        lines += [note, ""]
    for item in shown_pages:
        lines += _fold_details(f"{item.title}: {item.subtitle}", _body(item, 3))
    return "\n".join([*lines, _LAST_LINE, ""])


def _without_long_tables(page: Page) -> Page:
    sections = [section for section in page.sections if section.table is None or not section.table.long]
    return dataclasses.replace(page, sections=tuple(sections))


def escape_markdown(text: str) -> str:
    """Return a text on one line that is shown as it is.

    No character of it becomes markup or HTML, and it does not end the cell of a table.
    """
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def _body(page: Page, level: int) -> Iterator[str]:
    yield from (f"{_SIGNS[page.tone]}**{escape_markdown(page.headline)}**", "")
    yield from _figures(page.figures)
    for section in page.sections:
        yield from _section(section, level)


def _figures(figures: Iterable[KeyFigure]) -> Iterator[str]:
    rows = [
        (figure.label, " ".join(part for part in (figure.value, figure.note) if part)) for figure in figures
    ]
    yield from _pairs(rows)


def _section(section: Section, level: int) -> Iterator[str]:
    yield from ("#" * level + f" {escape_markdown(section.title)}", "")
    sign = _SIGNS[section.tone]
    for sentence in section.sentences:
        yield from (f"{sign}{escape_markdown(sentence)}", "")
        sign = ""  # the tone is that of the first sentence
    if section.chart is not None:
        yield from (escape_markdown(describe_chart(section.chart, measured_points(section.chart))), "")
    yield from _pairs(section.pairs)
    if section.code:
        yield from _fence_code(section.code)
    if section.table is not None:
        table = _table(section.table)
        yield from _fold_details(f"{len(section.table.rows)} rows", table) if section.table.long else table


def _pairs(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield from ("| | |", "|---|---|")
        yield from (f"| {escape_markdown(name)} | {escape_markdown(text)} |" for name, text in rows)
        yield ""


def _table(table: Table) -> Iterator[str]:
    yield _row([column.title for column in table.columns])
    yield "|" + "|".join(_rule(column) for column in table.columns) + "|"
    for row in table.rows:
        yield _row([cell.text for cell in row])
    yield ""


def _rule(column: Column) -> str:
    return "--:" if column.kind == "number" else "---"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"


def _fold_details(title: str, lines: Iterable[str]) -> Iterator[str]:
    # GitHub renders this HTML. Only behind a blank line does it read Markdown again.
    yield from (
        f"<details><summary>{html.escape(' '.join(title.split()))}</summary>",
        "",
        *lines,
        "</details>",
        "",
    )


def _fence_code(code: str) -> Iterator[str]:
    """Yield a block of code that nothing in the code can close.

    Its fence is longer than any run of backticks in the code.
    """
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}sh", code, fence, "")
