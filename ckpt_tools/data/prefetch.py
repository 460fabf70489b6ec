"""Read ahead: threads read and decode the next samples while a batch is in use."""

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

READ_TIMEOUT_SECONDS = 300.0  # for one file: disks fall asleep, and networks hang for a while
_POLL_SECONDS = 1.0
_SHUTDOWN_SECONDS = 5.0  # how long the end of a pass waits for jobs that are still running


class ReadTimeoutError(Exception):
    """A thread has been reading one file for too long. The message names the file."""


@contextmanager
def track_reading(name: str) -> Iterator[None]:
    """Record which file this thread reads, so that an error can name it if reading does not end."""
    thread = threading.get_ident()
    _current_files[thread] = [name]
    try:
        yield
    finally:
        del _current_files[thread]


# By thread. Every file has a list of its own, so that two files of the same name can be told apart.
_current_files: dict[int, list[str]] = {}


def read_ahead(groups: Iterable[Sequence[Callable[[], T]]], workers: int) -> Iterator[list[T]]:
    """Yield the results of every group of jobs, in order.

    With ``workers`` threads, the next group and at least two jobs for each thread are running or
    done while the consumer is busy. Without workers, one thread runs the jobs when their group is
    asked for.

    Raises whatever a job raises, and ReadTimeoutError if one file (``track_reading``) takes longer
    than ``READ_TIMEOUT_SECONDS``. The thread that hangs cannot be ended, but it keeps neither the
    pass nor the process from ending.
    """
    readers = _Readers[T](workers)
    waiting: deque[list[_Task[T]]] = deque()
    try:
        for group in groups:
            waiting.append([readers.submit(job) for job in group])
            while _is_enough_ahead(waiting, workers):
                yield [task.result() for task in waiting.popleft()]
        while waiting:
            yield [task.result() for task in waiting.popleft()]
    finally:
        readers.end()
        # The readers set torch's thread count to 1, which also holds for threads that start later.
        # Setting the count of this thread again ends that.
        torch.set_num_threads(torch.get_num_threads())


def _is_enough_ahead(waiting: Sequence[Sequence[object]], workers: int) -> bool:
    # The jobs of the first group do not count: their results are about to be used.
    if not workers:
        return bool(waiting)
    return sum(map(len, waiting)) - len(waiting[0]) >= max(2 * workers, len(waiting[0]))


class _Task(Generic[T]):
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
        """Wait for the result. Raises ReadTimeoutError, and what the job raised."""
        # The time is counted in polls and not by a clock: while the process is stopped (Ctrl-Z), no
        # time passes. It starts again with every file, because a job reads several.
        remaining, previous_file = READ_TIMEOUT_SECONDS, None
        while not wait([self._future], _POLL_SECONDS).done:
            file = _current_files.get(self._thread)
            remaining = remaining - _POLL_SECONDS if file is previous_file else READ_TIMEOUT_SECONDS
            previous_file = file
            if file is not None and remaining <= 0:
                raise ReadTimeoutError(f"{file[0]}: not read after {READ_TIMEOUT_SECONDS:.0f} s")
        return self._future.result()


class _Readers(Generic[T]):
    """Threads that run tasks. They are started as tasks come, up to a number."""

    # Threads, not processes: decoding and resizing release the interpreter's lock, nothing needs
    # pickling or shared memory, and a spawned process would first import torch for seconds.
    # Daemon threads, not an executor: that would wait at the process's end for a thread that hangs.
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
            # Else every reader would start as many threads of torch as there are cores.
            torch.set_num_threads(1)
        while (task := self._tasks.get()) is not None:
            task.run()
            del task  # else this thread would keep the result alive until its next task

    def end(self) -> None:
        """Cancel the tasks that have not begun, and wait a little for those that have."""
        with suppress(Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task.cancel()
        for _ in self._threads:
            self._tasks.put(None)  # ends one thread
        for thread in self._threads:
            thread.join(_SHUTDOWN_SECONDS)
