"""Run cases in processes of their own.

A case that ends its process, or never ends, is then a result like any other.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fuzz.cases import Case, Result, run

__all__ = ["Tally", "run_all"]

_HEADROOM = 4 << 30  # bytes of address space a worker may take beyond what it starts with
_DEADLINE = 60.0  # seconds without a result, whatever the processor does
_REPORTED = 0.2  # seconds between two messages of a worker
_context = get_context("fork")  # after the imports: torch takes seconds


@dataclass
class Tally:
    """What a worker did since its last message.

    `peak` is the most memory that its process ever held, in bytes.
    """

    done: list[tuple[str, bool, float]]
    slowest: tuple[float, str]
    failures: list[Result]
    peak: int


def run_all(cases: Sequence[Case], jobs: int, report: Callable[[Tally], None]) -> None:
    """Run the cases on ``jobs`` processes; ``report`` gets tallies as they come."""
    running: dict[Connection, _Worker] = {}
    for share in range(jobs):
        if share < len(cases):
            worker = _Worker(cases[share::jobs])
            running[worker.receiver] = worker
    while running:
        ready = wait(list(running), timeout=1)
        for receiver, worker in list(running.items()):
            if not worker.receive(report) if receiver in ready else worker.late() and worker.kill(report):
                del running[receiver]
                again = worker.remaining()
                if again is not None:
                    running[again.receiver] = again


class _Worker:
    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.at: Any = _context.Value("q", 0, lock=False)  # the case under way
        self.receiver, sender = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_work, args=(cases, self.at, sender), daemon=True)
        self.process.start()
        sender.close()
        self.seen = (0, time.monotonic())
        self.reported = 0  # cases

    def receive(self, report: Callable[[Tally], None]) -> bool:
        """Pass a message on; False when there will be no more."""
        try:
            tally = self.receiver.recv()
            self.reported += len(tally.done)
            report(tally)
            return True
        except EOFError:
            self.process.join()
            if self.at.value < len(self.cases):
                self._blame(
                    report,
                    f"the process ended with {self.process.exitcode} (-11: segmentation fault, -9: memory)",
                )
            return False

    def late(self) -> bool:
        """Whether the case under way has been so for too long."""
        if self.seen[0] != self.at.value:
            self.seen = (self.at.value, time.monotonic())
        return time.monotonic() - self.seen[1] > _DEADLINE

    def kill(self, report: Callable[[Tally], None]) -> bool:
        """End the process and blame the case."""
        self.process.kill()
        self.process.join()
        self._blame(report, f"no answer for {_DEADLINE:.0f} s")
        return True

    def remaining(self) -> _Worker | None:
        """Return a worker for the remaining cases, without the one that ended this worker.

        Cases whose results were not reported are done again.
        """
        left = [*self.cases[self.reported : self.at.value], *self.cases[self.at.value + 1 :]]
        return _Worker(left) if left else None

    def _blame(self, report: Callable[[Tally], None], why: str) -> None:
        case = self.cases[self.at.value]
        report(Tally([(case.reader, False, 0.0)], (0.0, str(case)), [Result(case, why, 0.0)], 0))


def _work(cases: Sequence[Case], at: Any, sender: Connection) -> None:
    torch.set_num_threads(1)
    _bound_memory()
    tally, sent = _empty(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for number, case in enumerate(cases):
            at.value = number
            before = _peak()
            result = run(case, Path(folder) / "case")
            tally.peak = _peak()
            if tally.peak - before > _LEAP:
                print(f"{case}: {(tally.peak - before) >> 20} MB more", file=sys.stderr, flush=True)
            tally.done.append((case.reader, result.refused, result.seconds))
            tally.slowest = max(tally.slowest, (result.seconds, str(case)))
            if result.failure:
                tally.failures.append(result)
            if result.failure or time.monotonic() - sent > _REPORTED:
                sender.send(tally)
                tally, sent = _empty(), time.monotonic()
        sender.send(tally)
        at.value = len(cases)


_LEAP = 64 << 20  # bytes by which one case raises the peak, to be named


def _empty() -> Tally:
    return Tally([], (0.0, ""), [], 0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bound_memory() -> None:
    """Limit the address space of this process.

    A file that asks for too much memory then causes a MemoryError, which is reported as a failure,
    instead of taking the machine down.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _HEADROOM, used + _HEADROOM))
