"""What runs in a worker of the cluster: tasks that hand over plain data item by item."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ckpt_tools.data.memory import share_memory
from ckpt_tools.errors import ClusterError, DataError
from ckpt_tools.jobs.engine import Describe, Record
from ckpt_tools.jobs.folder import Item, Reading, Result, Watch, look, opened, run
from ckpt_tools.jobs.request import Request
from ckpt_tools.reestimate.heap import keep_freed_memory

__all__ = ["Site", "looked_at", "worked_on"]

_PATIENCE = 0.2  # seconds; Ray's interrupt gets through between two waits


@dataclass(frozen=True)
class Site:
    """What a task has: the folder and the host that the run was started from, its CPUs and GPUs.

    ``tasks_of_a_node``: how many such tasks share the machine.
    """

    folder: Path
    host: str
    cpus: int
    gpus: int
    tasks_of_a_node: int


def looked_at(
    items: Mapping[int, Item], request: Request, describe: Describe, site: Site
) -> Iterator[tuple[int, Record | Reading]]:
    """By number, what each item reads in its pass, or its record if it needs none."""
    _settle(site)
    try:
        source = opened(request)
    except DataError as error:
        raise _seen_here(error, site) from error
    for number, item in items.items():
        found = look(item, request, source)
        yield number, describe(found) if isinstance(found, Result) else found


def worked_on(
    items: Mapping[int, Item], request: Request, describe: Describe, site: Site
) -> Iterator[tuple[int, Record]]:
    """The local job on some items: by number, the record of each as soon as its output stands."""
    _settle(site)
    numbers = {item: number for number, item in items.items()}

    def job(record: Callable[[tuple[int, Record]], None], watch: Watch) -> None:
        with keep_freed_memory():
            run(list(numbers), request, lambda result: record((numbers[result.item], describe(result))), watch)

    try:
        yield from _streamed(job)
    except DataError as error:
        raise _seen_here(error, site) from error


def _streamed(
    job: Callable[[Callable[[tuple[int, Record]], None], Watch], None],
) -> Iterator[tuple[int, Record]]:
    """What a job in another thread hands over, as it does. If the iteration ends early, the job ends at a batch."""
    handed: queue.SimpleQueue[tuple[int, Record] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def watch(models: int, seen: int, total: int | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job, handed.put, watch)
        running.add_done_callback(lambda _: handed.put(None))
        try:
            while (one := _next(handed)) is not None:
                yield one
            running.result()
        finally:
            stop.set()


def _next(handed: queue.SimpleQueue[tuple[int, Record] | None]) -> tuple[int, Record] | None:
    while True:
        try:
            return handed.get(timeout=_PATIENCE)
        except queue.Empty:
            continue


def _settle(site: Site) -> None:
    """Make this process what the local one is: in the same folder, with its share of the machine.

    Raises ClusterError where the folder is not there.
    """
    try:
        os.chdir(site.folder)
    except OSError as error:
        raise ClusterError(
            f"{site.folder}: expected the folder that ckpt-fix was started in on every node, found none on "
            f"{socket.gethostname()} ({error.strerror}). Start it in a folder of a file system that all nodes share."
        ) from error
    # Ray cancels by an interrupt; where a shell started it in the background, that is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not site.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs that a task did not ask for in some versions only
    torch.set_num_threads(site.cpus)
    share_memory(site.tasks_of_a_node)
    os.environ["LOCAL_WORLD_SIZE"] = str(site.tasks_of_a_node)  # by which decoding threads divide the cores


def _seen_here(error: DataError, site: Site) -> DataError:
    here = socket.gethostname()
    return error if here == site.host else DataError(f"{error} So it is on {here}, a node of the Ray cluster.")
