"""Reading ahead: threads fill what comes next while a batch is in use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch

__all__ = ["ReadTimeoutError", "read_ahead", "track_reading"]

T = TypeVar("T")

READ_TIMEOUT_SECONDS = 300.0  # seconds for one image: disks fall asleep, networks hang for a while
_GLANCE = 1.0  # seconds between two looks at what is under way; while we are stopped (Ctrl-Z) no time passes
_GRACE = 5.0  # seconds for what is under way when nobody wants it any more


class ReadTimeoutError(Exception):
    """A file that a thread does not come back from; the message names it."""


@contextmanager
def track_reading(name: str) -> Iterator[None]:
    """Say what this thread reads now, so that it can be named if that does not end."""
    thread = threading.get_ident()
    _underway[thread] = [name]
    try:
        yield
    finally:
        del _underway[thread]


_underway: dict[int, list[str]] = {}  # by thread; a new list for every file


def read_ahead(groups: Iterable[Sequence[Callable[[], T]]], workers: int) -> Iterator[list[T]]:
    """The results of every group of jobs, in order; whatever a job raises is raised here.

    With ``workers`` threads, the next group and at least two jobs a thread are under way or done while the
    consumer is busy. With none, one thread runs jobs when their group is asked for.

    Raises Stuck if one file (``track_reading``) takes longer than ``READ_TIMEOUT_SECONDS``. Its thread cannot be ended; it keeps neither
    the pass nor the process from ending.
    """
    readers = _Readers[T](workers)
    waiting: deque[list[_Task[T]]] = deque()
    try:
        for group in groups:
            waiting.append([readers.submit(job) for job in group])
            while _suffice(waiting, workers):
                yield [task.result() for task in waiting.popleft()]
        while waiting:
            yield [task.result() for task in waiting.popleft()]
    finally:
        readers.end()
        # a reader's thread count of 1 also holds for threads that are started later, until someone sets another
        torch.set_num_threads(torch.get_num_threads())


def _suffice(waiting: Sequence[Sequence[object]], workers: int) -> bool:
    """Whether enough is under way to ask for the first group."""
    if not workers:
        return bool(waiting)
    return sum(map(len, waiting)) - len(waiting[0]) >= max(2 * workers, len(waiting[0]))


class _Task(Generic[T]):
    """A job, and what comes of it."""

    def __init__(self, job: Callable[[], T]) -> None:
        self._job, self._future = job, Future[T]()
        self._thread = 0

    def run(self) -> None:
        self._thread = threading.get_ident()
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            result = self._job()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def cancel(self) -> None:
        self._future.cancel()

    def result(self) -> T:
        """Wait for the result. Raises Stuck, and what the job raised."""
        left, seen = READ_TIMEOUT_SECONDS, None
        while not wait([self._future], _GLANCE).done:
            now = _underway.get(self._thread)
            left = left - _GLANCE if now is seen else READ_TIMEOUT_SECONDS
            seen = now
            if now is not None and left <= 0:
                raise ReadTimeoutError(f"{now[0]}: not read after {READ_TIMEOUT_SECONDS:.0f} s")
        return self._future.result()


class _Readers(Generic[T]):
    """Threads that are started as tasks come, up to a number."""

    # Threads, not processes: decoding and resizing release the interpreter's lock, nothing needs pickling or
    # shared memory, and a spawned process would first import torch for seconds. Daemons, not an executor, which at
    # the process's end would wait for a thread that hangs.
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._tasks = SimpleQueue[_Task[T] | None]()
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], T]) -> _Task[T]:
        task = _Task(job)
        self._tasks.put(task)
        if len(self._threads) < max(1, self._workers):
            name = f"ckpt-tools-reader-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return task

    def _work(self) -> None:
        if self._workers:
            torch.set_num_threads(1)
        while (task := self._tasks.get()) is not None:
            task.run()
            del task  # it holds the result

    def end(self) -> None:
        """Cancel what has not begun, and wait a little for the rest."""
        with suppress(Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(_GRACE)
