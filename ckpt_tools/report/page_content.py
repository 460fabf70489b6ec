"""The content of a report before it is HTML or Markdown, so that both say the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# What a text means to the reader: templates give it a colour and a sign, Markdown an emoji.
Tone = Literal["", "good", "doubt", "bad", "quiet"]


@dataclass(frozen=True)
class Cell:
    """A value as text.

    ``order`` is the value that sorting compares, None where the cell has none; ``link`` is an
    anchor of the page.
    """

    text: str
    order: float | str | None = None
    tone: Tone = ""
    link: str = ""


@dataclass(frozen=True)
class Column:
    """The head of a column, and how its cells look: numbers on the right, code in monospace."""

    title: str
    kind: Literal["text", "number", "code", "prose"] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def sortable(self) -> bool:
        """Whether the table has enough rows that sorting by a column helps to find one."""
        return len(self.rows) > 2  # two rows are compared at a glance

    @property
    def long(self) -> bool:
        """Whether the table is folded away until the reader asks for it."""
        return len(self.rows) > 24  # about a screen


@dataclass(frozen=True)
class KeyFigure:
    """A number at the top of the page, with a label above it and a note beside it."""

    label: str
    value: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Section:
    """A heading and its content: sentences, a chart, named values, a command, a table."""

    title: str
    sentences: tuple[str, ...] = ()
    tone: Tone = ""  # of the first sentence, where that is a verdict
    pairs: tuple[tuple[str, str], ...] = ()
    # The facts of a run: HTML draws their chart, Markdown describes it.
    chart: Mapping[str, Any] | None = None
    table: Table | None = None
    code: str = ""


def join_subtitle(*parts: object) -> str:
    """Return the parts that are there on one line, with dots between them."""
    return " · ".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class Page:
    """The page of one checkpoint: what was done, in a sentence, in a few numbers, and in full."""

    title: str
    subtitle: str
    headline: str
    tone: Tone = ""
    figures: tuple[KeyFigure, ...] = ()
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class FolderPage:
    """The page of many checkpoints: a table with a row for each, and below it a page for each.

    ``failures`` holds anchor, name and error message of every checkpoint that failed. ``pages``
    holds every checkpoint's page behind the anchor that its row links to.
    """

    title: str
    subtitle: str
    headline: str
    figures: tuple[KeyFigure, ...]
    failures: tuple[tuple[str, str, str], ...]
    table: Table
    pages: tuple[tuple[str, Page], ...] = ()
