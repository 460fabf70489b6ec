"""Metrics of a run with labelled data as a section: before, after, the change, and what the gate said to them."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_tools.report.columns import listed
from ckpt_tools.report.content import Cell, Column, Section, Table, Tone
from ckpt_tools.report.facts import Facts, part
from ckpt_tools.report.metric_facts import metrics, unit_of
from ckpt_tools.report.number_format import measured, measured_text, number, number_cell, whole_text


def metrics_section(facts: Facts) -> Section | None:
    """The metrics in a table, below the verdict of the gate if there was one; None without any metric."""
    found = metrics(facts)
    if not found:
        return None
    compared = bool(part(part(facts, "metrics"), "before"))
    heads = ("Before", "After", "Change") if compared else ("Value",)
    columns = (Column("Metric"), *(Column(head, "number") for head in heads), Column("Unit"))
    rows = tuple(
        (Cell(name, name), *_values(entries, compared=compared), Cell(unit_of(facts, name)))
        for name, entries in found.items()
    )
    verdict, tone = _gate(facts)
    errors = any(measured(entry)[1] is not None for row in found.values() for entry in row)
    said = (*verdict, *(_errors(compared=compared) if errors else ()), *_halves(facts))
    title = "Before and after" if compared else "Metrics"
    return Section(title, said, tone, pairs=tuple(_pairs(facts)), table=Table(title, columns, rows))


def _errors(*, compared: bool) -> tuple[str]:
    return (
        "After ± stands the standard error" + ("; that of the change is paired, image by image." if compared else "."),
    )


def _halves(facts: Facts) -> tuple[str, ...]:
    """Which temperature stands behind the calibrated metrics."""
    halves = part(part(part(facts, "metrics"), "after"), "calibration").get("temperatures_of_halves")
    if not isinstance(halves, (list, tuple)) or len(halves) != 2:
        return ()
    first, second = map(measured_text, halves)
    return (f"The temperature is that of all images; below it either half has the other's ({first}, {second}).",)


def _values(entries: tuple[object, object, object], *, compared: bool) -> tuple[Cell, ...]:
    before, after, change = entries
    if not compared:
        return (_metric(after),)
    return _metric(before), _metric(after), _metric(change, signed=True)


def _metric(entry: object, *, signed: bool = False) -> Cell:
    return number_cell(measured(entry)[0], measured_text(entry, signed=signed))


def _gate(facts: Facts) -> tuple[tuple[str, ...], Tone]:
    """The verdict as a sentence and a colour; nothing where no gate was asked for."""
    gate = part(part(facts, "metrics"), "gate")
    if not gate:
        return (), ""
    if gate.get("passed"):
        return (f"The gate is passed: {gate.get('expression')}",), "good"
    failures = gate.get("failures")
    why = listed(map(str, failures)) if isinstance(failures, (list, tuple)) else ""
    return (f"The gate is not passed: {gate.get('expression')} ({why})",), "bad"


def _pairs(facts: Facts) -> Iterator[tuple[str, str]]:
    found = part(facts, "metrics")
    if data := found.get("data"):
        yield "Labelled data", f"{data} ({found.get('kind')})"
    for name in ("images", "classes"):
        if number(found.get(name)) is not None:
            yield name.capitalize(), whole_text(found.get(name))
