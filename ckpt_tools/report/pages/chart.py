"""The chart of a report: stored / new variance against depth, as geometry for a template.

All marks of one kind are one SVG path. That keeps the page small: a network has hundreds of layers,
and a folder hundreds of networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_tools.report.columns import count_text
from ckpt_tools.report.facts import get_mapping, get_mappings, layer_role
from ckpt_tools.report.number_format import finite_number, percent_text, ratio_text
from ckpt_tools.report.pages.axis import LogAxis, covering_range, integer_ticks

NORMAL_QUANTILE = 1.96  # standard errors to either side hold 95 %
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 40  # margins around the plot in pixels
_SITES_HEIGHT = 22  # of the strip below the plot that shows the dropout sites
# Width of a mark as a share of the distance between layers; its least and largest width in pixels.
_PENS = {
    "rewritten": (0.7, 2.6, 5.0), "ranges": (0.3, 0.6, 1.5),
    "errors": (0.4, 1.2, 2.0), "sites": (0.3, 0.8, 1.75),
}  # fmt: skip


class LayerPoint(NamedTuple):
    """A BN layer whose variance was measured.

    ``depth`` is its place in order of execution, from 1. ``median``, ``low`` and ``high`` are
    stored / new variance in the median, the smallest and the largest channel. ``error`` is the
    relative standard error of the new variance in the median channel, None where it is not known.
    """

    name: str
    role: str
    depth: int
    median: float
    low: float
    high: float
    error: float | None

    @property
    def confidence_interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the median channel's ratio, symmetric on a log axis."""
        if self.error is None:
            return None
        factor = math.exp(min(NORMAL_QUANTILE * self.error, 50))  # cut off: exp(710) is no float
        return self.median / factor, self.median * factor

    @property
    def tooltip_text(self) -> str:
        """Return the layer's numbers in words, which the browser shows under the pointer."""
        error = "" if self.error is None else f", standard error {percent_text(self.error)}"
        return (
            f"{self.depth}: {self.name} ({self.role}), {ratio_text(self.median)}, "
            f"channels {ratio_text(self.low)} to {ratio_text(self.high)}{error}"
        )


@dataclass(frozen=True)
class Drawing:
    """A chart in pixels. The names of the marks are classes of the style sheet."""

    width: int
    height: int
    left: float
    right: float
    bottom: float  # where the axis of depth lies
    unit_ratio: float  # the height at which the ratio is 1
    pens: Mapping[str, float]  # widths of the marks, which depend on the distance between layers
    marks: Mapping[str, str]  # path data of each kind of mark
    y_labels: tuple[tuple[float, str], ...]  # height and text
    x_labels: tuple[tuple[float, str], ...]  # distance from the left, and text
    tooltips: tuple[tuple[float, float, str], ...]  # left edge, width and text of every layer
    title: str
    description: str  # the chart in words, for people who do not see it


def draw_chart(facts: Mapping[str, Any], *, width: int, height: int, tooltips: bool) -> Drawing | None:
    """Return the chart of a checkpoint's facts, None if no layer was measured.

    With ``tooltips`` the drawing holds the numbers of every layer, to be shown under the pointer.
    """
    points = measured_points(facts)
    if not points:
        return None
    layers = max(len(get_mappings(facts, "layers")), 1)
    plot_right, bottom = width - _RIGHT, height - _BOTTOM - _SITES_HEIGHT
    extremes = [extreme for point in points for extreme in (point.low, point.high)]
    low, high = covering_range(_required_values(points), extremes)
    y = LogAxis(low, high, bottom, _TOP)
    step = (plot_right - _LEFT) / layers
    points_by_x = [(_LEFT + (point.depth - 0.5) * step, point) for point in points]
    intervals = [(x, point.confidence_interval) for x, point in points_by_x]
    marks = {
        "ranges": "".join(_bar(x, y, point.low, point.high) for x, point in points_by_x),
        "errors": "".join(_bar(x, y, *interval) for x, interval in intervals if interval is not None),
        "beyond": "".join(_arrows(x, y, point) for x, point in points_by_x),
        **_dots(points_by_x, y, step),
        **_ticks(get_mappings(facts, "dropout_sites"), step, layers, bottom),
    }
    depths = integer_ticks(layers, max(2, width // 90))  # a label needs about 90 pixels
    return Drawing(
        width=width, height=height, left=_LEFT, right=plot_right, bottom=bottom,
        unit_ratio=y.pixel_of(1), pens=_pens(step), marks=marks,
        y_labels=tuple((y.pixel_of(value), f"{value:g}") for value in y.ticks()),
        x_labels=tuple((_LEFT + (depth - 0.5) * step, str(depth)) for depth in depths),
        tooltips=tuple(
            (x - step / 2, step, point.tooltip_text) for x, point in points_by_x if tooltips
        ),
        title="Stored over new running variance of every BatchNorm layer, by depth",
        description=describe_chart(facts, points, low, high),
    )  # fmt: skip


def measured_points(facts: Mapping[str, Any]) -> list[LayerPoint]:
    """Return the layers that were measured, in order of execution."""
    points = []
    for depth, layer in enumerate(get_mappings(facts, "layers"), 1):
        ratio = get_mapping(layer, "ratio")
        median, low, high = (_drawable(ratio.get(key)) for key in ("median", "min", "max"))
        if median is not None:
            error = finite_number(get_mapping(layer, "relative_standard_error").get("median"))
            # The facts may come from a file that somebody has edited.
            if error is not None and error < 0:
                error = None
            name = str(layer.get("name") or "(root)")
            points.append(
                LayerPoint(name, layer_role(layer), depth, median, low or median, high or median, error)
            )
    return points


def _drawable(value: object) -> float | None:
    """Return a ratio that a logarithmic axis can hold, None if there is none.

    Axes divide and multiply ratios, so they are kept away from the largest and the smallest float.
    """
    number = finite_number(value)
    return min(max(number, 1e-100), 1e100) if number is not None and number > 0 else None


def describe_chart(
    facts: Mapping[str, Any], points: Sequence[LayerPoint], low: float = 0, high: float = math.inf
) -> str:
    """Return the chart in words: the range of the ratios, the control layers, the dropout sites.

    Markdown has no picture, and a screen reader reads this. ``low`` and ``high`` are the ends of
    the chart's axis.
    """
    lowest = min(points, key=lambda point: point.median)
    highest = max(points, key=lambda point: point.median)
    sentences = [
        f"{count_text(len(points), 'layer')}. "
        f"Median ratios run from {ratio_text(lowest.median)} ({lowest.name}) "
        f"to {ratio_text(highest.median)} ({highest.name})."
    ]
    controls = [point.median for point in points if point.role == "control"]
    if controls:
        span = f"{ratio_text(min(controls))} to {ratio_text(max(controls))}"
        sentences.append(f"{count_text(len(controls), 'control layer')}: {span}.")
    sites = [site for site in get_mappings(facts, "dropout_sites") if site.get("active")]
    depths = [depth for depth in (finite_number(site.get("depth")) for site in sites) if depth is not None]
    if depths:
        sentences.append(
            f"{count_text(len(sites), 'active dropout site')}, the first before layer "
            f"{min(depths) + 1:.0f}, the last before layer {max(depths) + 1:.0f}."
        )
    cut = sum(point.low < low or point.high > high for point in points)
    if cut:
        sentences.append(f"The ranges of {count_text(cut, 'layer')} go beyond the chart (arrows).")
    return " ".join(sentences)


def _required_values(points: Sequence[LayerPoint]) -> list[float]:
    """Return the values that the axis has to hold: all medians, and the ends of their error bars.

    An error bar of 50 % or more says so little that it may be cut off.
    """
    values = [point.median for point in points]
    for point in points:
        if point.error is not None and point.error < 0.5:
            values += point.confidence_interval or ()
    return values


def _bar(x: float, y: LogAxis, low: float, high: float) -> str:
    return f"M{x:.1f} {y.pixel_of(low):.1f}V{y.pixel_of(high):.1f}"


def _arrows(x: float, y: LogAxis, point: LayerPoint) -> str:
    """Return arrowheads at the ends of the plot, where the range of a layer goes beyond it."""
    up = f"M{x - 3:.1f} {y.end + 5:.1f}l3 -5 3 5z" if point.high > y.high else ""
    down = f"M{x - 3:.1f} {y.start - 5:.1f}l3 5 3 -5z" if point.low < y.low else ""
    return up + down


def _dots(points_by_x: Sequence[tuple[float, LayerPoint]], y: LogAxis, step: float) -> dict[str, str]:
    """Return the medians: dots for rewritten layers, diamonds for controls, crosses for others."""
    size = min(5.5, max(3.5, step / 2 + 1))
    marks = dict.fromkeys(("rewritten", "control", "kept"), "")
    for x, point in points_by_x:
        height = y.pixel_of(point.median)
        if point.role == "rewritten":
            # A line of length 0 with round ends is a dot.
            marks["rewritten"] += f"M{x:.1f} {height:.1f}h0"
        elif point.role == "control":
            up, down = f"{size:.1f} -{size:.1f}", f"{size:.1f} {size:.1f}"
            marks["control"] += f"M{x - size:.1f} {height:.1f}l{up} {down} -{down}z"
        else:
            marks["kept"] += f"M{x - 3:.1f} {height - 3:.1f}l6 6m0 -6l-6 6"
    return marks


def _pens(step: float) -> dict[str, float]:
    """Return the widths of the marks in pixels, for layers that stand ``step`` pixels apart."""
    return {
        name: round(min(max(share * step, least), largest), 2)
        for name, (share, least, largest) in _PENS.items()
    }


def _ticks(sites: Sequence[Mapping[str, Any]], step: float, layers: int, bottom: float) -> dict[str, str]:
    """Return a tick for every dropout site between the layers before and behind it.

    Inactive sites have short ticks. A site that reaches no layer stands behind the last one. Sites
    at one place share a tick, which keeps the path short.
    """
    marks = {"sites": "", "inactive": ""}
    for kind, height in (("sites", 12), ("inactive", 6)):
        wanted = [site for site in sites if bool(site.get("active")) == (kind == "sites")]
        depths = [finite_number(site.get("depth")) for site in wanted]
        for depth in dict.fromkeys(layers if depth is None else depth for depth in depths):
            x, y = _LEFT + depth * step, bottom + _SITES_HEIGHT - 4
            marks[kind] += f"M{x:.1f} {y:.1f}v-{height}"
    return marks
