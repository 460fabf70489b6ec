"""What must hold after a kill.

Outputs are whole or absent, sources are as they were, and the next run succeeds.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from click.testing import CliRunner

from ckpt_tools.cli import main as tool
from stress.jobs import JOBS, Job, command, digest, give, hash_outputs, is_whole_report
from stress.kills import SIGNALS, WHENS, End, Pace, kill_run, measure_pace, run


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run of a job shows: how long it takes, its outputs, all its files."""

    pace: Pace
    outputs: dict[str, str]
    sources: dict[str, str]
    files: set[str]


@dataclass
class Book:
    """What was done so far: kills by signal and moment, runs that were quicker, and failures."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    missed: int = 0
    left: int = 0  # kills after which temporary files were there
    finished: int = 0  # kills after which all outputs stood
    untidy: int = 0  # signals that could be handled, and left temporary files all the same
    failures: list[str] = field(default_factory=list)

    def summary(self, seconds: float) -> str:
        """All in a line."""
        by = Counter[str]()
        for (name, _), count in self.kills.items():
            by[name] += count
        signals = ", ".join(f"{count} {name}" for name, count in sorted(by.items()))
        return (
            f"{self.kills.total()} kills ({signals}) in {seconds:,.0f} s: {len(self.failures)} failed; "
            f"{self.finished} came after the outputs, {self.left} left temporary files "
            f"({self.untidy} of them not kill -9), which the next run removed; "
            f"{self.missed} runs were quicker than their signal"
        )


class Stress:
    """Jobs, each known from undisturbed runs, and a folder for their cases."""

    def __init__(self, folder: Path, jobs: tuple[Job, ...] = JOBS) -> None:
        self.folder, self.shared_files, self.jobs = folder, folder / "given", jobs
        self._cases = 0
        self.error_is_expected = {job.name: self._run_undisturbed(job) for job in jobs}

    def _run_undisturbed(self, job: Job) -> Undisturbed:
        first = self._case(job)
        sources = {source: digest(first / source) for source in job.sources}
        _in_this_process(job, self.shared_files, first)  # imports, before anything forks
        pace = measure_pace(job, self.shared_files, lambda: self._case(job))
        return Undisturbed(pace, hash_outputs(job, self.shared_files, first), sources, _files(first))

    def _case(self, job: Job) -> Path:
        folder = self.folder / f"case-{self._cases}"
        self._cases += 1
        give(job, self.shared_files, folder)
        return folder

    def kill(self, job: Job, number: signal.Signals, when: str, source: random.Random, book: Book) -> None:
        """One kill, and everything that has to hold afterwards."""
        undisturbed, folder = self.error_is_expected[job.name], self._case(job)
        before = _files(folder)
        earlier = {output: digest(folder / output) for output in job.outputs if job.earlier}
        end = kill_run(job, self.shared_files, folder, undisturbed.pace, number, when, source)
        case = f"{job.name}, {number.name}, {when}, {folder.name}"
        wrong = list(_after(job, undisturbed, folder, end, earlier))
        left = _leftovers(folder)
        done = all(_digest(folder / output) == value for output, value in undisturbed.outputs.items())
        if end.code == 0:
            book.missed += 1
        else:
            book.kills[number.name, when] += 1
            book.left += bool(left)
            book.finished += done
            book.untidy += bool(left) and end.code > 0
        if not left and not done and not wrong and _files(folder) == before:
            shutil.rmtree(folder)  # as if it had never run: the next run is any run
            return
        again = run(job, self.shared_files, folder)
        wrong += _after_next(job, undisturbed, folder, again, done=done)
        if wrong:
            book.failures.append(f"{case}: {'; '.join(wrong)}\n{end.output_text}\n{again.output_text}")
        else:
            shutil.rmtree(folder)


def _after(job: Job, undisturbed: Undisturbed, folder: Path, end: End, earlier: dict[str, str]) -> list[str]:
    """What is wrong after a kill."""
    wrong = [] if end.code in (-9, -15, 130, 0) else [f"exit code {end.code}"]
    for output, value in undisturbed.outputs.items():
        value_now = _digest(folder / output)
        if value_now not in (earlier.get(output), value):
            wrong.append(f"{output} is neither whole nor absent")
        elif end.code == 0 and value_now != value:
            wrong.append(f"{output} is not there, with exit code 0")
    wrong += [
        f"{source} has changed"
        for source, value in undisturbed.sources.items()
        if digest(folder / source) != value
    ]
    wrong += [
        f"{name} is broken"
        for name in job.reports
        if (folder / name).exists() and not _is_whole(folder / name)
    ]
    strange = _files(folder) - undisturbed.files - _leftovers(folder)
    return wrong + [f"{name} is nothing that was asked for" for name in sorted(strange)]


def _after_next(job: Job, undisturbed: Undisturbed, folder: Path, again: End, *, done: bool) -> list[str]:
    """What is wrong after the next run; one whose output stands already may refuse."""
    refuses = done and not (job.earlier or job.resumes)
    wrong = [] if again.code == (1 if refuses else 0) else [f"exit code {again.code} of the next run"]
    for output, value in undisturbed.outputs.items():
        if _digest(folder / output) != value:
            wrong.append(f"the next run's {output} differs")
    wrong += [
        f"left or missing after the next run: {name}" for name in sorted(_files(folder) ^ undisturbed.files)
    ]
    wrong += [
        f"{source} has changed"
        for source, value in undisturbed.sources.items()
        if digest(folder / source) != value
    ]
    return wrong + [
        f"the next run's {name} is broken" for name in job.reports if not _is_whole(folder / name)
    ]


def _is_whole(report: Path) -> bool:
    try:
        return is_whole_report(report)
    except ValueError:
        return False


def _in_this_process(job: Job, shared_files: Path, folder: Path) -> None:
    with contextlib.chdir(folder):
        result = CliRunner().invoke(tool, command(job, shared_files))
    assert result.exit_code == 0, result.output


def _digest(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _leftovers(folder: Path) -> set[str]:
    return {name for name in _files(folder) if any(map(_is_temporary, Path(name).parts))}


def _is_temporary(name: str) -> bool:
    return name.startswith(".ckpt-tools-") and name.endswith(".tmp")


def run_trials(
    stress: Stress, kills: int, seed: int, tick: Callable[[int], object] = lambda done: None
) -> Book:
    """As many kills, of jobs, by signals and at moments drawn at random."""
    source, book = random.Random(seed), Book()
    while book.kills.total() < kills:
        job = source.choice(stress.jobs)
        stress.kill(job, source.choice(SIGNALS), source.choice(WHENS), source, book)
        tick(book.kills.total())
    return book
