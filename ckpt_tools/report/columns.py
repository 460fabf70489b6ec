"""Columns, counts and lists: what every text is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_tools.plain_text import one_line


def count_text(number: int, noun: str) -> str:
    """``1 layer``, ``1,234 layers``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_names(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(one_line, names[:most])) + more


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns. Names of files and layers are cut at a length and show their control characters."""
    clean = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in clean) for column in range(len(clean[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in clean]
    return "\n".join(line.rstrip() for line in lines)
