"""The picture of a verified init: how z and δ are spread from layer to layer, before and after the rewrite.

The paper's Figures 1 and 5 for the user's own model (Hendrycks & Gimpel 2016).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckpt_tools.errors import OutputError, UsageError
from ckpt_tools.initialize.outcome import LayerSignal
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.report.marks import add_mark, report_kind
from ckpt_tools.storage.output.atomic_write import check_target, write_atomically
from ckpt_tools.storage.output.own_files import read_own_file, require_distinct_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")
_BEFORE, _AFTER = "as the architecture initialises", "after the rewrite"
_CENTRAL = 0.98  # of all values lie on a panel's axis
_SPIKE = 4.0  # a density this many times higher than the median layer's is cut off
_POINTS = 512
_COLOURS = {_BEFORE: "#c44e52", _AFTER: "#2f6db3"}


@dataclass(frozen=True)
class _Row:
    """One of the two signals: its symbol, what the axes say, and where a layer keeps it."""

    symbol: str
    title: str
    axis: str
    values: Callable[[LayerSignal], Sequence[float]]
    variance: Callable[[LayerSignal], float | None]


_ROWS = (
    _Row("z", "outputs z", "z", lambda layer: layer.outputs, lambda layer: layer.variance),
    _Row(
        "δ",
        "error signals δ",
        "δ without zeros, 1 = as fed in",
        lambda layer: layer.errors,
        lambda layer: layer.error_variance,
    ),
)


def check_figure(place: LocationLike) -> None:
    """Refuse at once what could not be drawn or written at the end.

    Raises UsageError for another suffix than .png, .svg or .pdf and where matplotlib is missing, OutputError for a
    folder that does not exist or cannot be written to.
    """
    location = Location.of(place)
    suffix = location.path.suffix
    if suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"{location}: expected a picture's name, ending in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; "
            f"found {repr(suffix) if suffix else 'no suffix'}. Rename it."
        )
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UsageError(
            f"{location}: expected matplotlib to draw it with, found none. Run: pip install 'ckpt-tools[report]'"
        ) from error
    check_target(location, overwrite=True)


def check_earlier_figure(place: LocationLike, others: Iterable[LocationLike | None]) -> None:
    """Refuse at once to replace what is no earlier picture of ours. ``others`` are the files of the job itself.

    Raises UsageError for the name of another file of the job, OutputError for a file that something else wrote, or that
    was changed since.
    """
    location = Location.of(place)
    kind = report_kind(location.path.suffix.lower())
    require_distinct_file(location, kind, others)
    read_own_file(location, kind)


def write_signals_figure(
    place: LocationLike, before: Sequence[LayerSignal], after: Sequence[LayerSignal], *, only_own: bool = False
) -> None:
    """Draw the signals of all weight layers of a model, as it was and as it became, into a .png, .svg or .pdf file.

    Two rows of densities, one line for each layer: outputs z (the paper's Figure 1) and error signals δ without zeros
    (Figure 5). Below them Var(z) and Var(δ) against depth. An existing file is replaced; with
    ``only_own`` nothing is but an earlier picture that nobody has changed.

    Raises:
        UsageError: another suffix, or matplotlib is missing.
        OutputError: the file cannot be written.
    """
    location = Location.of(place)
    check_figure(location)
    from matplotlib import rc_context, rcdefaults

    suffix = location.path.suffix.lower()

    def may_replace() -> bool:
        return read_own_file(location, report_kind(suffix)) is not None

    try:
        with rc_context():
            # The settings may be those of a `matplotlibrc` in the current folder, which need not be the user's: with
            # text.usetex they would run LaTeX.
            rcdefaults()
            figure = _draw_figure(before, after)
            with write_atomically(location, overwrite=True, may_replace=may_replace if only_own else None) as temporary:
                figure.savefig(temporary, format=suffix.removeprefix("."), dpi=150)
                temporary.write_bytes(add_mark(temporary.read_bytes(), suffix))
    except OSError as error:
        raise OutputError(
            f"{location}: expected to write a picture there, found: {error}. Nothing was left behind; choose another "
            "place."
        ) from error


def _draw_figure(before: Sequence[LayerSignal], after: Sequence[LayerSignal]) -> Figure:
    from matplotlib.figure import Figure

    colours = _colours()
    figure = Figure(figsize=(10, 10), layout="constrained")
    axes = figure.subplots(3, 2, height_ratios=(1, 1, 0.8))
    for row, panels, depth_panel in zip(_ROWS, axes, axes[2], strict=False):
        variances = {}
        for when, layers, panel in zip((_BEFORE, _AFTER), (before, after), panels, strict=True):
            variances[when] = [row.variance(layer) for layer in layers]
            panel.set_title(f"{row.title}, {when}\n{_range(row.symbol, variances[when])}", fontsize=10)
            panel.set_xlabel(f"{row.axis} (shown: the central {100 * _CENTRAL:g} % of all layers' values)", fontsize=8)
            panel.set_ylabel("density", fontsize=8)
            _draw_densities(panel, [_finite(row.values(layer)) for layer in layers], colours)
        _draw_depth(depth_panel, row.symbol, variances)
    _add_colour_bar(figure, axes[:2], max(len(before), len(after)), colours)
    return figure


def _colours() -> Colormap:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))  # its last yellows vanish on white


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    found: NDArray[np.float64] = array[np.isfinite(array)]
    return found


def _range(symbol: str, variances: Sequence[float | None]) -> str:
    """The title's second line: how far Var is from layer to layer."""
    known = [value for value in variances if value is not None]
    finite = [value for value in known if math.isfinite(value)]
    if not finite:
        return "nothing to show" if not known else f"Var({symbol}) is not finite"
    low, high = min(finite), max(finite)
    spread = f"Var({symbol}) from {low:.3g} to {high:.3g} over {len(known)} layers"
    if len(known) == 1:
        spread = f"Var({symbol}) = {low:.3g}"
    return spread if len(finite) == len(known) else f"{spread}, not finite in {len(known) - len(finite)}"


def _draw_densities(panel: Axes, samples: Sequence[NDArray[np.float64]], colours: Colormap) -> None:
    """One line a layer, over the central part of the pooled values; spikes of far narrower layers are cut off."""
    pooled = np.concatenate([*samples, np.zeros(2)])  # two zeros do no harm, and no values at all would
    low, high = np.quantile(pooled, [(1 - _CENTRAL) / 2, (1 + _CENTRAL) / 2])
    peaks = []
    for depth, values in enumerate(samples):
        if high - low > 1e-9 * max(abs(low), abs(high)) and len(values) and values.min() < values.max():
            x, density = _density(values, low, high)
            colour = colours(depth / max(1, len(samples) - 1))
            panel.plot(x, density, color=colour, linewidth=1.5 if len(samples) <= 25 else 0.8, alpha=0.85)
            peaks.append(density.max())
    peaks = [peak for peak in peaks if peak > 0]  # a layer may lie beyond the axis
    if not peaks:
        panel.text(0.5, 0.5, "no values that differ", ha="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])
        return
    panel.set_xlim(low, high)
    panel.set_ylim(0, 1.05 * min(max(peaks), _SPIKE * float(np.median(peaks))))
    _plain_ticks(panel)


def _plain_ticks(panel: Axes) -> None:
    """Few ticks, each with its whole number: a common power of ten would stand on top of a label."""
    from matplotlib.ticker import MaxNLocator

    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.tick_params(labelsize=8)


def _density(values: NDArray[np.float64], low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A kernel density estimate between two bounds: bins smoothed with a Gaussian of Silverman's width."""
    margin = (high - low) / 2  # values beyond the bounds reach into the panel
    counts, edges = np.histogram(values, _POINTS, (low - margin, high + margin))
    step = edges[1] - edges[0]
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = min(values.std(), float(quartiles[1] - quartiles[0]) / 1.34) or values.std()
    width = min(max(0.9 * spread * len(values) ** -0.2 / step, 0.75), _POINTS / 12)
    reach = math.ceil(4 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    density = np.convolve(counts, kernel / kernel.sum(), mode="same") / (len(values) * step)
    return (edges[:-1] + edges[1:]) / 2, density


def _draw_depth(panel: Axes, symbol: str, variances: Mapping[str, Sequence[float | None]]) -> None:
    """Var against depth on a log axis; zeros and what is not finite have no place there and are counted."""
    from matplotlib.ticker import MaxNLocator

    points = {when: [_drawable(value) for value in values] for when, values in variances.items()}
    for when, values in points.items():
        marker = "o" if len(values) <= 40 else ""
        panel.plot(range(1, len(values) + 1), values, marker=marker, markersize=3.5, color=_COLOURS[when], label=when)
    pooled = np.concatenate([*points.values(), [0.1, 10]])  # at least two decades: a ratio of 1.1 is not to look large
    missing = int(np.isnan(pooled).sum())
    panel.set_yscale("log")
    panel.set_ylim(np.nanmin(pooled) / 1.5, np.nanmax(pooled) * 1.5)
    panel.set_xlim(0.5, max(1, *map(len, points.values())) + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    panel.axhline(1, color="0.75", linewidth=1, zorder=0)
    panel.set_title(f"Var({symbol}) by depth", fontsize=10)
    left_out = f" (left out: {missing} that are 0, not finite or unknown)" if missing else ""
    panel.set_xlabel(f"layer, in order of execution{left_out}", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.legend(fontsize=8)


def _drawable(value: float | None) -> float:
    return value if value is not None and 0 < value < math.inf else math.nan


def _add_colour_bar(figure: Figure, axes: NDArray[Any], layers: int, colours: Colormap) -> None:
    if layers < 2:
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(1, layers), colours), ax=axes, shrink=0.6, aspect=40, pad=0.02)
    bar.set_ticks([1, layers], labels=["first\nlayer", "last\nlayer"])
