"""Finished cells of the comparison, one JSON line each, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.evidence.net_training import DataName, Moment, Training

Scores = dict[str, tuple[float, float]]  # for each kind of inputs: test error in percent, NLL in nats


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
class Record:
    """What is known of a cell: scores for each correction, and the estimators that `auto` chose."""

    cell: Cell
    scores: dict[str, Scores] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Record) -> Record:
        """The corrections of both; of those that both have, the other's."""
        return Record(self.cell, self.scores | other.scores, self.chosen | other.chosen)


def read_records(file: Path) -> dict[Cell, Record]:
    """All records of a file; without a file there are none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [_parse(json.loads(line)) for line in lines]
    return {record.cell: record for record in records}


def _parse(line: dict[str, Any]) -> Record:
    cell = Cell(**{each.name: line[each.name] for each in fields(Cell)})
    scores = {
        correction: {name: (error, nll) for name, (error, nll) in values.items()}
        for correction, values in line["scores"].items()
    }
    return Record(cell, scores, line["chosen"])


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Replace the file, one line for each cell. An interruption leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(map(_format, records)), encoding="utf-8")
    temporary.replace(file)


def _format(record: Record) -> str:
    line = {**asdict(record.cell), "scores": record.scores, "chosen": record.chosen}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
