"""The chart of a report: stored / new variance of every BN layer against depth, as geometry that a template draws.

One path for each kind of mark keeps the page small: a network has hundreds of layers, a folder hundreds of networks.
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
_LEFT, _RIGHT, _TOP, _SITES, _BOTTOM = 52, 10, 12, 22, 40  # margins; the strip of the dropout sites is _SITES high


class LayerPoint(NamedTuple):
    """A measured layer: ``depth`` from 1, ratios, relative standard error (None: unknown)."""

    name: str
    role: str
    depth: int
    median: float
    low: float
    high: float
    error: float | None

    @property
    def confidence_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the median channel's ratio, symmetric on a log axis."""
        factor = None if self.error is None else math.exp(min(NORMAL_QUANTILE * self.error, 50))
        return None if factor is None else (self.median / factor, self.median * factor)

    @property
    def tooltip_text(self) -> str:
        """What a pointer over the layer is told."""
        error = "" if self.error is None else f", standard error {percent_text(self.error)}"
        return (
            f"{self.depth}: {self.name} ({self.role}), {ratio_text(self.median)}, "
            f"channels {ratio_text(self.low)} to {ratio_text(self.high)}{error}"
        )


@dataclass(frozen=True)
class Drawing:
    """A chart in pixels: path data by kind of mark, labels with their places, and the same in words."""

    width: int
    height: int
    left: float
    right: float
    bottom: float  # the axis
    one: float  # where the ratio is 1
    pens: Mapping[str, float]  # widths of the marks that depend on how close the layers stand
    marks: Mapping[str, str]
    y_labels: tuple[tuple[float, str], ...]
    x_labels: tuple[tuple[float, str], ...]
    hits: tuple[tuple[float, float, str], ...]  # left edge, width and words of every layer
    title: str
    description: str


def draw_chart(facts: Mapping[str, Any], *, width: int, height: int, hits: bool) -> Drawing | None:
    """The chart of a checkpoint's facts; None if no layer was measured. ``hits``: say a layer's numbers on hover."""
    points = measured_points(facts)
    if not points:
        return None
    layers = max(len(get_mappings(facts, "layers")), 1)
    plot_right, bottom = width - _RIGHT, height - _BOTTOM - _SITES
    low, high = covering_range(_certain(points), [end for point in points for end in (point.low, point.high)])
    y = LogAxis(low, high, bottom, _TOP)
    step = (plot_right - _LEFT) / layers
    placed = [(_LEFT + (point.depth - 0.5) * step, point) for point in points]
    marks = {
        "ranges": "".join(_bar(x, y, point.low, point.high) for x, point in placed),
        "errors": "".join(
            _bar(x, y, *point.confidence_interval) for x, point in placed if point.confidence_interval is not None
        ),
        "beyond": "".join(_arrows(x, y, point) for x, point in placed),
        **_dots(placed, y, step),
        **_ticks(get_mappings(facts, "dropout_sites"), step, layers, bottom),
    }
    return Drawing(
        width=width, height=height, left=_LEFT, right=plot_right, bottom=bottom, one=y.pixel_of(1),
        pens=_pens(step), marks=marks,
        y_labels=tuple((y.pixel_of(value), f"{value:g}") for value in y.ticks()),
        x_labels=tuple((_LEFT + (at - 0.5) * step, str(at)) for at in integer_ticks(layers, max(2, width // 90))),
        hits=tuple((x - step / 2, step, point.tooltip_text) for x, point in placed) if hits else (),
        title="Stored over new running variance of every BatchNorm layer, by depth",
        description=describe_chart(facts, points, low, high),
    )  # fmt: skip


def measured_points(facts: Mapping[str, Any]) -> list[LayerPoint]:
    """The layers with a ratio, in order of execution."""
    found = []
    for depth, row in enumerate(get_mappings(facts, "layers"), 1):
        ratio = get_mapping(row, "ratio")
        median, low, high = (_drawable(ratio.get(key)) for key in ("median", "min", "max"))
        if median is not None:
            error = finite_number(get_mapping(row, "relative_standard_error").get("median"))
            known = error if error is not None and error >= 0 else None
            name = str(row.get("name") or "(root)")
            found.append(LayerPoint(name, layer_role(row), depth, median, low or median, high or median, known))
    return found


def _drawable(value: object) -> float | None:
    """A ratio above zero, kept away from the ends of what a float holds: axes divide and multiply them."""
    found = finite_number(value)
    return min(max(found, 1e-100), 1e100) if found is not None and found > 0 else None


def describe_chart(
    facts: Mapping[str, Any], points: Sequence[LayerPoint], low: float = 0, high: float = math.inf
) -> str:
    """The chart in words."""
    lowest, highest = min(points, key=lambda p: p.median), max(points, key=lambda p: p.median)
    parts_of_it = [
        f"{count_text(len(points), 'layer')}. Median ratios run from {ratio_text(lowest.median)} ({lowest.name}) "
        f"to {ratio_text(highest.median)} ({highest.name})."
    ]
    controls = [point.median for point in points if point.role == "control"]
    if controls:
        span = f"{ratio_text(min(controls))} to {ratio_text(max(controls))}"
        parts_of_it.append(f"{count_text(len(controls), 'control layer')}: {span}.")
    depths = [site.get("depth") for site in get_mappings(facts, "dropout_sites") if site.get("active")]
    known = [depth for depth in map(finite_number, depths) if depth is not None]
    if known:
        where = f"the first before layer {min(known) + 1:.0f}, the last before layer {max(known) + 1:.0f}"
        parts_of_it.append(f"{count_text(len(depths), 'active dropout site')}, {where}.")
    cut = sum(point.low < low or point.high > high for point in points)
    if cut:
        parts_of_it.append(f"The ranges of {count_text(cut, 'layer')} go beyond the chart (arrows).")
    return " ".join(parts_of_it)


def _certain(points: Sequence[LayerPoint]) -> list[float]:
    """What has to be seen whole: medians and their error bars, if those are of a size that tells anything."""
    medians = [point.median for point in points]
    ends = [
        end
        for p in points
        if p.confidence_interval is not None and p.error is not None and p.error < 0.5
        for end in p.confidence_interval
    ]
    return medians + ends


def _bar(x: float, y: LogAxis, low: float, high: float) -> str:
    return f"M{x:.1f} {y.pixel_of(low):.1f}V{y.pixel_of(high):.1f}"


def _arrows(x: float, y: LogAxis, point: LayerPoint) -> str:
    up = f"M{x - 3:.1f} {y.end + 5:.1f}l3 -5 3 5z" if point.high > y.high else ""
    down = f"M{x - 3:.1f} {y.start - 5:.1f}l3 5 3 -5z" if point.low < y.low else ""
    return up + down


def _dots(placed: Sequence[tuple[float, LayerPoint]], y: LogAxis, step: float) -> dict[str, str]:
    """Round dots (of zero length, drawn with a round pen), diamonds for controls, crosses for what was kept."""
    size = min(4.5, max(2.5, step / 2))
    marks = dict.fromkeys(("rewritten", "control", "kept"), "")
    for x, point in placed:
        at = y.pixel_of(point.median)
        kind = point.role if point.role in marks else "kept"
        marks[kind] += {
            "rewritten": f"M{x:.1f} {at:.1f}h0",
            "control": f"M{x - size - 1:.1f} {at:.1f}l{size + 1:.1f} -{size + 1:.1f} {size + 1:.1f} {size + 1:.1f} "
            f"-{size + 1:.1f} {size + 1:.1f}z",
            "kept": f"M{x - 3:.1f} {at - 3:.1f}l6 6m0 -6l-6 6",
        }[kind]
    return marks


def _pens(step: float) -> dict[str, float]:
    """Widths in pixels, for layers that stand ``step`` pixels apart."""
    return {name: round(min(max(share * step, least), most), 2) for name, (share, least, most) in _PENS.items()}


_PENS = {"rewritten": (0.7, 2.6, 5.0), "ranges": (0.3, 0.6, 1.5), "errors": (0.4, 1.2, 2.0), "sites": (0.3, 0.8, 1.75)}


def _ticks(sites: Sequence[Mapping[str, Any]], step: float, layers: int, bottom: float) -> dict[str, str]:
    """A tick for every place with dropout, between the layers it stands between; low ones are off."""
    marks = {"sites": "", "inactive": ""}
    seen = set()
    for site in sites:
        depth, kind = finite_number(site.get("depth")), "sites" if site.get("active") else "inactive"
        depth = layers if depth is None else depth
        if (depth, kind) not in seen:
            seen.add((depth, kind))
            height = 12 if kind == "sites" else 6
            marks[kind] += f"M{_LEFT + depth * step:.1f} {bottom + _SITES - 4:.1f}v-{height}"
    return marks
