"""RESULTS.md: a section an experiment, with verdicts by rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

from reproduce import EXPERIMENTS, find
from reproduce.estimates import Difference
from reproduce.experiment import Experiment, picture_name
from reproduce.records import Record, distinct

SIGNIFICANT = 0.05


class Verdict(StrEnum):
    """What became of a claim of the paper."""

    REPRODUCED = "reproduced"
    DIRECTION = "same direction"
    NOT = "**not reproduced**"

    @classmethod
    def not_run(cls, why: str) -> str:
        """For a row that waits for data or a device."""
        return f"not run here: {why}"


def of_number(value: float, printed: str, *, near: float = 0.05) -> Verdict:
    """Judge a number: reproduced if it rounds to what is printed in the paper.

    It has the same direction if it is off by no more than the share `near`.
    """
    digits = len(printed.partition(".")[2])
    if f"{value:.{digits}f}" == f"{float(printed):.{digits}f}":
        return Verdict.REPRODUCED
    return Verdict.DIRECTION if abs(value - float(printed)) <= near * abs(float(printed)) else Verdict.NOT


def of_differences(differences: Iterable[Difference], *, falls: bool = True) -> Verdict:
    """Judge differences: reproduced if all have the paper's sign with p < 0.05.

    They have the same direction if all have the sign.
    """
    all_differences = list(differences)
    if not all_differences or not all(
        math.isfinite(difference.value) and (difference.value < 0) == falls and difference.value
        for difference in all_differences
    ):
        return Verdict.NOT
    return (
        Verdict.REPRODUCED
        if all(difference.p < SIGNIFICANT for difference in all_differences)
        else Verdict.DIRECTION
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def provenance(records: Sequence[Record]) -> str:
    """On what, with what, how often and how long, in a sentence."""
    data = " and ".join(distinct(records, lambda record: record.data))
    seeds = len({record.cell.seed for record in records})
    devices = ", ".join(distinct(records, lambda record: record.device))
    versions = "; ".join(
        distinct(records, lambda record: ", ".join(f"{k} {v}" for k, v in record.versions.items()))
    )
    seconds = sum(record.seconds for record in records)
    quick = "A quick run, which proves nothing: " if any(record.quick for record in records) else ""
    on = f"on {data}, " if data else ""
    return (
        f"{quick}{len(records):,} cells {on}{seeds} seed{'s' if seeds > 1 else ''}, "
        f"{_time(seconds)} on {devices}; {versions}."
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def section(experiment: Experiment, out: Path) -> str:
    """Render an experiment's part of the page.

    It has a heading, and for every data set what was run, pictures and tables.
    """
    all_records = experiment.read(out)
    parts = [f"## {experiment.title}", experiment.paper]
    for data, quick in distinct(all_records, lambda record: (record.data, record.quick)):
        of_data_set = [record for record in all_records if (record.data, record.quick) == (data, quick)]
        parts += [f"### On {data}"] if data else []
        parts += [provenance(of_data_set)]
        parts += [f"![{stem}](results/{picture_name(stem, data)}.png)" for stem in experiment.pictures]
        parts += [experiment.section(of_data_set)]
    return "\n\n".join([*parts, *_missing(experiment, {record.data for record in all_records})])


def _missing(experiment: Experiment, finished: set[str]) -> list[str]:
    """What was not run, and how to."""
    command = f"scripts/run reproduce {experiment.name}"
    missing = [f"{command} --data {name}:DIR" for name in experiment.data if name not in finished]
    if missing:
        commands = ", ".join(f"`{command_line}`" for command_line in missing)
        return [f"Full protocol, {Verdict.not_run('the data set is not on this machine')}. {commands}."]
    return [] if finished else [f"Not run yet: `{command}`."]


_HEAD = """# The paper's tables and figures, run again

Hendrycks & Gimpel 2016. `scripts/run reproduce NAME` runs an experiment, \
draws its pictures and writes this page;
`scripts/run reproduce results` only writes it. Nothing here is typed by hand: \
numbers are mean ± standard error over
seeds, verdicts follow from them by these rules.

- **reproduced**: a number rounds to the printed one; \
a difference has the paper's sign with p < 0.05 (paired t test
  over seeds), against every contestant.
- **same direction**: a number within 5 % of the printed one; \
a difference of the paper's sign that is not significant.
- **not reproduced**: anything else.
- **not run here**: with the reason, and the command that would run it."""


def write_page(out: Path) -> Path:
    """Write RESULTS.md from all records in a folder."""
    page = out / "RESULTS.md"
    page.write_text(
        "\n\n".join([_HEAD, *(section(find(name), out) for name in EXPERIMENTS)]) + "\n", encoding="utf-8"
    )
    return page
