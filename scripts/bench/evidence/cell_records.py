"""Finished cells of the comparison, one JSON line each, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.evidence.net_training import DataName, Moment, Training

Way = tuple[str, str]  # a correction and its inputs


@dataclass(frozen=True)
class Cell:
    """One trained net: half-way through a training, or at its end."""

    data: DataName
    net: str
    augmentation: str
    moment: Moment
    seed: int

    @classmethod
    def at(cls, training: Training, moment: Moment) -> Cell:
        return cls(training.data, training.net, training.augmentation, moment, training.seed)


@dataclass(frozen=True)
class Measurement:
    """The test scores of a corrected net.

    Attributes:
        error: in percent.
        nll: in nats.
        estimator: the one that was used, which `auto` has chosen; None where nothing was corrected.
        distance: of the inputs from the stored statistics, by which `auto` chooses.
    """

    error: float
    nll: float
    estimator: str | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Record:
    """All that has been measured in a cell."""

    cell: Cell
    measurements: dict[Way, Measurement] = field(default_factory=dict)

    def merge(self, other: Record) -> Record:
        """The measurements of both; of those that both have, the other's."""
        return Record(self.cell, self.measurements | other.measurements)


def read_records(file: Path) -> dict[Cell, Record]:
    """All records of a file; without a file there are none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [_parse(json.loads(line)) for line in lines]
    return {record.cell: record for record in records}


def _parse(line: dict[str, Any]) -> Record:
    cell = Cell(**{each.name: line[each.name] for each in fields(Cell)})
    measurements = {
        (correction, inputs): Measurement(*values)
        for correction, by_inputs in line["measurements"].items()
        for inputs, values in by_inputs.items()
    }
    return Record(cell, measurements)


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Replace the file, one line for each cell. An interruption leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(map(_format, records)), encoding="utf-8")
    temporary.replace(file)


def _format(record: Record) -> str:
    by_correction: dict[str, dict[str, list[object]]] = {}
    for (correction, inputs), measured in record.measurements.items():
        distance = None if measured.distance is None else round(measured.distance, 4)
        values = [round(measured.error, 3), round(measured.nll, 5), measured.estimator, distance]
        by_correction.setdefault(correction, {})[inputs] = values
    line = {**asdict(record.cell), "measurements": by_correction}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
