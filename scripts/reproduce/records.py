"""Keep finished cells, one JSON line each, so that an interrupted experiment can be resumed."""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_tools import __version__
from ckpt_tools.errors import DataError


@dataclass(frozen=True)
class Record:
    """A finished cell. ``cell`` is the experiment's own dataclass, ``found`` what it measured, JSON
    values only.

    ``seconds`` and ``device`` are those of the run that finished it; what an interrupted one took
    before is not in.
    """

    cell: Any
    data: str  # the data set's name: "digits", "mnist", …; "" where there is none
    quick: bool
    found: dict[str, Any]
    seconds: float
    device: str
    versions: dict[str, str]


def read(file: Path, cell: type) -> list[Record]:
    """Return all finished cells in a file, each once; without a file there are none.

    A last line that was cut off is left out. Raises DataError for other damage, and for cells of
    another version of the experiment.
    """
    content = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = content.split("\n")[:-1]  # a whole line ends in a newline
    try:
        finished = [_record(json.loads(line), cell) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file}: expected records of this experiment, found a line that is not ({error}). "
            "Move the file away, or choose another folder with --out."
        ) from error
    return list({(record.cell, record.data, record.quick): record for record in finished}.values())


def _record(line: dict[str, Any], cell: type) -> Record:
    return Record(**{**line, "cell": cell(**line["cell"])})


def append(file: Path, record: Record) -> None:
    """Add a line, in place of what a cut-off last line left; other processes may add lines, too."""
    line = json.dumps(asdict(record), ensure_ascii=False)
    with file.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(_whole(file))
        stream.write(line.encode() + b"\n")


def _whole(file: Path) -> int:
    """Bytes up to the last newline."""
    return file.read_bytes().rfind(b"\n") + 1


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"ckpt-tools": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: str) -> str:
    """ "NVIDIA H100", "CPU, 1 thread"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def select(records: Iterable[Record], **fields: object) -> list[Record]:
    """The records whose cells have these values, in the order of their seeds."""
    chosen = [
        record
        for record in records
        if all(getattr(record.cell, name) == value for name, value in fields.items())
    ]
    return sorted(chosen, key=lambda record: record.cell.seed)


def values(records: Iterable[Record], name: str) -> list[Any]:
    """One number of every record."""
    return [record.found[name] for record in records]


def distinct(records: Iterable[Record], of: Callable[[Record], Any]) -> list[Any]:
    """What occurs, in order of first occurrence."""
    return list(dict.fromkeys(map(of, records)))


def pair_by_seed(first: Sequence[Record], second: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Pairs of the same seed."""
    partners = {record.cell.seed: record for record in second}
    return ((record, partners[record.cell.seed]) for record in first if record.cell.seed in partners)
