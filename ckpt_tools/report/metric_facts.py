"""The metrics among the facts of a run with labelled data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tools.report.facts import Facts, get_mapping
from ckpt_tools.report.number_format import value_and_error


def metrics_by_name(facts: Facts) -> dict[str, tuple[object, object, object]]:
    """Return every metric's entries before, after and of the change, None where not measured.

    The metrics after temperature scaling, which stand in a mapping of their own, are named
    ``calibration error`` …
    """
    metrics = get_mapping(facts, "metrics")
    before, after, change = (
        dict(_named_entries(get_mapping(metrics, stage))) for stage in ("before", "after", "change")
    )
    # A dict keeps the order of its keys, which a set would lose.
    names = dict.fromkeys([*before, *after, *change])
    return {name: (before.get(name), after.get(name), change.get(name)) for name in names}


def _named_entries(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, entry in entries.items():
        # A mapping without a value is a group of metrics, such as "calibration".
        if isinstance(entry, Mapping) and "value" not in entry:
            yield from _named_entries(entry, f"{prefix}{name} ")
        elif value_and_error(entry)[0] is not None:
            yield f"{prefix}{name}".replace("_", " "), entry


def metric_unit(facts: Facts, name: str) -> str:
    """Return the unit of a metric, such as ``percent, 15 bins, l1``; "" if none is recorded.

    ``calibration ece`` has the unit of ``ece``.
    """
    units = get_mapping(get_mapping(facts, "metrics"), "units")
    return str(units.get(name.rpartition(" ")[2], ""))
