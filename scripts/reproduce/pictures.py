"""Draw pictures as SVG and PNG that are equal, byte for byte, for equal records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"ours": "#2f6db3", "Xavier": "#3d9a50", "He": "#c44e52"}  # the same contestant, the same colour
_STYLE: dict[Any, Any] = {"svg.hashsalt": "ckpt-tools", "font.size": 9, "axes.titlesize": 10}
_NO_DATES: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def write(picture: Callable[[], Figure], stem: Path) -> list[Path]:
    """Draw a picture, and write STEM.svg and STEM.png."""
    files = []
    with matplotlib.rc_context(_STYLE):
        figure = picture()
        for kind, metadata in _NO_DATES.items():
            path = stem.with_name(f"{stem.name}.{kind}")
            figure.savefig(path, format=kind, dpi=110, metadata=metadata)
            files.append(path)
    return files


def grid(
    rows: int,
    columns: int,
    *,
    width: float = 3.2,
    height: float = 2.4,
    sharex: bool = True,
    sharey: bool = True,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows × columns panels; ``width`` and ``height`` of one in inches."""
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for panel in panels.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels.tolist()


def legend(figure: Figure, panel: Axes) -> None:
    """One legend for all panels, of what one of them shows."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(labels)), frameon=False)
