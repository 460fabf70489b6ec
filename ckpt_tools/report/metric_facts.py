"""The metrics among the facts of a run with labelled data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tools.report.facts import Facts, part
from ckpt_tools.report.number_format import measured

_STAGES = ("before", "after", "change")


def metrics(facts: Facts) -> dict[str, tuple[object, object, object]]:
    """Every metric by its name: before, after and change, None where one was not measured."""
    found = part(facts, "metrics")
    flat = [dict(_flat(part(found, stage))) for stage in _STAGES]
    names = {name: None for stage in flat for name in stage}
    return {name: (flat[0].get(name), flat[1].get(name), flat[2].get(name)) for name in names}


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, entry in entries.items():
        if isinstance(entry, Mapping) and "value" not in entry:
            yield from _flat(entry, f"{prefix}{name} ")
        elif measured(entry)[0] is not None:
            yield f"{prefix}{name}".replace("_", " "), entry


def unit_of(facts: Facts, name: str) -> str:
    """``percent, 15 bins, l1`` of ``ece`` and of ``calibration ece``; "" where none is told."""
    return str(part(part(facts, "metrics"), "units").get(name.rpartition(" ")[2], ""))
