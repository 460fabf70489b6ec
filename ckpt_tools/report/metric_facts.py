"""The metrics among the facts of a run with labelled data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tools.report.facts import Facts, get_mapping
from ckpt_tools.report.number_format import value_and_error

_STAGES = ("before", "after", "change")


def metrics_by_name(facts: Facts) -> dict[str, tuple[object, object, object]]:
    """Every metric by its name: before, after and change, None where one was not measured."""
    found = get_mapping(facts, "metrics")
    flat = [dict(_flat(get_mapping(found, stage))) for stage in _STAGES]
    names = {name: None for stage in flat for name in stage}
    return {name: (flat[0].get(name), flat[1].get(name), flat[2].get(name)) for name in names}


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, entry in entries.items():
        if isinstance(entry, Mapping) and "value" not in entry:
            yield from _flat(entry, f"{prefix}{name} ")
        elif value_and_error(entry)[0] is not None:
            yield f"{prefix}{name}".replace("_", " "), entry


def metric_unit(facts: Facts, name: str) -> str:
    """``percent, 15 bins, l1`` of ``ece`` and of ``calibration ece``; "" where none is told."""
    return str(get_mapping(get_mapping(facts, "metrics"), "units").get(name.rpartition(" ")[2], ""))
