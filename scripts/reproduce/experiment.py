"""An experiment: cells to run, how to run one, and what their records show."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from ckpt_tools.errors import UsageError
from reproduce import records
from reproduce.pictures import write
from reproduce.records import Record
from reproduce.sets import Spec

HOME = Path(__file__).parent  # of RESULTS.md and results/


@dataclass(frozen=True)
class Setup:
    """What the command line says.

    ``scratch`` is a folder for whatever a cell wants to keep while it runs. ``only``: by names of
    fields, what the cells to run are told from the others by, so that several machines or processes
    can share an experiment.
    """

    data: Spec | None
    seeds: int
    device: str
    quick: bool
    scratch: Path
    only: Mapping[str, str] = field(default_factory=dict)

    def wants(self, cell: object) -> bool:
        """Whether a cell is among those to run."""
        return all(str(getattr(cell, name)) == value for name, value in self.only.items())


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    ``cell`` is a frozen dataclass of JSON values with a field ``seed``: all that tells one run from
    another, the data set's name aside. ``plan`` names the cells that are wanted, given what is
    known; it is asked again when they are done, so that a learning rate can be chosen first.
    ``run`` measures one, as a dict of JSON values. ``section`` renders records of one data set as
    Markdown without a heading, ``pictures`` draw them, by the stem of their files. ``paper`` says
    what the paper shows. ``data`` names the data sets of the full protocol; the command then takes
    them, and the digits, with --data. ``records`` names another experiment whose cells these are.
    Quick records never come together with others.
    """

    name: str
    title: str
    paper: str
    cell: type
    plan: Callable[[Setup, Sequence[Record]], Sequence[Any]]
    run: Callable[[Any, Setup], dict[str, Any]]
    section: Callable[[Sequence[Record]], str]
    pictures: Mapping[str, Callable[[Sequence[Record]], Figure]] = field(default_factory=dict)
    seeds: int = 5
    data: tuple[str, ...] = ()
    records: str = ""

    def file(self, out: Path) -> Path:
        """Where the records are."""
        return out / "results" / f"{self.records or self.name}.jsonl"

    def read(self, out: Path) -> list[Record]:
        """All records in a folder."""
        return records.read(self.file(out), self.cell)


def run(experiment: Experiment, setup: Setup, out: Path) -> int:
    """Run the cells that are not done; how many those were."""
    file = experiment.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = setup.data.name if setup.data else ""
    count = 0
    with tqdm(desc=experiment.name, unit="cell") as bar:
        while True:
            records_so_far = [
                record
                for record in experiment.read(out)
                if (record.data, record.quick) == (data, setup.quick)
            ]
            done = {record.cell for record in records_so_far}
            wanted = [cell for cell in experiment.plan(setup, records_so_far) if setup.wants(cell)]
            missing = [cell for cell in dict.fromkeys(wanted) if cell not in done]
            bar.total, bar.n = len(wanted), len(wanted) - len(missing)
            bar.refresh()
            if not wanted and setup.only:
                options = " ".join(f"--only {name}={value}" for name, value in setup.only.items())
                raise UsageError(f"{options}: expected what some cell of {experiment.name} has, found none.")
            if not missing:
                return count
            for cell in missing:
                bar.set_postfix_str(" ".join(map(str, asdict(cell).values())))
                started = time.perf_counter()
                measurements = experiment.run(cell, setup)
                seconds = round(time.perf_counter() - started, 2)
                device = records.device_name(setup.device)
                records.append(
                    file, Record(cell, data, setup.quick, measurements, seconds, device, records.versions())
                )
                bar.update()
                count += 1


def draw(experiment: Experiment, out: Path) -> list[Path]:
    """Make the pictures of what is known: NAME.svg and NAME.png for each data set."""
    all_records = experiment.read(out)
    files = []
    for data, quick in records.distinct(all_records, lambda record: (record.data, record.quick)):
        of_data_set = [record for record in all_records if (record.data, record.quick) == (data, quick)]
        for stem, picture in experiment.pictures.items():
            files += write(partial(picture, of_data_set), out / "results" / picture_name(stem, data))
    return files


def picture_name(stem: str, data: str) -> str:
    """The name of a picture without its suffix."""
    return f"{stem}-{data}" if data else stem
