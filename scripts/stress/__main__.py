"""Kill runs at random moments, and look at what is left.

kill -9, SIGTERM and SIGINT, spread over all of a run's life and, more densely, over the time in
which it writes. After each: every output is absent, or what it was, or byte for byte that of an
undisturbed run; the sources are untouched; and the next run leaves the folder as an undisturbed one
would. Equal seeds give equal kills, but for the machine's pace.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from tqdm import tqdm

from stress.trials import Stress, run_trials


@click.command(help=__doc__)
@click.option("--kills", default=500, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread in a process that forks
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder, tqdm(total=kills, unit="kill") as bar:
        book = run_trials(Stress(Path(folder)), kills, seed, lambda done: bar.update(done - bar.n))
    for failure in book.failures:
        print(failure)
    print(book.summary(time.perf_counter() - started))
    sys.exit(1 if book.failures else 0)


if __name__ == "__main__":
    main(prog_name="scripts/run stress")
