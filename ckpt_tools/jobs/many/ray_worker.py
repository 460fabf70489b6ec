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

from ckpt_tools.arguments import caller_gives_options
from ckpt_tools.errors import ClusterError, DataError
from ckpt_tools.jobs.many.engine import Record, RecordBuilder
from ckpt_tools.jobs.many.folder_items import CheckpointItem
from ckpt_tools.jobs.many.folder_run import (
    ItemResult,
    ProgressCallback,
    StreamKey,
    inspect_item,
    open_data_sources,
    reestimate_items,
)
from ckpt_tools.jobs.request import Request
from ckpt_tools.machine.heap import keep_freed_memory
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
    environment: TaskEnvironment,
) -> Iterator[tuple[int, Record | StreamKey]]:
    """The number of each item, with what it reads in its pass, or its record if it needs none."""
    _enter_environment(environment)
    try:
        source = open_data_sources(request)
    except DataError as error:
        raise _add_host_name(error, environment) from error
    for number, item in items.items():
        with caller_gives_options():
            result_or_key = inspect_item(item, request, source)
        if isinstance(result_or_key, ItemResult):
            yield number, describe(result_or_key)
        else:
            yield number, result_or_key


def reestimate_items_in_worker(
    items: Mapping[int, CheckpointItem],
    request: Request,
    describe: RecordBuilder,
    environment: TaskEnvironment,
) -> Iterator[tuple[int, Record]]:
    """Run the local job on some items; yield the number and the record of each as soon as its
    output stands.
    """
    _enter_environment(environment)
    numbers = {item: number for number, item in items.items()}

    def job(record: Callable[[tuple[int, Record]], None], watch: ProgressCallback) -> None:
        def record_result(result: ItemResult) -> None:
            record((numbers[result.item], describe(result)))

        with caller_gives_options(), keep_freed_memory():
            reestimate_items(list(numbers), request, record_result, watch)

    try:
        yield from _stream_records(job)
    except DataError as error:
        raise _add_host_name(error, environment) from error


def _stream_records(
    job: Callable[[Callable[[tuple[int, Record]], None], ProgressCallback], None],
) -> Iterator[tuple[int, Record]]:
    """Run a job in another thread, and yield what it records as it comes.

    The job hands its records to a callback, and a task of Ray yields them: so the job needs a
    thread of its own. If the iteration ends early, the job ends at the next batch.
    """
    records: queue.SimpleQueue[tuple[int, Record] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def watch(models: int, images: int, total: int | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job, records.put, watch)
        running.add_done_callback(lambda _: records.put(None))  # the end
        try:
            while (record := _wait_for_record(records)) is not None:
                yield record
            running.result()
        finally:
            stop.set()


def _wait_for_record(
    records: queue.SimpleQueue[tuple[int, Record] | None],
) -> tuple[int, Record] | None:
    while True:
        try:
            return records.get(timeout=_PATIENCE)
        except queue.Empty:
            continue


def _enter_environment(environment: TaskEnvironment) -> None:
    """Let this process work as the local one does: in the same folder, with its share of the
    machine.

    Raises ClusterError if there is no such folder on this node.
    """
    try:
        os.chdir(environment.folder)
    except OSError as error:
        raise ClusterError(
            f"{environment.folder}: expected the folder that ckpt-fix was started in on every "
            f"node, found none on {socket.gethostname()} ({error.strerror}). Start it in a "
            "folder of a file system that all nodes share."
        ) from error
    # Ray cancels by an interrupt, which is ignored where a shell started Ray in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not environment.gpus:
        # Only some versions of Ray hide the GPUs that a task did not ask for.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(environment.cpus)
    share_memory(environment.tasks_of_a_node)
    # The threads that decode divide the cores by this number.
    os.environ["LOCAL_WORLD_SIZE"] = str(environment.tasks_of_a_node)


def _add_host_name(error: DataError, environment: TaskEnvironment) -> DataError:
    here = socket.gethostname()
    return (
        error
        if here == environment.host
        else DataError(f"{error} So it is on {here}, a node of the Ray cluster.")
    )
