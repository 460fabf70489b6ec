"""The picture of a verified initialisation: how z and δ are spread, before and after.

These are Figures 1 and 5 of the paper (Hendrycks & Gimpel 2016) for the user's own model.
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
from ckpt_tools.initialize.init_results import LayerSignal
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
_CENTRAL_SHARE = 0.98  # of all values lie on a panel's axis: far ones would squeeze the others
_TALLEST_PEAK = 4.0  # in units of the median layer's peak; taller ones are cut off
_BINS = 512  # of a density
_COLOURS = {_BEFORE: "#c44e52", _AFTER: "#2f6db3"}


@dataclass(frozen=True)
class _Row:
    """One of the two signals: its texts, and how to get its values and variance from a layer."""

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
    """Refuse, before any work is done, a picture that could not be drawn or written at the end.

    Raises:
        UsageError: the suffix is not .png, .svg or .pdf, or matplotlib is missing.
        OutputError: the folder does not exist or cannot be written to.
    """
    location = Location.of(place)
    suffix = location.path.suffix
    if suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"{location}: expected a picture's name, ending in .png, .svg or .pdf; "
            f"found {repr(suffix) if suffix else 'no suffix'}. Rename it."
        )
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UsageError(
            f"{location}: expected matplotlib, found none. Run: pip install 'ckpt-tools[report]'"
        ) from error
    check_target(location, overwrite=True)


def check_earlier_figure(place: LocationLike, job_files: Iterable[LocationLike | None]) -> None:
    """Refuse to replace a file that is no earlier picture of this tool.

    ``job_files`` are the job's other files.

    Raises:
        UsageError: the path is one of the job's other files.
        OutputError: something else wrote the file, or it was changed since.
    """
    location = Location.of(place)
    kind = report_kind(location.path.suffix.lower())
    require_distinct_file(location, kind, job_files)
    read_own_file(location, kind)


def write_signals_figure(
    place: LocationLike,
    before: Sequence[LayerSignal],
    after: Sequence[LayerSignal],
    *,
    only_own: bool = False,
) -> None:
    """Draw the signals of all weight layers, before and after, into a .png, .svg or .pdf file.

    Two rows of densities have one line for each layer: outputs z (the paper's Figure 1) and error
    signals δ without zeros (Figure 5). Below them stand Var(z) and Var(δ) against depth. An
    existing file is replaced; with ``only_own`` only if it is an earlier picture that nobody has
    changed.

    Raises:
        UsageError: another suffix, or matplotlib is missing.
        OutputError: the file cannot be written.
    """
    location = Location.of(place)
    check_figure(location)
    # matplotlib is an optional dependency, so every function that draws imports its own part.
    from matplotlib import rc_context, rcdefaults

    suffix = location.path.suffix.lower()

    def may_replace() -> bool:
        # Checked again just before the file is replaced: drawing takes time.
        return read_own_file(location, report_kind(suffix)) is not None

    try:
        with rc_context():
            # The settings may be those of a `matplotlibrc` in the current folder, which need not be
            # the user's: with text.usetex they would run LaTeX.
            rcdefaults()
            figure = _draw_figure(before, after)
            check = may_replace if only_own else None
            with write_atomically(location, overwrite=True, may_replace=check) as temporary:
                figure.savefig(temporary, format=suffix.removeprefix("."), dpi=150)
                temporary.write_bytes(add_mark(temporary.read_bytes(), suffix))
    except OSError as error:
        raise OutputError(
            f"{location}: expected to write a picture there, found: {error}. "
            "Nothing was left behind there; choose another place for it."
        ) from error


def _draw_figure(before: Sequence[LayerSignal], after: Sequence[LayerSignal]) -> Figure:
    from matplotlib.figure import Figure

    colours = _colours()
    figure = Figure(figsize=(10, 10), layout="constrained")
    axes = figure.subplots(3, 2, height_ratios=(1, 1, 0.8))
    shown_share = f"shown: the central {100 * _CENTRAL_SHARE:g} % of all layers' values"
    for row, panels, depth_panel in zip(_ROWS, axes[:2], axes[2], strict=True):
        variances = {}
        for stage, layers, panel in zip((_BEFORE, _AFTER), (before, after), panels, strict=True):
            variances[stage] = [row.variance(layer) for layer in layers]
            panel.set_title(f"{row.title}, {stage}\n{_range_text(row.symbol, variances[stage])}", fontsize=10)
            panel.set_xlabel(f"{row.axis} ({shown_share})", fontsize=8)
            panel.set_ylabel("density", fontsize=8)
            _draw_densities(panel, [_finite(row.values(layer)) for layer in layers], colours)
        _draw_depth(depth_panel, row.symbol, variances)
    _add_colour_bar(figure, axes[:2], max(len(before), len(after)), colours)
    return figure


def _colours() -> Colormap:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # The last yellows of viridis vanish on white.
    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    finite: NDArray[np.float64] = array[np.isfinite(array)]
    return finite


def _range_text(symbol: str, variances: Sequence[float | None]) -> str:
    """Return the range of Var over the layers in words.

    None stands for a layer where it was not measured.
    """
    measured = [value for value in variances if value is not None]
    finite = [value for value in measured if math.isfinite(value)]
    if not finite:
        return f"Var({symbol}) is not finite" if measured else "nothing to show"
    if len(measured) == 1:
        return f"Var({symbol}) = {finite[0]:.3g}"
    text = f"Var({symbol}) from {min(finite):.3g} to {max(finite):.3g} over {len(measured)} layers"
    infinite = len(measured) - len(finite)
    return f"{text}, not finite in {infinite}" if infinite else text


def _draw_densities(panel: Axes, samples: Sequence[NDArray[np.float64]], colours: Colormap) -> None:
    """Draw the density of each layer's values, over the central part of all layers' values.

    A layer whose values are far narrower than the others' has a high spike, which is cut off: the
    other lines would lie flat on the axis.
    """
    # Without any value quantile would raise, and two zeros do no harm.
    pooled = np.concatenate([*samples, np.zeros(2)])
    low, high = np.quantile(pooled, [(1 - _CENTRAL_SHARE) / 2, (1 + _CENTRAL_SHARE) / 2])
    peaks = []
    for depth, values in enumerate(samples):
        # A density needs an axis of some length, and values that differ.
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
    panel.set_ylim(0, 1.05 * min(max(peaks), _TALLEST_PEAK * float(np.median(peaks))))
    _set_plain_ticks(panel)


def _set_plain_ticks(panel: Axes) -> None:
    """Give the axes few ticks, each with its full number.

    By default matplotlib writes a common power of ten beside the axis, where it would stand on top
    of a label.
    """
    from matplotlib.ticker import MaxNLocator

    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.tick_params(labelsize=8)


def _density(
    values: NDArray[np.float64], low: float, high: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a kernel density estimate between two bounds, as positions and densities.

    The values are counted in bins, and the counts smoothed with a Gaussian of Silverman's width,
    0.9 A n^(-1/5), where A is the smaller of the standard deviation and the quartiles' distance /
    1.34 (Silverman 1986, eq. 3.31).
    """
    margin = (high - low) / 2  # values beyond the bounds reach into the panel
    counts, edges = np.histogram(values, _BINS, (low - margin, high + margin))
    step = edges[1] - edges[0]
    quartiles = np.quantile(values, [0.25, 0.75])
    # Where half of the values are equal the quartiles' distance is 0, which would smooth nothing.
    spread = min(values.std(), float(quartiles[1] - quartiles[0]) / 1.34) or values.std()
    width = min(max(0.9 * spread * len(values) ** -0.2 / step, 0.75), _BINS / 12)  # in bins
    reach = math.ceil(4 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    density = np.convolve(counts, kernel / kernel.sum(), mode="same") / (len(values) * step)
    return (edges[:-1] + edges[1:]) / 2, density


def _draw_depth(panel: Axes, symbol: str, variances: Mapping[str, Sequence[float | None]]) -> None:
    """Draw Var against depth on a logarithmic axis.

    A variance that is 0 or not finite has no place on it. The label below the axis says how many
    there are.
    """
    from matplotlib.ticker import MaxNLocator

    points = {stage: [_drawable(value) for value in values] for stage, values in variances.items()}
    for stage, values in points.items():
        marker = "o" if len(values) <= 40 else ""
        panel.plot(
            range(1, len(values) + 1),
            values,
            marker=marker,
            markersize=3.5,
            color=_COLOURS[stage],
            label=stage,
        )
    # The axis spans at least two decades: a ratio of 1.1 must not look large.
    pooled = np.concatenate([*points.values(), [0.1, 10]])
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
    # matplotlib leaves a gap at NaN.
    return value if value is not None and 0 < value < math.inf else math.nan


def _add_colour_bar(figure: Figure, axes: NDArray[Any], layers: int, colours: Colormap) -> None:
    if layers < 2:
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(1, layers), colours), ax=axes, shrink=0.6, aspect=40, pad=0.02
    )
    bar.set_ticks([1, layers], labels=["first\nlayer", "last\nlayer"])
