"""Print the records of the comparison: a table of all conditions, the probes, and the bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bench.evidence.cell_records import Record
from bench.evidence.cells import AUTO, POOLED, PROBES, RATIO
from bench.evidence.correction_inputs import AS_IN_TRAINING, NO_DATA, PLAIN
from bench.evidence.summary import (
    BASE,
    IDEAL,
    KEPT_GAIN,
    METRICS,
    Grouped,
    Way,
    average_augmented,
    compare,
    find_losses,
    find_worse,
    format_change,
    group_records,
    measure_kept_gain,
)

COLUMNS: tuple[Way, ...] = (
    IDEAL,
    (POOLED, PLAIN),
    (RATIO, AS_IN_TRAINING),
    (RATIO, PLAIN),
    (AUTO, PLAIN),
    (AUTO, NO_DATA),
)
POOR_INPUTS = ("32 plain", "half of the classes", "wrong normalisation")


def render_table(records: Sequence[Record], metric: str, columns: Sequence[Way] = COLUMNS) -> str:
    """A Markdown table: the metric as trained, and its change ± standard error for each correction."""
    groups = group_records(records, (BASE, *columns))
    place = METRICS.index(metric)
    titles = [f"`{correction}`, {inputs}" for correction, inputs in columns]
    lines = [
        f"| net | training | seeds | {metric} as trained | " + " | ".join(titles) + " |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for condition, group in groups.items():
        base = np.mean([record.scores[BASE[0]][BASE[1]][place] for record in group])
        changes = [format_change(compare(group, way, BASE, metric), metric) for way in columns]
        training = condition.augmentation + (", half-way" if condition.moment == "halfway" else "")
        cells = [condition.net, training, str(len(group)), f"{base:.{2 if place == 0 else 3}f}", *changes]
        lines.append("| " + " | ".join(cells) + " |")
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
    ways = (BASE, IDEAL, (POOLED, PLAIN), (AUTO, PLAIN), (AUTO, NO_DATA))
    groups = group_records(records, ways)
    if not groups:
        return "No condition has enough seeds with all corrections."
    return "\n".join([*_bars_with_data(groups), *_bars_without_data(groups), *_choices(records)])


def _bars_with_data(groups: Grouped) -> Iterator[str]:
    for metric in METRICS:
        worse = find_worse(groups, (AUTO, PLAIN), IDEAL, metric)
        broken = [cell for cell in worse if cell.adjusted < 0.05]
        yield (
            f"{_mark(not broken)} `auto` on plain data worse in {metric} than `pooled` on inputs as in training: "
            f"{len(broken)} of {len(groups)} conditions after Holm, {len(worse)} before"
        )
        yield from (f"    {cell}" for cell in worse)
    for metric in METRICS:
        change = average_augmented(groups, (AUTO, PLAIN), (POOLED, PLAIN), metric)
        yield (
            f"{_mark(change.mean < 0)} `auto` against `pooled` on plain data, mean over augmented trainings, "
            f"{metric}: {format_change(change, metric)}"
        )


def _bars_without_data(groups: Grouped) -> Iterator[str]:
    way = (AUTO, NO_DATA)
    kept = measure_kept_gain(groups, way)
    yield (
        f"{_mark(kept.share >= KEPT_GAIN)} without data {100 * kept.share:.0f} % of the gain in NLL "
        f"({kept.without_data:.3f} of {kept.ideal:.3f} nats over {len(kept.conditions)} conditions)"
    )
    losses = find_losses(groups, way)
    yield f"{_mark(not losses)} without data over 0.02 nats worse than as trained: {len(losses)} conditions"
    for condition, change in losses.items():
        yield f"    {condition}: NLL {format_change(change, 'NLL')}"


def _choices(records: Iterable[Record]) -> Iterator[str]:
    for inputs in (PLAIN, NO_DATA):
        chosen = Counter(record.chosen[inputs] for record in records if inputs in record.chosen)
        if chosen:
            words = ", ".join(f"`{estimator}` {count} times" for estimator, count in chosen.most_common())
            yield f"`auto` on {inputs}: {words}"


def _mark(passed: bool) -> str:
    return "passed:" if passed else "BROKEN:"


def render_report(records: Sequence[Record]) -> str:
    """Everything, in Markdown."""
    poor = [(correction, inputs) for inputs in POOR_INPUTS for correction in (POOLED, RATIO)]
    probe_names = list(dict.fromkeys(name for record in records for name in record.scores.get(PROBES, {})))
    probes = [(PROBES, name) for name in probe_names]
    parts = [render_table(records, metric) for metric in METRICS]
    parts.append(render_means(records, (*COLUMNS, *poor, (RATIO, NO_DATA), *probes)))
    parts.append(render_bars(records))
    return "\n\n".join(parts)
