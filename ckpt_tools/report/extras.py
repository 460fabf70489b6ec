"""What only some runs have: metrics before and after, and images that were skipped or flagged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tools.report.columns import count
from ckpt_tools.report.content import Cell, Column, Section, Table
from ckpt_tools.report.numbers import measured, measured_text, number, number_cell

_STAGES = ("before", "after", "change")
_FLAGGED = ("outliers", "flagged", "flagged_images")


def metrics(facts: Mapping[str, Any]) -> dict[str, tuple[object, object, object]]:
    """Every metric by its name: before, after and difference, None where one was not measured."""
    found = facts.get("metrics")
    stages = [found.get(stage) if isinstance(found, Mapping) else None for stage in _STAGES]
    flat = [dict(_flat(stage)) if isinstance(stage, Mapping) else {} for stage in stages]
    names = {name: None for stage in flat for name in stage}
    return {name: (flat[0].get(name), flat[1].get(name), flat[2].get(name)) for name in names}


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, entry in entries.items():
        if isinstance(entry, Mapping) and "value" not in entry:
            yield from _flat(entry, f"{prefix}{name} ")
        elif measured(entry)[0] is not None:
            yield f"{prefix}{name}".replace("_", " "), entry


def metrics_section(facts: Mapping[str, Any]) -> Section | None:
    """The metrics in a table; None without any."""
    rows = [
        (
            Cell(name, name),
            _metric(before),
            _metric(after),
            _metric(difference, signed=True),
        )
        for name, (before, after, difference) in metrics(facts).items()
    ]
    if not rows:
        return None
    columns = (Column("Metric"), Column("Before", "number"), Column("After", "number"), Column("Difference", "number"))
    entries = facts["metrics"].items()
    pairs = tuple((name.replace("_", " "), str(entry)) for name, entry in entries if _is_plain(entry))
    errors = any(measured(entry)[1] is not None for row in metrics(facts).values() for entry in row)
    said = ("After ± stands the standard error.",) if errors else ()
    return Section("Before and after", said, pairs=pairs, table=Table("Before and after", columns, tuple(rows)))


def _metric(entry: object, *, signed: bool = False) -> Cell:
    return number_cell(measured(entry)[0], measured_text(entry, signed=signed))


def _is_plain(entry: object) -> bool:
    return isinstance(entry, (str, int, float)) and not isinstance(entry, bool)


def flagged_section(facts: Mapping[str, Any]) -> Section:
    """Samples that could not be read, and those that stand out, in one table."""
    data = facts.get("data")
    data = data if isinstance(data, Mapping) else {}
    skipped = [("skipped", entry) for entry in _entries(data.get("skipped"))]
    flagged = [("flagged", entry) for place in (facts, data) for key in _FLAGGED for entry in _entries(place.get(key))]
    if not skipped and not flagged:
        looked = any(key in place for place in (facts, data) for key in _FLAGGED)
        return Section("Flagged images", (_ALL_READ + (", and none stood out." if looked else "."),), "quiet")
    rows = tuple(_flag(what, entry) for what, entry in [*skipped, *flagged[:_LISTED]])
    said = f"{count(len(skipped), 'sample')} skipped as unreadable, {len(flagged):,} flagged and not counted."
    if len(flagged) > _LISTED:
        said += f" The first {_LISTED} are listed; --json names all."
    columns = (Column("Image", "code"), Column("What"), Column("Why"))
    return Section("Flagged images", (said,), table=Table("Flagged images", columns, rows))


_LISTED = 10  # of those that stand out
_ALL_READ = "None: every image could be read"


def _entries(found: object) -> list[object]:
    if isinstance(found, Mapping):  # {"images": […], …} or {"threshold": …}
        return [entry for value in found.values() if isinstance(value, (list, tuple)) for entry in value]
    return list(found) if isinstance(found, (list, tuple)) else []


def _flag(what: str, entry: object) -> tuple[Cell, ...]:
    if not isinstance(entry, Mapping):
        return (Cell(str(entry), str(entry)), Cell(what, what), Cell(""))
    name = str(entry.get("name", entry.get("path", entry.get("index", ""))))
    rest = [f"{key} {_short(value)}" for key, value in entry.items() if key not in ("name", "path", "reason")]
    why = ", ".join([*([str(entry["reason"])] if entry.get("reason") else []), *rest])
    return (Cell(name, name), Cell(what, what), Cell(why, why))


def _short(value: object) -> str:
    found = number(value)
    return str(value) if found is None else f"{found:.4g}"
