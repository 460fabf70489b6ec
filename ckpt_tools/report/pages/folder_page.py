"""The page of a folder, from the records of its manifest: a row and a page for each checkpoint."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ckpt_tools.redaction import presentable
from ckpt_tools.report.columns import count_text
from ckpt_tools.report.facts import (
    get_list,
    get_mapping,
    get_mappings,
    median_ratios,
    most_changed_layer,
    other_names_sentence,
)
from ckpt_tools.report.metric_facts import metric_unit, metrics_by_name
from ckpt_tools.report.number_format import (
    UNKNOWN,
    finite_number,
    number_cell,
    ratio_text,
    seconds_text,
    value_and_error,
    value_with_error_text,
)
from ckpt_tools.report.page_content import Cell, Column, FolderPage, KeyFigure, Page, Section, Table, Tone
from ckpt_tools.report.pages.checkpoint_page import (
    VERDICT_TONES,
    checkpoint_page,
    control_verdict,
    worst_verdict,
)
from ckpt_tools.report.pages.metric_tables import metrics_section

Record = Mapping[str, Any]

_TONES: Mapping[str, Tone] = {"done": "good", "failed": "bad"}
_LONGEST_MESSAGE = 120  # characters in the table; the whole message stands in the page below


def folder_page(records: Sequence[Record], title: str = "") -> FolderPage:
    """Return the page of many checkpoints.

    ``title`` is by default the name of the innermost folder that holds all of them.
    """
    records = presentable(list(records))
    folder = _common_folder(records)
    rows = [
        (f"checkpoint-{place}", _name_within(folder, record), record)
        for place, record in enumerate(records, 1)
    ]
    counts = Counter(str(record.get("status")) for record in records)
    headline = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    return FolderPage(
        title=title or PurePath(folder).name or "Checkpoints",
        subtitle=count_text(len(records), "checkpoint"),
        headline=f"{headline or 'No checkpoint'}.",
        figures=tuple(_figures(records, counts)),
        failures=tuple(
            (anchor, name, _error_line(record))
            for anchor, name, record in rows
            if record.get("status") == "failed"
        ),
        table=_table(rows),
        pages=tuple((anchor, _page(record, name)) for anchor, name, record in rows),
    )


def _common_folder(records: Sequence[Record]) -> str:
    folders = [str(PurePath(str(record.get("checkpoint", ""))).parent) for record in records]
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative paths have no folder in common
        return ""


def _name_within(folder: str, record: Record) -> str:
    path = PurePath(str(record.get("checkpoint", "")))
    return str(path.relative_to(folder) if folder and path.is_relative_to(folder) else path)


def _figures(records: Sequence[Record], counts: Counter[str]) -> Iterator[KeyFigure]:
    """Yield the numbers at the top. ``counts`` has how many checkpoints came to each status."""
    done_before = counts["done before"]
    note = f", {done_before:,} of them before" if done_before else ""
    yield KeyFigure("Done", f"{counts['done'] + done_before:,}", f"of {len(records):,}{note}")
    yield KeyFigure("Failed", f"{counts['failed']:,}", tone="bad" if counts["failed"] else "")
    ratios_by_report = (median_ratios(get_mapping(record, "report")) for record in records)
    medians = [statistics.median(ratios.values()) for ratios in ratios_by_report if ratios]
    if medians:
        span = f"median checkpoint; {ratio_text(min(medians))} to {ratio_text(max(medians))} over all"
        yield KeyFigure("Stored ÷ new variance", ratio_text(statistics.median(medians)), span)
    seconds = sum(finite_number(record.get("seconds")) or 0 for record in records)
    yield KeyFigure("Time", seconds_text(seconds), "over all checkpoints")


def _table(named_records: Sequence[tuple[str, str, Record]]) -> Table:
    """Return the table of the checkpoints, each with its anchor, its name and its record."""
    units = _metric_units([record for _, _, record in named_records])
    columns = (
        Column("Checkpoint", "code"), Column("Outcome"), Column("Rewritten", "number"),
        Column("Median ratio", "number"),
        Column("Largest change", "number"), Column("Images", "number"),
        Column("Estimator"), Column("Data"), Column("Controls"),
        *(
            Column(f"{name} {stage}{unit}", "number")
            for name, unit in units.items() for stage in ("before", "after")
        ),
        Column("Time", "number"), Column("Message", "prose"),
    )  # fmt: skip
    rows = tuple(_row(anchor, name, record, tuple(units)) for anchor, name, record in named_records)
    return Table("Checkpoints", columns, rows)


def _metric_units(records: Sequence[Record]) -> dict[str, str]:
    """Return the metrics that any checkpoint has, with their units as column heads show them.

    A unit is `` (percent)``, or "" where none is recorded.
    """
    # A checkpoint that failed early has no metrics, so the first record may lack them.
    units: dict[str, str] = {}
    for facts in map(_facts_with_metrics, records):
        for name in metrics_by_name(facts):
            unit = metric_unit(facts, name).partition(",")[0]  # without "15 bins, l1"
            units[name] = units.get(name) or (f" ({unit})" if unit else "")
    return units


def _facts_with_metrics(record: Record) -> Record:
    """Return the part of a record that holds the metrics.

    That is the report; where a gate was not passed there is none, and the metrics stand in the
    record itself.
    """
    return get_mapping(record, "report") or record


def _row(anchor: str, name: str, record: Record, metrics: Sequence[str]) -> tuple[Cell, ...]:
    status, report = str(record.get("status", "")), get_mapping(record, "report")
    ratios, layers = median_ratios(report), get_mappings(report, "layers")
    median = statistics.median(ratios.values()) if ratios else None
    # A name may be "", that of a model that is a BN layer itself; without layers it is None.
    largest_change = ratios.get(most_changed_layer(ratios) or "")
    rewritten = sum(bool(layer.get("rewritten")) for layer in layers) if layers else None
    verdict = control_verdict(report) if report else UNKNOWN
    data, estimator = worst_verdict(report) if report else UNKNOWN, str(report.get("estimator") or UNKNOWN)
    scores = metrics_by_name(_facts_with_metrics(record))
    warnings = [f"Warning: {text}." for text in get_list(report, "warnings")]
    message = " ".join(filter(None, (other_names_sentence(record), _error_line(record), *warnings)))
    shown_message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…"
    return (
        Cell(name, name, link=anchor),
        Cell(status, status, _TONES.get(status, "quiet")),
        number_cell(rewritten, UNKNOWN if rewritten is None else f"{rewritten:,} of {len(layers):,}"),
        number_cell(median, ratio_text(median)),
        number_cell(largest_change, ratio_text(largest_change)),
        number_cell(get_mapping(report, "data").get("images")),
        Cell(estimator, estimator if report else None),
        Cell(data, data if report else None, VERDICT_TONES.get(data, "quiet")),
        Cell(verdict, verdict if report else None, VERDICT_TONES.get(verdict, "quiet")),
        *(
            number_cell(value_and_error(entry)[0], value_with_error_text(entry))
            for name in metrics
            for entry in scores.get(name, (None, None, None))[:2]
        ),
        number_cell(record.get("seconds"), seconds_text(record.get("seconds"))),
        Cell(shown_message, message or None),
    )


def _error_line(record: Record) -> str:
    return " ".join(str(record.get("error") or "").split())


def _page(record: Record, name: str) -> Page:
    """Return the page of one record: that of its report, or where there is none, of its error."""
    status, report = str(record.get("status", "")), get_mapping(record, "report")
    subtitle = ". ".join(filter(None, (status, other_names_sentence(record))))
    if report:
        page = checkpoint_page(report)
        # The page of a folder names a checkpoint by its path, since many files have the same name.
        return Page(name, subtitle, page.headline, page.tone, page.figures, page.sections)
    error = str(record.get("error") or "")
    headline = f"Its output is {record['output']}." if record.get("output") else "No output was written."
    if status == "skipped" and not error:
        headline = f"Nothing was run. {headline}"
    sections = (Section("Error message", code=error) if error else None, metrics_section(record))
    return Page(
        name, subtitle, headline, sections=tuple(section for section in sections if section is not None)
    )
