"""One case: a seed with some changes, given to its reader, and what is wrong with the answer."""

from __future__ import annotations

import functools
import random
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import CkptToolsError
from fuzz.damaged_formats import mutate
from fuzz.readers import READERS, SLOW
from fuzz.seeds import Seed, seeds

__all__ = ["LIMIT", "Case", "Hang", "Result", "limit_time", "make_files", "plan_cases", "run", "write_files"]

LIMIT = 5.0  # seconds of the processor for a case
_PARTS = 60_000  # bytes of what splices are taken from
_LARGEST = 2_000_000  # bytes of a file after a change


@dataclass(frozen=True)
class Case:
    """The ``number``-th case of a reader; equal ones are made of equal bytes on every machine."""

    reader: str
    number: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.reader}:{self.number}"


@dataclass(frozen=True)
class Result:
    """``failure`` is empty for a case that was read, or refused as it should be."""

    case: Case
    failure: str
    seconds: float
    refused: bool = False


class Hang(BaseException):
    """Not an Exception: no reader may take it for an error of the file."""


@functools.cache
def _seeds(reader: str) -> list[Seed]:
    return seeds(reader)


@functools.cache
def _parts(reader: str) -> list[bytes]:
    return [content[:_PARTS] for seed in _seeds(reader) for content in seed.files.values()]


def plan_cases(names: list[str], cases: int, seed: int) -> list[Case]:
    """The cases of a run, all readers in turn, in equal shares but for the slow ones."""
    shares = {name: SLOW.get(name, 1.0) for name in names}
    each = cases / sum(shares.values())
    places = [
        ((number + 0.5) / share, name, number)
        for name, share in shares.items()
        for number in range(int(each * share) + 1)
    ]
    return [Case(name, number, seed) for _, name, number in sorted(places)[:cases]]


def make_files(case: Case) -> Seed:
    """The changed files of a case."""
    draw = random.Random(f"{case.seed}/{case.reader}/{case.number}")
    seed = draw.choice(_seeds(case.reader))
    files = dict(seed.files)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        name = draw.choice(sorted(files))
        if len(files) > 1 and draw.random() < 0.05:
            files = _rearrange(files, name, draw)
        else:
            files[name] = mutate(files[name], draw, _parts(case.reader))[:_LARGEST]
    return Seed(files, seed.entry)


def _rearrange(files: dict[str, bytes], name: str, draw: random.Random) -> dict[str, bytes]:
    other, kind = draw.choice(sorted(files)), draw.randrange(4)
    if kind == 0:
        files[name], files[other] = files[other], files[name]
    elif kind == 1:
        files[name] = b""
    elif kind == 2:
        files[draw.choice((f"{name}.pt", "config.json", "model.safetensors", ".metadata", "meta.pt"))] = (
            files[name]
        )
    else:
        del files[name]
    return files


def write_files(seed: Seed, folder: Path) -> Path:
    """Put the files into an empty folder; the path that the reader gets."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in seed.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / seed.entry


def run(case: Case, folder: Path) -> Result:
    """Read a case and return what came of it. Nothing is raised, whatever the reader does."""
    path = write_files(make_files(case), folder)
    failure, refused = "", False
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(action="ignore"), limit_time():
            READERS[case.reader](path)
    except CkptToolsError as error:
        refused, failure = True, _greedy(error)
    except (Exception, Hang):
        failure = traceback.format_exc()
    except BaseException as error:  # a panic of a library in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = traceback.format_exc()
    return Result(case, failure, time.perf_counter() - started, refused)


def _greedy(error: BaseException | None) -> str:
    """Return the traceback if an error came of memory that a file asked for and did not get.

    On a machine with more memory the file might get it, so this is a failure and no refusal.
    """
    first, visited = error, set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return "".join(traceback.format_exception(first))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


@contextmanager
def limit_time() -> Iterator[None]:
    """Raise Hang in this thread after `LIMIT` seconds of processor time.

    Processor time, not wall time: other processes on a busy machine do not count.
    """

    def stop(*_: object) -> None:
        raise Hang(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
