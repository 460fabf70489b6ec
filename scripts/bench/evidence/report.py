"""Print the records of the comparison: a table of all conditions, the probes, and the bars."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bench.evidence.cell_records import Record, Way
from bench.evidence.cells import AUTO, BASE, IDEAL, POOLED, RATIO, WAYS
from bench.evidence.correction_inputs import AS_IN_TRAINING, NO_DATA, PLAIN, POOR_INPUTS
from bench.evidence.summary import (
    ERROR,
    FEWEST_SEEDS,
    KEPT_GAIN,
    METRICS,
    NLL,
    SIGNIFICANT,
    TOLERATED_LOSS,
    Grouped,
    average_conditions,
    compare,
    find_losses,
    find_worse,
    format_change,
    group_records,
    measure_kept_gain,
    read_metric,
)
from bench.evidence.wrong_images import WRONG_INPUTS

COLUMNS: tuple[Way, ...] = (
    IDEAL,
    (POOLED, PLAIN),
    (RATIO, PLAIN),
    (AUTO, PLAIN),
    (AUTO, NO_DATA),
)


def render_table(records: Sequence[Record], metric: str, columns: Sequence[Way] = COLUMNS) -> str:
    """A Markdown table: the metric as trained, and its change ± standard error for each correction."""
    titles = [f"`{correction}`, {inputs}" for correction, inputs in columns]
    lines = [
        f"| net | training | seeds | {metric} as trained | " + " | ".join(titles) + " |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for condition, group in group_records(records, (BASE,)).items():
        base = np.mean([read_metric(record.measurements[BASE], metric) for record in group])
        training = condition.augmentation + (", half-way" if condition.moment == "halfway" else "")
        cells = [condition.net, training, str(len(group)), f"{base:.{2 if metric == ERROR else 3}f}"]
        for way in columns:
            measured = [record for record in group if way in record.measurements]
            known = len(measured) >= FEWEST_SEEDS
            cells.append(format_change(compare(measured, way, BASE, metric), metric) if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_trainings(records: Sequence[Record], metric: str) -> str:
    """The mean change over all nets of one data set, for each training and moment."""
    base, *columns = WAYS["bars"]
    groups = group_records(records, WAYS["bars"])
    titles = [f"`{correction}`, {inputs}" for correction, inputs in columns]
    lines = [f"| training | nets | {metric}: " + " | ".join(titles) + " |", "|---" * (2 + len(columns)) + "|"]
    kinds = dict.fromkeys((each.data, each.augmentation, each.moment) for each in groups)
    for data, augmentation, moment in kinds:
        nets = {
            condition: group
            for condition, group in groups.items()
            if (condition.data, condition.augmentation, condition.moment) == (data, augmentation, moment)
        }
        changes = [format_change(average_conditions(nets, way, base, metric), metric) for way in columns]
        training = f"{data}, {augmentation}" + (", half-way" if moment == "halfway" else "")
        lines.append(f"| {training} | {len(nets)} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def render_means(records: Sequence[Record], ways: Sequence[Way]) -> str:
    """The mean change over all conditions, and the worst of them, for each correction."""
    lines = [
        "| correction | conditions | error, mean change | NLL, mean change | NLL, worst condition |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        groups = group_records(records, (BASE, way))
        if not groups:
            continue
        error, nll = (
            [compare(group, way, BASE, metric).mean for group in groups.values()] for metric in METRICS
        )
        worst = max(zip(nll, groups, strict=True))
        lines.append(
            f"| `{way[0]}`, {way[1]} | {len(groups)} | {np.mean(error):+.2f} | {np.mean(nll):+.4f} | "
            f"{worst[0]:+.3f} ({worst[1]}) |"
        )
    return "\n".join(lines)


def render_bars(records: Sequence[Record]) -> str:
    """What the estimators have to show, with the measured values and every condition that breaks a bar."""
    groups = group_records(records, WAYS["bars"])
    if not groups:
        return "No condition has enough seeds with all corrections."
    bars = (
        _bars_with_data(groups),
        _bars_without_data(groups),
        _bars_on_wrong_data(records),
        _choices(records),
    )
    return "\n".join(itertools.chain(*bars))


def _bars_with_data(groups: Grouped) -> Iterator[str]:
    for metric in METRICS:
        worse = find_worse(groups, (AUTO, PLAIN), IDEAL, metric)
        broken = [cell for cell in worse if cell.adjusted < SIGNIFICANT]
        yield (
            f"{_mark(not broken)} `auto` on plain data worse in {metric} than `pooled` on inputs as in "
            f"training: {len(broken)} of {len(groups)} conditions after Holm, {len(worse)} before"
        )
        yield from (f"    {cell}" for cell in worse)
    augmented = {condition: group for condition, group in groups.items() if condition.augmentation != "none"}
    for metric in METRICS if augmented else ():
        change = average_conditions(augmented, (AUTO, PLAIN), (POOLED, PLAIN), metric)
        yield (
            f"{_mark(change.mean < 0)} `auto` against `pooled` on plain data, mean over augmented trainings, "
            f"{metric}: {format_change(change, metric)}"
        )


def _bars_without_data(groups: Grouped) -> Iterator[str]:
    way = (AUTO, NO_DATA)
    kept = measure_kept_gain(groups, way)
    yield (
        f"{_mark(kept.share >= KEPT_GAIN)} without data {100 * kept.share:.0f} % of the gain in NLL "
        f"({kept.kept:.3f} of {kept.reference:.3f} nats over {len(kept.conditions)} conditions)"
    )
    losses = find_losses(groups, way)
    yield (
        f"{_mark(not losses)} without data over {TOLERATED_LOSS} nats worse than as trained: "
        f"{len(losses)} conditions"
    )
    for condition, change in losses.items():
        yield f"    {condition}: NLL {format_change(change, NLL)}"


def _bars_on_wrong_data(records: Sequence[Record]) -> Iterator[str]:
    for inputs in WRONG_INPUTS:
        way, right = (RATIO, inputs), (RATIO, PLAIN)
        kept = measure_kept_gain(group_records(records, (BASE, right, way)), way, right)
        if kept.conditions:
            yield (
                f"{_mark(kept.share >= KEPT_GAIN)} `ratio` on {inputs}: {100 * kept.share:.0f} % of its gain "
                f"in NLL on plain images ({kept.kept:.3f} of {kept.reference:.3f} nats over "
                f"{len(kept.conditions)} conditions)"
            )


def _choices(records: Iterable[Record]) -> Iterator[str]:
    for inputs in (PLAIN, NO_DATA):
        way = (AUTO, inputs)
        chosen = Counter(
            record.measurements[way].estimator for record in records if way in record.measurements
        )
        if chosen:
            words = ", ".join(f"`{estimator}` {count} times" for estimator, count in chosen.most_common())
            yield f"`auto` on {inputs}: {words}"


def _mark(passed: bool) -> str:
    return "passed:" if passed else "BROKEN:"


def render_report(records: Sequence[Record]) -> str:
    """Everything, in Markdown."""
    extremes = [(correction, inputs) for inputs in POOR_INPUTS for correction in (POOLED, RATIO)]
    parts = [render_table(records, metric) for metric in METRICS]
    parts += [render_trainings(records, metric) for metric in METRICS]
    ways = (*COLUMNS, (RATIO, AS_IN_TRAINING), *extremes, (RATIO, NO_DATA), *WAYS["wrong"], *WAYS["probes"])
    parts.append(render_means(records, ways))
    parts.append(render_bars(records))
    return "\n\n".join(parts)
