"""Images that did not count: those that could not be read, and outliers."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_tools.report.columns import count_text
from ckpt_tools.report.facts import Facts, get_list, get_mapping
from ckpt_tools.report.number_format import finite_number
from ckpt_tools.report.page_content import Cell, Column, Section, Table

_SHOWN_OUTLIERS = 10


def flagged_section(facts: Facts) -> Section:
    """Return a table of the samples that did not count.

    Some could not be read, among the labelled images as well; others were left out as outliers. The
    facts of an evaluation have no list of outliers, since nothing is left out there.
    """
    skipped = [("skipped", sample) for sample in get_list(get_mapping(facts, "data"), "skipped")]
    skipped += [
        ("skipped (labelled data)", image) for image in get_list(get_mapping(facts, "metrics"), "skipped")
    ]
    outliers = [("flagged", outlier) for outlier in get_list(facts, "outliers")]
    if not skipped and not outliers:
        ending = ", and none stood out." if "outliers" in facts else "."
        return Section("Flagged images", (f"None: every image could be read{ending}",), "quiet")
    rows = tuple(_row(outcome, entry) for outcome, entry in [*skipped, *outliers[:_SHOWN_OUTLIERS]])
    samples = count_text(len(skipped), "sample")
    sentence = f"{samples} skipped as unreadable, {len(outliers):,} flagged and not counted."
    if len(outliers) > _SHOWN_OUTLIERS:
        sentence += f" The first {_SHOWN_OUTLIERS} are listed; --json names all."
    columns = (Column("Image", "code"), Column("What"), Column("Why"))
    return Section("Flagged images", (sentence,), table=Table("Flagged images", columns, rows))


def _row(outcome: str, entry: object) -> tuple[Cell, ...]:
    if not isinstance(entry, Mapping):  # the facts may come from a file that somebody has edited
        return Cell(str(entry), str(entry)), Cell(outcome, outcome), Cell("")
    name = str(entry.get("name", ""))
    reasons = [str(entry["reason"])] if entry.get("reason") else []
    # Other entries of a sample, such as an outlier's leverage, stand behind the reason.
    reasons += [f"{key} {_short(value)}" for key, value in entry.items() if key not in ("name", "reason")]
    why = ", ".join(reasons)
    return Cell(name, name), Cell(outcome, outcome), Cell(why, why)


def _short(value: object) -> str:
    number = finite_number(value)
    return str(value) if number is None else f"{number:.4g}"
