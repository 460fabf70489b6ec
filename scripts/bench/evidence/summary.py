"""Tables of the records, and the bars that the estimators have to pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bench.evidence.cell_records import Measurement, Record, Way
from bench.evidence.cells import BASE, IDEAL

ERROR, NLL = METRICS = ("error", "NLL")
SIGNIFICANT = 0.05
ROUNDING = 2e-5  # of a difference of two stored NLL; an error in percent is coarser
FEWEST_SEEDS = 3
KEPT_GAIN = (
    0.7  # without data, of what `pooled` gains on inputs as in training; on wrong data, of `ratio`'s gain
)
TOLERATED_LOSS = 0.02  # nats


@dataclass(frozen=True, order=True)
class Condition:
    """A cell without its seed."""

    data: str
    net: str
    augmentation: str
    moment: str

    def __str__(self) -> str:
        return f"{self.net}, {self.augmentation}, {self.moment}"


@dataclass(frozen=True)
class PairedChange:
    """The mean over seeds of the differences between two corrections of the same nets."""

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def standard_error(self) -> float:
        return float(np.std(self.differences, ddof=1) / len(self.differences) ** 0.5)

    def p_value(self, *, greater: bool) -> float:
        """Of the one-sided t-test that the mean is greater (or less) than 0.

        The standard error counts as what rounding makes of it at least. Otherwise a difference in the
        last digit, the same for all seeds, would be the most significant of all.
        """
        t = self.mean / max(self.standard_error, ROUNDING)
        return float(stats.t.sf(t if greater else -t, len(self.differences) - 1))


Grouped = dict[Condition, list[Record]]


def group_records(records: Iterable[Record], ways: Sequence[Way]) -> Grouped:
    """Collect the records of all seeds of each condition, of those that have all of these corrections.

    Conditions with fewer than three seeds are left out.
    """
    groups: Grouped = {}
    for record in sorted(records, key=lambda record: record.cell.seed):
        cell = record.cell
        if all(way in record.measurements for way in ways):
            condition = Condition(cell.data, cell.net, cell.augmentation, cell.moment)
            groups.setdefault(condition, []).append(record)
    return {condition: group for condition, group in groups.items() if len(group) >= FEWEST_SEEDS}


def compare(group: Sequence[Record], way: Way, other: Way, metric: str) -> PairedChange:
    """How much higher the metric is with one correction than with the other, seed by seed."""
    return PairedChange(
        tuple(
            read_metric(record.measurements[way], metric) - read_metric(record.measurements[other], metric)
            for record in group
        )
    )


def read_metric(measurement: Measurement, metric: str) -> float:
    return measurement.error if metric == ERROR else measurement.nll


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): below 0.05, at most 5 % of such families have a false one."""
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class WorseCell:
    """A condition in which a correction is worse than another, with the p-value before and after Holm."""

    condition: Condition
    metric: str
    change: PairedChange
    p_value: float
    adjusted: float

    def __str__(self) -> str:
        return (
            f"{self.condition}: {self.metric} {format_change(self.change, self.metric)}, "
            f"p {self.p_value:.2g}, after Holm {self.adjusted:.2g}"
        )


def find_worse(groups: Grouped, way: Way, other: Way, metric: str) -> list[WorseCell]:
    """Conditions in which `way` has a higher metric with p < 0.05 before Holm's adjustment, worst first."""
    changes = {condition: compare(group, way, other, metric) for condition, group in groups.items()}
    p_values = [change.p_value(greater=True) for change in changes.values()]
    cells = [
        WorseCell(condition, metric, change, p_value, adjusted)
        for (condition, change), p_value, adjusted in zip(
            changes.items(), p_values, adjust_p_values(p_values), strict=True
        )
    ]
    return sorted((cell for cell in cells if cell.p_value < SIGNIFICANT), key=lambda cell: cell.p_value)


def average_conditions(groups: Grouped, way: Way, other: Way, metric: str) -> PairedChange:
    """The difference in the mean over conditions, for each seed that all of them have."""
    seeds = set.intersection(*({record.cell.seed for record in group} for group in groups.values()))
    changes = [
        compare([record for record in group if record.cell.seed in seeds], way, other, metric).differences
        for group in groups.values()
    ]
    return PairedChange(tuple(float(value) for value in np.mean(changes, axis=0)))


@dataclass(frozen=True)
class KeptGain:
    """What a correction gains in NLL where another one gains significantly, summed over conditions."""

    conditions: tuple[Condition, ...]
    reference: float
    kept: float

    @property
    def share(self) -> float:
        return self.kept / self.reference if self.reference else float("nan")


def measure_kept_gain(groups: Grouped, way: Way, reference: Way = IDEAL) -> KeptGain:
    gains: dict[Condition, tuple[float, float]] = {}
    for condition, group in groups.items():
        gain = compare(group, reference, BASE, NLL)
        if gain.p_value(greater=False) < SIGNIFICANT:
            gains[condition] = (-gain.mean, -compare(group, way, BASE, NLL).mean)
    reference_sum, kept_sum = (
        (sum(column) for column in zip(*gains.values(), strict=True)) if gains else (0, 0)
    )
    return KeptGain(tuple(gains), reference_sum, kept_sum)


def find_losses(groups: Grouped, way: Way) -> dict[Condition, PairedChange]:
    """Conditions in which the NLL is over 0.02 nats above that of the net as trained."""
    changes = {condition: compare(group, way, BASE, NLL) for condition, group in groups.items()}
    return {condition: change for condition, change in changes.items() if change.mean > TOLERATED_LOSS}


def format_change(change: PairedChange, metric: str) -> str:
    digits = 2 if metric == ERROR else 3
    return f"{change.mean:+.{digits}f} ± {change.standard_error:.{digits}f}".replace("-", "−")
