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

from ckpt_tools.errors import ClusterError, DataError
from ckpt_tools.jobs.many.engine import Record, RecordBuilder
from ckpt_tools.jobs.many.folder_run import (
    CheckpointItem,
    ItemResult,
    ProgressCallback,
    StreamKey,
    inspect_item,
    open_data_sources,
    reestimate_items,
)
from ckpt_tools.jobs.request import Request
from ckpt_tools.machine.memory import share_memory

__all__ = ["TaskEnvironment", "inspect_items_in_worker", "reestimate_items_in_worker"]

_PATIENCE = 0.2  # seconds; Ray's interrupt gets through between two waits


@dataclass(frozen=True)
class TaskEnvironment:
    """What a task has: the folder and the host that the run was started from, its CPUs and GPUs.

    ``tasks_of_a_node``: how many such tasks share the machine.
    """

    folder: Path
    host: str
    cpus: int
    gpus: int
    tasks_of_a_node: int


def inspect_items_in_worker(
    items: Mapping[int, CheckpointItem],
    request: Request,
    describe: RecordBuilder,
    site: TaskEnvironment,
) -> Iterator[tuple[int, Record | StreamKey]]:
    """By number, what each item reads in its pass, or its record if it needs none."""
    _settle(site)
    try:
        source = open_data_sources(request)
    except DataError as error:
        raise _add_host_name(error, site) from error
    for number, item in items.items():
        found = inspect_item(item, request, source)
        yield number, describe(found) if isinstance(found, ItemResult) else found


def reestimate_items_in_worker(
    items: Mapping[int, CheckpointItem],
    request: Request,
    describe: RecordBuilder,
    site: TaskEnvironment,
) -> Iterator[tuple[int, Record]]:
    """The local job on some items: by number, the record of each as soon as its output stands."""
    _settle(site)
    numbers = {item: number for number, item in items.items()}

    def job(record: Callable[[tuple[int, Record]], None], watch: ProgressCallback) -> None:
        reestimate_items(
            list(numbers),
            request,
            lambda result: record((numbers[result.item], describe(result))),
            watch,
        )

    try:
        yield from _stream_records(job)
    except DataError as error:
        raise _add_host_name(error, site) from error


def _stream_records(
    job: Callable[[Callable[[tuple[int, Record]], None], ProgressCallback], None],
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


def _settle(site: TaskEnvironment) -> None:
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
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # Ray hides GPUs that a task did not ask for in some versions only
        )
    torch.set_num_threads(site.cpus)
    share_memory(site.tasks_of_a_node)
    os.environ["LOCAL_WORLD_SIZE"] = str(
        site.tasks_of_a_node
    )  # by which decoding threads divide the cores


def _add_host_name(error: DataError, site: TaskEnvironment) -> DataError:
    here = socket.gethostname()
    return (
        error
        if here == site.host
        else DataError(f"{error} So it is on {here}, a node of the Ray cluster.")
    )
