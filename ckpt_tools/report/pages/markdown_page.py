"""A report as GitHub-flavoured Markdown, for the summary of a CI job: the same facts as the page of HTML."""

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

_SIGNS: Mapping[Tone, str] = {"good": "✅ ", "bad": "❌ ", "quiet": "", "": ""}
_SPECIAL = re.compile(r"([\\`*{}\[\]~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#>+=-]|(?<=^\d)[.)](?=\s|$))")
_MARK = f"<!-- ckpt-tools {VERSION} report -->"


def checkpoint_markdown(facts: Mapping[str, Any]) -> str:
    """The report of one checkpoint, from the facts of ``outcome_json``."""
    return _whole(checkpoint_page(facts))


def evaluation_markdown(facts: Mapping[str, Any]) -> str:
    """The metrics of one checkpoint, from the facts of ``evaluation_json`` or ``refusal_json``."""
    return _whole(evaluation_page(facts))


def _whole(page: Page) -> str:
    head = [_MARK, "", f"# {escape_markdown(page.title)}", "", escape_markdown(page.subtitle), ""]
    return "\n".join([*head, *_body(page, 2), _FOOT, ""])


def folder_markdown(records: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """The report of many checkpoints: a table, and every checkpoint's report folded away below it.

    GitHub takes a summary of up to 1 MiB: beyond it the long tables are left out, and then the checkpoints' reports.
    """
    page = folder_page(records, title)
    pages = list(page.pages)
    for kept, note in (
        (pages, ""),
        ([(anchor, _without_tables(item)) for anchor, item in pages], "Layers are left out: they would not fit."),
        ([], "The checkpoints' own reports are left out: they would not fit."),
    ):
        text = _folder(page, kept, note)
        if len(text.encode(errors="replace")) <= _FITS:
            break
    return text


def _folder(page: FolderPage, pages: Iterable[tuple[str, Page]], note: str) -> str:
    lines = [
        _MARK,
        "",
        f"# {escape_markdown(page.title)}",
        "",
        escape_markdown(page.headline),
        "",
        *_figures(page.figures),
    ]
    lines += ["## Checkpoints", "", *_table(page.table), *([escape_markdown(note), ""] if note else [])]
    for _, item in pages:
        lines += _fold_details(f"{item.title}: {item.subtitle}", _body(item, 3))
    return "\n".join([*lines, _FOOT, ""])


def _without_tables(page: Page) -> Page:
    """The page without its long tables."""
    kept = [section for section in page.sections if section.table is None or not section.table.long]
    return dataclasses.replace(page, sections=tuple(kept))


_FITS = 1_000_000  # bytes
_FOOT = f"Made by ckpt-tools {VERSION}."


def escape_markdown(text: str) -> str:
    """Text that shows as it is: no markup, no HTML, no line of a table broken."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def _body(page: Page, level: int) -> Iterator[str]:
    yield from (f"{_SIGNS[page.tone]}**{escape_markdown(page.headline)}**", "")
    yield from _figures(page.figures)
    for section in page.sections:
        yield from _section(section, level)


def _figures(figures: Iterable[KeyFigure]) -> Iterator[str]:
    rows = [(figure.label, " ".join(part for part in (figure.value, figure.note) if part)) for figure in figures]
    yield from _pairs(rows)


def _section(section: Section, level: int) -> Iterator[str]:
    yield from ("#" * level + f" {escape_markdown(section.title)}", "")
    for place, sentence in enumerate(section.sentences):
        yield from ((_SIGNS[section.tone] if place == 0 else "") + escape_markdown(sentence), "")
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
    """HTML that GitHub renders; the blank lines let Markdown go on inside."""
    yield from (f"<details><summary>{html.escape(' '.join(title.split()))}</summary>", "", *lines, "</details>", "")


def _fence_code(code: str) -> Iterator[str]:
    """A block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}sh", code, fence, "")
