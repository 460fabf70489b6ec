"""Images that could not be read, and those that stand out from all others."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tools.report.columns import count_text
from ckpt_tools.report.facts import Facts, get_mapping
from ckpt_tools.report.number_format import finite_number
from ckpt_tools.report.page_content import Cell, Column, Section, Table

_FLAGGED = ("outliers", "flagged", "flagged_images")
_LISTED = 10  # of those that stand out
_ALL_READ = "None: every image could be read"


def flagged_section(facts: Facts) -> Section:
    """Samples that could not be read, of the labelled data too, and those that stand out, in one table."""
    data, labelled = get_mapping(facts, "data"), get_mapping(facts, "metrics")
    skipped = [("skipped", entry) for entry in _entries(data.get("skipped"))]
    skipped += [("skipped (labelled data)", entry) for entry in _entries(labelled.get("skipped"))]
    flagged = [("flagged", entry) for place in (facts, data) for key in _FLAGGED for entry in _entries(place.get(key))]
    if not skipped and not flagged:
        looked = any(key in place for place in (facts, data) for key in _FLAGGED)
        return Section("Flagged images", (_ALL_READ + (", and none stood out." if looked else "."),), "quiet")
    rows = tuple(_flag(what, entry) for what, entry in [*skipped, *flagged[:_LISTED]])
    said = f"{count_text(len(skipped), 'sample')} skipped as unreadable, {len(flagged):,} flagged and not counted."
    if len(flagged) > _LISTED:
        said += f" The first {_LISTED} are listed; --json names all."
    columns = (Column("Image", "code"), Column("What"), Column("Why"))
    return Section("Flagged images", (said,), table=Table("Flagged images", columns, rows))


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
    found = finite_number(value)
    return str(value) if found is None else f"{found:.4g}"
