"""Reading ahead: threads fill what comes next while a batch is in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(groups: Iterable[Sequence[Callable[[], T]]], workers: int) -> Iterator[list[T]]:
    """The results of every group of jobs, in order; whatever a job raises is raised here.

    With ``workers`` threads, the next group and at least two jobs a thread are under way or done while the
    consumer is busy. With none, jobs run when their group is asked for.
    """
    if not workers:
        for group in groups:
            yield [job() for job in group]
        return
    # Threads, not processes: decoding and resizing release the interpreter's lock, nothing needs pickling or
    # shared memory, and a spawned process would first import torch for seconds.
    pool = ThreadPoolExecutor(workers, "ckpt-tools-reader", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[list[Future[T]]] = deque()
    try:
        for group in groups:
            waiting.append([pool.submit(job) for job in group])
            while sum(map(len, waiting)) - len(waiting[0]) >= max(2 * workers, len(waiting[0])):
                yield _results(waiting.popleft())
        while waiting:
            yield _results(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
        # a reader's thread count of 1 also holds for threads that are started later, until someone sets another
        torch.set_num_threads(torch.get_num_threads())


def _results(group: Sequence[Future[T]]) -> list[T]:
    return [future.result() for future in group]
