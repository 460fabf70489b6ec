"""The page of a folder: a row for every checkpoint, from the records of its manifest alone."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ckpt_tools.redaction import presentable
from ckpt_tools.report.columns import count_text
from ckpt_tools.report.facts import get_mapping, get_mappings, median_ratios, most_changed_layer, other_names_sentence
from ckpt_tools.report.metric_facts import metric_unit, metrics_by_name
from ckpt_tools.report.number_format import (
    UNKNOWN,
    number_cell,
    ratio_text,
    seconds_text,
    value_and_error,
    value_with_error_text,
)
from ckpt_tools.report.page_content import Cell, Column, FolderPage, KeyFigure, Page, Section, Table, Tone
from ckpt_tools.report.pages.checkpoint_page import VERDICT_TONES, checkpoint_page, control_verdict
from ckpt_tools.report.pages.metric_tables import metrics_section

Record = Mapping[str, Any]

_TONES: Mapping[str, Tone] = {"done": "good", "failed": "bad"}
_MOST = 120  # characters of an error in the table


def folder_page(records: Sequence[Record], title: str = "") -> FolderPage:
    """The table, and a page for every checkpoint; ``title`` is the name of the folder where the paths do not tell."""
    records = presentable(list(records))
    names = _names(records)
    anchors = [f"checkpoint-{place}" for place in range(1, len(records) + 1)]
    tally = Counter(str(record.get("status")) for record in records)
    rows = list(zip(anchors, names, records, strict=True))
    return FolderPage(
        title=title or _folder(records) or "Checkpoints",
        subtitle=count_text(len(records), "checkpoint"),
        headline=(", ".join(f"{number:,} {status}" for status, number in tally.most_common()) or "No checkpoint") + ".",
        figures=tuple(_figures(records)),
        failures=tuple((place, name, _line(row)) for place, name, row in rows if row.get("status") == "failed"),
        table=_table(records, names, anchors),
        pages=tuple((anchor, _page(record, name)) for anchor, name, record in rows),
    )


def _folder(records: Sequence[Record]) -> str:
    return PurePath(_common(records)).name


def _common(records: Sequence[Record]) -> str:
    """The folder that holds all checkpoints, "" if there is none."""
    paths = [str(PurePath(str(record.get("checkpoint", ""))).parent) for record in records]
    try:
        return os.path.commonpath(paths) if paths else ""
    except ValueError:  # absolute and relative ones
        return ""


def _names(records: Sequence[Record]) -> list[str]:
    """Paths without the folder that all have in common."""
    common = _common(records)
    paths = [PurePath(str(record.get("checkpoint", ""))) for record in records]
    return [str(path.relative_to(common) if common and path.is_relative_to(common) else path) for path in paths]


def _figures(records: Sequence[Record]) -> list[KeyFigure]:
    reports = [get_mapping(record, "report") for record in records]
    ratios = [statistics.median(found.values()) for found in map(median_ratios, reports) if found]
    seconds = [cell.order for cell in (number_cell(record.get("seconds")) for record in records) if cell.order]
    tally = Counter(str(record.get("status")) for record in records)
    before = f", {tally['done before']:,} of them before" if tally["done before"] else ""
    found = [KeyFigure("Done", f"{tally['done'] + tally['done before']:,}", f"of {len(records):,}{before}")]
    found.append(KeyFigure("Failed", f"{tally['failed']:,}", tone="bad" if tally["failed"] else ""))
    if ratios:
        span = f"median checkpoint; {ratio_text(min(ratios))} to {ratio_text(max(ratios))} over all"
        found.append(KeyFigure("Stored ÷ new variance", ratio_text(statistics.median(ratios)), span))
    found.append(KeyFigure("Time", seconds_text(sum(map(float, seconds))), "over all checkpoints"))
    return found


def _table(records: Sequence[Record], names: Sequence[str], anchors: Sequence[str]) -> Table:
    measures = _measures(records)
    columns = (
        Column("Checkpoint", "code"), Column("Outcome"), Column("Rewritten", "number"),
        Column("Median ratio", "number"),
        Column("Largest change", "number"), Column("Images", "number"), Column("Controls"),
        *(Column(f"{name} {when}{unit}", "number") for name, unit in measures.items() for when in ("before", "after")),
        Column("Time", "number"), Column("Message", "prose"),
    )  # fmt: skip
    rows = tuple(_row(*said, tuple(measures)) for said in zip(records, names, anchors, strict=True))
    return Table("Checkpoints", columns, rows)


def _measures(records: Sequence[Record]) -> dict[str, str]:
    """The metrics that any checkpoint has, with their units: `` (percent)``."""
    found: dict[str, str] = {}
    for facts in map(_facts_with_metrics, records):
        for name in metrics_by_name(facts):
            unit = metric_unit(facts, name).partition(",")[0]
            found[name] = found.get(name) or (f" ({unit})" if unit else "")
    return found


def _facts_with_metrics(record: Record) -> Record:
    """Where the metrics of a checkpoint stand: in its report, or if its gate said no, beside the message."""
    return get_mapping(record, "report") or record


def _row(record: Record, name: str, anchor: str, measures: Sequence[str]) -> tuple[Cell, ...]:
    status, report = str(record.get("status", "")), get_mapping(record, "report")
    ratios, layers = median_ratios(report), get_mappings(report, "layers")
    median, most = (
        (statistics.median(ratios.values()), ratios[most_changed_layer(ratios) or ""]) if ratios else (None, None)
    )
    rewritten = sum(bool(layer.get("rewritten")) for layer in layers) if layers else None
    verdict = control_verdict(report) if report else UNKNOWN
    scores = metrics_by_name(_facts_with_metrics(record))
    message = " ".join(filter(None, (other_names_sentence(record), _line(record))))
    return (
        Cell(name, name, link=anchor),
        Cell(status, status, _TONES.get(status, "quiet")),
        number_cell(rewritten, UNKNOWN if rewritten is None else f"{rewritten:,} of {len(layers):,}"),
        number_cell(median, ratio_text(median)),
        number_cell(most, ratio_text(most)),
        number_cell(get_mapping(report, "data").get("images")),
        Cell(verdict, verdict if report else None, VERDICT_TONES.get(verdict, "quiet")),
        *(
            number_cell(value_and_error(entry)[0], value_with_error_text(entry))
            for name in measures
            for entry in scores.get(name, (None, None, None))[:2]
        ),
        number_cell(record.get("seconds"), seconds_text(record.get("seconds"))),
        Cell(message if len(message) <= _MOST else message[:_MOST] + "…", message or None),
    )


def _line(record: Record) -> str:
    """What went wrong, on one line."""
    return " ".join(str(record.get("error") or "").split())


def _page(record: Record, name: str) -> Page:
    """The page of one record: that of its report, or of what went wrong."""
    status, report = str(record.get("status", "")), get_mapping(record, "report")
    subtitle = ". ".join(filter(None, (status, other_names_sentence(record))))
    if report:
        page = checkpoint_page(report)
        return Page(name, subtitle, page.headline, page.tone, page.figures, page.sections)
    said = str(record.get("error") or "")
    output = f"Its output is {record['output']}." if record.get("output") else "No output was written."
    headline = output if said or status != "skipped" else f"Nothing was run. {output}"
    return Page(
        title=name,
        subtitle=subtitle,
        headline=headline,
        sections=tuple(section for section in (_error_section(said), metrics_section(record)) if section is not None),
    )


def _error_section(error: str) -> Section | None:
    return Section("What was said", code=error) if error else None
