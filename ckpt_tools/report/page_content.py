"""What a report says, before it is HTML or Markdown: both are made from these, so both say the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True)
class Cell:
    """A value as text. ``order``: what sorting compares, None for nothing; ``link``: an anchor of the page."""

    text: str
    order: float | str | None = None
    tone: Tone = ""
    link: str = ""


@dataclass(frozen=True)
class Column:
    """A head. Numbers stand on the right; code is set in a fixed width."""

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
        """Whether another order could tell anything."""
        return len(self.rows) > 2

    @property
    def long(self) -> bool:
        """Whether it is better folded away."""
        return len(self.rows) > 24


@dataclass(frozen=True)
class KeyFigure:
    """A number that belongs at the top, and what it is."""

    label: str
    value: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it: sentences, named values, a picture, a table, a command."""

    title: str
    sentences: tuple[str, ...] = ()
    tone: Tone = ""  # of the first sentence, if it is a verdict
    pairs: tuple[tuple[str, str], ...] = ()
    chart: Mapping[str, Any] | None = None  # the facts to draw
    table: Table | None = None
    code: str = ""


@dataclass(frozen=True)
class Page:
    """One checkpoint: what was done, in a sentence, in a few numbers, in full."""

    title: str
    subtitle: str
    headline: str
    tone: Tone = ""
    figures: tuple[KeyFigure, ...] = ()
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class FolderPage:
    """Many checkpoints: a table with a row for each, and a page for each under the anchor its row links to.

    ``failures``: for every checkpoint that failed its anchor, its name and what was said.
    """

    title: str
    subtitle: str
    headline: str
    figures: tuple[KeyFigure, ...]
    failures: tuple[tuple[str, str, str], ...]
    table: Table
    pages: tuple[tuple[str, Page], ...] = field(default=())
