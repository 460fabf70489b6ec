"""Columns, counts and lists: the pieces of which every text for a terminal is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_tools.plain_text import one_line


def count_text(number: int, noun: str) -> str:
    """Return ``1 layer``, ``1,234 layers``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """Return the first ``limit`` names, and how many more there are.

    Every name becomes harmless and short by ``one_line``, since names come from other people's
    files.
    """
    names = list(names)  # it may be a generator, and is counted and cut
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(one_line, names[:limit])) + more


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines with aligned columns; all rows have the same number of cells.

    Names of files and layers are cut at a length and show their control characters as escapes.
    """
    # The cells are cleaned before they are measured: an escape is longer than its character.
    clean_rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean_rows, strict=True)]
    lines = []
    for row in clean_rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
