"""The metrics of a run with labelled data as a section, with the verdict of the gate."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_tools.report.columns import list_names
from ckpt_tools.report.facts import Facts, get_list, get_mapping
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
    """Return a table of the metrics below the verdict of the gate, None if nothing was evaluated.

    ``before`` and ``change`` are columns only where two checkpoints were evaluated.
    """
    metrics = metrics_by_name(facts)
    if not metrics:
        return None
    compared = bool(get_mapping(get_mapping(facts, "metrics"), "before"))
    heads = ("Before", "After", "Change") if compared else ("Value",)
    columns = (Column("Metric"), *(Column(head, "number") for head in heads), Column("Unit"))
    rows = tuple(
        (Cell(name, name), *_values(entries, compared=compared), Cell(metric_unit(facts, name)))
        for name, entries in metrics.items()
    )
    verdict, tone = _gate(facts)
    sentences = [*verdict]
    if any(value_and_error(entry)[1] is not None for entries in metrics.values() for entry in entries):
        paired = "; that of the change is paired, image by image." if compared else "."
        sentences.append(f"After ± stands the standard error{paired}")
    calibration = get_mapping(get_mapping(get_mapping(facts, "metrics"), "after"), "calibration")
    halves = get_list(calibration, "temperatures_of_halves")
    if len(halves) == 2:
        # A temperature flatters the images that it was fitted on.
        first, second = map(value_with_error_text, halves)
        sentences += [
            "The temperature in the table is that of all images.",
            f"For the metrics below it, each half has the other's ({first}, {second}).",
        ]
    title = "Before and after" if compared else "Metrics"
    return Section(
        title, tuple(sentences), tone, pairs=tuple(_pairs(facts)), table=Table(title, columns, rows)
    )


def _values(entries: tuple[object, object, object], *, compared: bool) -> tuple[Cell, ...]:
    before, after, change = entries
    if not compared:
        return (_metric(after),)
    return _metric(before), _metric(after), _metric(change, signed=True)


def _metric(entry: object, *, signed: bool = False) -> Cell:
    return number_cell(value_and_error(entry)[0], value_with_error_text(entry, signed=signed))


def _gate(facts: Facts) -> tuple[tuple[str, ...], Tone]:
    """Return the verdict of the gate as a sentence and its colour.

    There is no sentence where no gate was set.
    """
    gate = get_mapping(get_mapping(facts, "metrics"), "gate")
    if not gate:
        return (), ""
    if gate.get("passed"):
        return (f"The gate is passed: {gate.get('expression')}",), "good"
    why = list_names(map(str, get_list(gate, "failures")))
    return (f"The gate is not passed: {gate.get('expression')} ({why})",), "bad"


def _pairs(facts: Facts) -> Iterator[tuple[str, str]]:
    metrics = get_mapping(facts, "metrics")
    if metrics.get("data"):
        yield "Labelled data", f"{metrics['data']} ({metrics.get('kind')})"
    for name in ("images", "classes"):
        if finite_number(metrics.get(name)) is not None:
            yield name.capitalize(), integer_text(metrics.get(name))
