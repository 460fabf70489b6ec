"""The page of a folder: a row for every checkpoint, from the records of its manifest alone."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ckpt_tools.redaction import presentable
from ckpt_tools.report.columns import count
from ckpt_tools.report.content import Cell, Column, Figure, FolderPage, Page, Section, Table, Tone
from ckpt_tools.report.facts import also_named, furthest, medians, part, parts
from ckpt_tools.report.metric_facts import metrics, unit_of
from ckpt_tools.report.number_format import UNKNOWN, measured, measured_text, number_cell, ratio_text, seconds_text
from ckpt_tools.report.pages.checkpoint_page import VERDICTS, checkpoint_page, control_verdict
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
        subtitle=count(len(records), "checkpoint"),
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


def _figures(records: Sequence[Record]) -> list[Figure]:
    reports = [part(record, "report") for record in records]
    ratios = [statistics.median(found.values()) for found in map(medians, reports) if found]
    seconds = [cell.order for cell in (number_cell(record.get("seconds")) for record in records) if cell.order]
    tally = Counter(str(record.get("status")) for record in records)
    before = f", {tally['done before']:,} of them before" if tally["done before"] else ""
    found = [Figure("Done", f"{tally['done'] + tally['done before']:,}", f"of {len(records):,}{before}")]
    found.append(Figure("Failed", f"{tally['failed']:,}", tone="bad" if tally["failed"] else ""))
    if ratios:
        span = f"median checkpoint; {ratio_text(min(ratios))} to {ratio_text(max(ratios))} over all"
        found.append(Figure("Stored ÷ new variance", ratio_text(statistics.median(ratios)), span))
    found.append(Figure("Time", seconds_text(sum(map(float, seconds))), "over all checkpoints"))
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
    for facts in map(_judged, records):
        for name in metrics(facts):
            unit = unit_of(facts, name).partition(",")[0]
            found[name] = found.get(name) or (f" ({unit})" if unit else "")
    return found


def _judged(record: Record) -> Record:
    """Where the metrics of a checkpoint stand: in its report, or if its gate said no, beside the message."""
    return part(record, "report") or record


def _row(record: Record, name: str, anchor: str, measures: Sequence[str]) -> tuple[Cell, ...]:
    status, report = str(record.get("status", "")), part(record, "report")
    ratios, layers = medians(report), parts(report, "layers")
    median, most = (statistics.median(ratios.values()), ratios[furthest(ratios) or ""]) if ratios else (None, None)
    rewritten = sum(bool(layer.get("rewritten")) for layer in layers) if layers else None
    verdict = control_verdict(report) if report else UNKNOWN
    scores = metrics(_judged(record))
    message = " ".join(filter(None, (also_named(record), _line(record))))
    return (
        Cell(name, name, link=anchor),
        Cell(status, status, _TONES.get(status, "quiet")),
        number_cell(rewritten, UNKNOWN if rewritten is None else f"{rewritten:,} of {len(layers):,}"),
        number_cell(median, ratio_text(median)),
        number_cell(most, ratio_text(most)),
        number_cell(part(report, "data").get("images")),
        Cell(verdict, verdict if report else None, VERDICTS.get(verdict, "quiet")),
        *(
            number_cell(measured(entry)[0], measured_text(entry))
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
    status, report = str(record.get("status", "")), part(record, "report")
    subtitle = ". ".join(filter(None, (status, also_named(record))))
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
        sections=tuple(section for section in (_said(said), metrics_section(record)) if section is not None),
    )


def _said(error: str) -> Section | None:
    return Section("What was said", code=error) if error else None
