"""Feed damaged and hostile files to every reader: each has to be read or refused with one clear
error.

Every case is a small valid file with a few changes, of its own format or of none. Anything but an
error of ckpt_tools.errors is a failure, and so are 5 seconds for a case and memory asked for
without measure. Failures are kept with their files and tracebacks; --only makes a case again. Equal
seeds give equal cases.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import click
from tqdm import tqdm

from fuzz.cases import Case, Result, make_files, plan_cases, run, write_files
from fuzz.guided import guide
from fuzz.readers import READERS
from fuzz.workers import Tally, run_all

_PEAK = 1 << 30  # bytes


class Book:
    """What was done so far."""

    def __init__(self, folder: Path, bar: tqdm[None]) -> None:
        self.folder, self.bar = folder, bar
        self.cases: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.seconds: dict[str, float] = dict.fromkeys(READERS, 0.0)
        self.slowest, self.peak = (0.0, ""), 0

    def enter(self, tally: Tally) -> None:
        """Add a worker's tally, and keep what failed."""
        for reader, refused, seconds in tally.done:
            self.seconds[reader] += seconds
            self.cases[reader] += 1
            self.refused[reader] += refused
        self.slowest, self.peak = max(self.slowest, tally.slowest), max(self.peak, tally.peak)
        for failure in tally.failures:
            self.failed[failure.case.reader] += 1
            _keep(failure, self.folder)
            self.bar.write(
                f"{failure.case}: {failure.failure.strip().splitlines()[-1][:200]}", file=sys.stderr
            )
        self.bar.update(len(tally.done))

    def summary(self, seconds: float) -> str:
        """A line for each reader, and one for all."""
        lines = [f"{'reader':20}{'cases':>9}{'refused':>9}{'failed':>8}{'ms each':>9}"]
        for reader, cases in self.cases.items():
            refused, each = self.refused[reader] / cases, 1000 * self.seconds[reader] / cases
            lines.append(f"{reader:20}{cases:9,}{refused:9.0%}{self.failed[reader]:8,}{each:9.1f}")
        total = self.cases.total()
        lines.append(
            f"{total:,} cases in {seconds:,.0f} s ({total / max(seconds, 1e-9):,.0f} a second), "
            f"{self.failed.total()} failed; slowest {self.slowest[0]:.2f} s ({self.slowest[1]}), "
            f"peak memory {self.peak / 1e6:,.0f} MB"
        )
        return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--cases", default=200_000, show_default=True, help="Over all readers.")
@click.option("--seed", default=0, show_default=True)
@click.option("--readers", default=",".join(READERS), show_default=True, metavar="NAME,…")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option(
    "--only", metavar="READER:NUMBER", help="Make this case again, in this process, and show what happens."
)
@click.option(
    "--guided", metavar="READER", help="Fuzz this reader by coverage instead; needs: pip install atheris."
)
@click.option("--seconds", default=60, show_default=True, help="Of --guided.")
@click.option("--crashes", type=click.Path(path_type=Path), default=Path("fuzz-crashes"), show_default=True)
def main(
    cases: int,
    seed: int,
    readers: str,
    jobs: int,
    only: str | None,
    guided: str | None,
    seconds: int,
    crashes: Path,
) -> None:
    if guided:
        guide(guided, seconds, crashes)
    if only:
        reader, _, number = only.rpartition(":")
        sys.exit(_again(Case(reader, int(number), seed), crashes))
    names = readers.split(",")
    unknown = sorted(set(names) - set(READERS))
    if unknown:
        raise click.BadParameter(f"--readers: {', '.join(unknown)}: expected some of {', '.join(READERS)}.")
    todo = plan_cases(names, cases, seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-first-") as folder:
        for name in names:
            run(Case(name, 0, seed), Path(folder) / "case")  # imports and seeds, before the workers fork
    started = time.perf_counter()
    with tqdm(total=cases, unit="case", file=sys.stderr, mininterval=5) as bar:
        book = Book(crashes, bar)
        run_all(todo, jobs, book.enter)
    print(book.summary(time.perf_counter() - started))
    sys.exit(1 if book.failed or book.peak > _PEAK else 0)


def _again(case: Case, crashes: Path) -> int:
    folder = crashes / str(case).replace(":", "-").replace(" ", "-")
    result = run(case, folder)
    print(
        f"{case}: {result.seconds:.3f} s, {'refused' if result.refused else 'read'}; "
        f"its files are in {folder}"
    )
    print(result.failure)
    return 1 if result.failure else 0


def _keep(failure: Result, crashes: Path) -> None:
    folder = crashes / str(failure.case).replace(":", "-").replace(" ", "-")
    try:
        write_files(make_files(failure.case), folder)
    except Exception:
        traceback.print_exc()
    (folder / "traceback.txt").write_text(failure.failure)


if __name__ == "__main__":
    main(prog_name="scripts/run fuzz")
