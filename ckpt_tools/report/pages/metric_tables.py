"""Metrics of a run with labelled data as a section: before, after, the change, and what the gate said to them."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_tools.report.columns import list_names
from ckpt_tools.report.facts import Facts, get_mapping
from ckpt_tools.report.metric_facts import metric_unit, metrics_by_name
from ckpt_tools.report.number_format import (
    finite_number,
    integer_text,
    number_cell,
    value_and_error,
    value_with_error_text,
)
from ckpt_tools.report.page_content import Cell, Column, Section, Table, Tone


def metrics_section(facts: Facts) -> Section | None:
    """The metrics in a table, below the verdict of the gate if there was one; None without any metric."""
    found = metrics_by_name(facts)
    if not found:
        return None
    compared = bool(get_mapping(get_mapping(facts, "metrics"), "before"))
    heads = ("Before", "After", "Change") if compared else ("Value",)
    columns = (Column("Metric"), *(Column(head, "number") for head in heads), Column("Unit"))
    rows = tuple(
        (Cell(name, name), *_values(entries, compared=compared), Cell(metric_unit(facts, name)))
        for name, entries in found.items()
    )
    verdict, tone = _gate(facts)
    errors = any(value_and_error(entry)[1] is not None for row in found.values() for entry in row)
    said = (*verdict, *(_errors(compared=compared) if errors else ()), *_halves(facts))
    title = "Before and after" if compared else "Metrics"
    return Section(title, said, tone, pairs=tuple(_pairs(facts)), table=Table(title, columns, rows))


def _errors(*, compared: bool) -> tuple[str]:
    return (
        "After ± stands the standard error" + ("; that of the change is paired, image by image." if compared else "."),
    )


def _halves(facts: Facts) -> tuple[str, ...]:
    """Which temperature stands behind the calibrated metrics."""
    halves = get_mapping(get_mapping(get_mapping(facts, "metrics"), "after"), "calibration").get(
        "temperatures_of_halves"
    )
    if not isinstance(halves, (list, tuple)) or len(halves) != 2:
        return ()
    first, second = map(value_with_error_text, halves)
    return (f"The temperature is that of all images; below it either half has the other's ({first}, {second}).",)


def _values(entries: tuple[object, object, object], *, compared: bool) -> tuple[Cell, ...]:
    before, after, change = entries
    if not compared:
        return (_metric(after),)
    return _metric(before), _metric(after), _metric(change, signed=True)


def _metric(entry: object, *, signed: bool = False) -> Cell:
    return number_cell(value_and_error(entry)[0], value_with_error_text(entry, signed=signed))


def _gate(facts: Facts) -> tuple[tuple[str, ...], Tone]:
    """The verdict as a sentence and a colour; nothing where no gate was asked for."""
    gate = get_mapping(get_mapping(facts, "metrics"), "gate")
    if not gate:
        return (), ""
    if gate.get("passed"):
        return (f"The gate is passed: {gate.get('expression')}",), "good"
    failures = gate.get("failures")
    why = list_names(map(str, failures)) if isinstance(failures, (list, tuple)) else ""
    return (f"The gate is not passed: {gate.get('expression')} ({why})",), "bad"


def _pairs(facts: Facts) -> Iterator[tuple[str, str]]:
    found = get_mapping(facts, "metrics")
    if data := found.get("data"):
        yield "Labelled data", f"{data} ({found.get('kind')})"
    for name in ("images", "classes"):
        if finite_number(found.get(name)) is not None:
            yield name.capitalize(), integer_text(found.get(name))
