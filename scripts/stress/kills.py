"""A run in a forked child that is killed at some moment of its life."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ckpt_tools.cli import main
from stress.jobs import Job, command

__all__ = ["SIGNALS", "WHENS", "End", "Pace", "measure_pace", "run"]

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WHENS = ("any moment", "while writing", "while writing", "when an output appears")
_TOO_LONG = 120.0  # seconds


@dataclass(frozen=True)
class Pace:
    """Seconds of an undisturbed run: in all, and from its first temporary file to its end."""

    total: float
    writing: float


@dataclass(frozen=True)
class End:
    """How a run ended: its exit code (negative: the signal that it died of), and what it said."""

    code: int
    output_text: str
    seconds: float
    writing: float = 0.0  # seconds since the first temporary file appeared


def run(job: Job, shared_files: Path, folder: Path) -> End:
    """Run a job to its end."""
    with _child(job, shared_files, folder) as child:
        appeared = child.until(lambda: _temporary(folder))
        child.until(lambda: False)
        return child.end(time.perf_counter() - appeared)


def kill_run(
    job: Job, shared_files: Path, folder: Path, pace: Pace, number: int, when: str, source: random.Random
) -> End:
    """Send a run the signal `number`, at a moment of the kind `when`."""
    there = {output: _inode(folder / output) for output in job.outputs}
    with _child(job, shared_files, folder) as child:
        if when == "any moment":
            child.wait(source.uniform(0, pace.total))
        elif when == "while writing":
            child.until(lambda: _temporary(folder))
            child.wait(source.uniform(0, pace.writing))
        else:
            output = source.choice(sorted(there))
            child.until(lambda: _inode(folder / output) != there[output])
            child.wait(source.uniform(0, 0.1 * pace.writing))
        child.send(number)
        child.until(lambda: False)
        return child.end()


def measure_pace(job: Job, shared_files: Path, make: Callable[[], Path], times: int = 3) -> Pace:
    """The pace of a job: the median of some runs, each in a new folder."""
    ends = [run(job, shared_files, make()) for _ in range(times)]
    assert all(end.code == 0 for end in ends), ends[0].output_text
    middle = times // 2
    return Pace(sorted(end.seconds for end in ends)[middle], sorted(end.writing for end in ends)[middle])


class _Child:
    def __init__(self, process: int, output_text: Path) -> None:
        self._process, self._output = process, output_text
        self._started = time.perf_counter()
        self._status: int | None = None

    def until(self, is_seen: Callable[[], bool]) -> float:
        """Watch until something is seen, or the child has ended; when that was."""
        while not self._has_ended() and not is_seen():
            time.sleep(0.0002)
            if time.perf_counter() - self._started > _TOO_LONG:
                self.send(signal.SIGKILL)
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Let the child run on."""
        time.sleep(seconds)

    def send(self, number: int) -> None:
        """Send a signal, unless the child has ended."""
        if not self._has_ended():
            os.kill(self._process, number)

    def end(self, writing: float = 0.0) -> End:
        """How it ended."""
        assert self._status is not None
        code = os.waitstatus_to_exitcode(self._status)
        return End(
            code, self._output.read_text(errors="replace"), time.perf_counter() - self._started, writing
        )

    def _has_ended(self) -> bool:
        if self._status is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            self._status = status if process else None
        return self._status is not None


@contextlib.contextmanager
def _child(job: Job, shared_files: Path, folder: Path) -> Iterator[_Child]:
    output_text = folder.with_suffix(".txt")
    output_text.touch()  # the child may not live long enough
    # an interrupt before the child has its own handlers would take it through what its parent
    # cleans up
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if process == 0:
        _be(job, shared_files, folder, output_text)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    child = _Child(process, output_text)
    try:
        yield child
    finally:
        child.send(signal.SIGKILL)
        child.until(lambda: False)


def _be(job: Job, shared_files: Path, folder: Path, output_text: Path) -> None:
    """Run the command line in this process, which ends with it."""
    code = 70  # what the tool never says
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(os.open(output_text, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            main(command(job, shared_files))
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
    except KeyboardInterrupt:
        code = 130  # before the tool has taken over, or as it has ended
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _temporary(folder: Path) -> bool:
    """Whether a temporary file of ours is there."""
    return any(path.name.startswith(".ckpt-tools-") for path in (*folder.iterdir(), *folder.glob("fixed/.*")))


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
