"""Many checkpoints on a Ray cluster: groups become tasks, and lost workers are replaced."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptToolsError, ClusterError, UsageError
from ckpt_tools.jobs.many.engine import Record, RecordBuilder
from ckpt_tools.jobs.many.folder_items import CheckpointItem
from ckpt_tools.jobs.many.folder_run import ItemResult, ProgressCallback, StreamKey
from ckpt_tools.jobs.many.ray_cluster import ClusterCapacity, connect_to_ray, measure_capacity
from ckpt_tools.jobs.many.ray_worker import (
    TaskEnvironment,
    inspect_items_in_worker,
    reestimate_items_in_worker,
)
from ckpt_tools.jobs.plan import parse_evaluation_request
from ckpt_tools.jobs.request import Request

__all__ = ["RayEngine"]

_ATTEMPTS = 4  # to run a part whose worker is lost: as many as Ray makes with its own tasks
_GRACE = 10.0  # seconds in which cancelled tasks may remove their temporary files


@dataclass(frozen=True)
class RayEngine:
    """Runs the local job in tasks of a Ray cluster.

    Every checkpoint is looked at first, in a task of its own. Those that read the same are then
    divided into as many tasks as the cluster runs at once, each of which is a local run.

    ``address``: see ``connect_to_ray``. ``cpus`` of a task: see ``measure_capacity``. Paths must
    mean the same on every node.
    """

    address: str | None = None
    cpus: int | None = None

    def run(
        self,
        items: Sequence[CheckpointItem],
        request: Request,
        describe: RecordBuilder,
        record: Callable[[Record], None],
        watch: ProgressCallback | None = None,
    ) -> None:
        """Re-estimate every item, as any engine does.

        A checkpoint whose workers were lost four times has failed, and the others go on. ``watch``
        is not called, since batches stay in their workers.
        """
        _refuse_remote(items, request)
        parse_evaluation_request(request)  # refuse it before a cluster is started
        with connect_to_ray(self.address) as ray:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            capacity = measure_capacity(nodes, request.reading.device, self.cpus)
            cluster = _Cluster(ray, capacity, items, request, describe)
            groups: dict[StreamKey, list[int]] = {}
            with contextlib.closing(cluster.inspect_all_items()) as inspections:
                for number, record_or_key in inspections:
                    if isinstance(record_or_key, Mapping):
                        record(record_or_key)
                    else:
                        groups.setdefault(record_or_key, []).append(number)
            # Tasks end in any order; sorted, the groups are the same in every run.
            sorted_groups = [sorted(group) for group in groups.values()]
            with contextlib.closing(cluster.reestimate_groups(sorted_groups)) as records:
                for item_record in records:
                    record(item_record)


@dataclass(frozen=True)
class _Part:
    """Items of one task, by number, and which attempt at them it is."""

    numbers: tuple[int, ...]
    attempt: int = 1

    def without_item(self, number: int) -> _Part:
        numbers = tuple(item for item in self.numbers if item != number)
        return _Part(numbers, self.attempt)

    def split_for_retry(self) -> Iterator[_Part]:
        """What to run after a worker was lost.

        All items that are left run once more together, and after another loss one by one, so that
        an item that kills its worker takes no other with it.
        """
        if self.attempt == 1 and self.numbers:
            yield _Part(self.numbers, 2)
        elif self.attempt > 1:
            yield from (_Part((number,), self.attempt + 1) for number in self.numbers)


@dataclass(frozen=True)
class _Cluster:
    """Runs tasks on a cluster, takes their results, and replaces those whose workers are lost."""

    ray: Any
    capacity: ClusterCapacity
    items: Sequence[CheckpointItem]
    request: Request
    describe: RecordBuilder

    def inspect_all_items(self) -> Generator[tuple[int, Record | StreamKey], None, None]:
        """The number of every item, with its record or its stream key; none needs a GPU."""
        parts = [_Part((number,)) for number in range(len(self.items))]
        for _, number, result in self._supervise_tasks(inspect_items_in_worker, 0, parts):
            yield number, result

    def reestimate_groups(self, groups: Sequence[Sequence[int]]) -> Generator[Record, None, None]:
        """The records of all groups.

        They run in parts of about equal size, as many as tasks fit into the cluster; large ones
        first.
        """
        largest = -(-sum(map(len, groups)) // self.capacity.tasks) or 1
        parts = [_Part(part) for group in groups for part in _divide_group(group, largest)]
        # Large parts first: a large one that starts last would keep the cluster waiting.
        parts.sort(key=lambda part: -len(part.numbers))
        for attempt, _, record in self._supervise_tasks(
            reestimate_items_in_worker, self.capacity.gpus, parts
        ):
            # A worker may be lost after it has written an output and before it has handed over the
            # record.
            if attempt > 1 and record["status"] == "done before":
                record = {**record, "status": "done"}
            yield record

    def _supervise_tasks(
        self, function: Callable[..., Any], gpus: int, parts: Iterable[_Part]
    ) -> Iterator[tuple[int, int, Any]]:
        """Run parts as tasks, and yield each result as it comes: attempt, number of the item,
        result.

        Each number comes once. Running tasks are cancelled if the iteration ends early. Raises what
        a task raised.
        """
        start = self._make_task_starter(function, gpus)
        errors = self.ray.exceptions
        running = {start(part): part for part in parts}
        try:
            while running:
                task = self.ray.wait(list(running), num_returns=1)[0][0]
                part = running[task]
                try:
                    number, result = self.ray.get(next(task))
                except StopIteration:  # all of its items are done
                    del running[task]
                except errors.RayTaskError as error:
                    raise _task_failure(error) from error
                except errors.RayError as error:
                    del running[task]
                    if part.attempt < _ATTEMPTS:
                        running.update({start(retry): retry for retry in part.split_for_retry()})
                        continue
                    for number in part.numbers:
                        yield part.attempt, number, self._describe_lost_item(number, error)
                else:
                    running[task] = part.without_item(number)
                    yield part.attempt, number, result
        finally:
            self._cancel(running)

    def _make_task_starter(self, function: Callable[..., Any], gpus: int) -> Callable[[_Part], Any]:
        # No retries by Ray: they would hand over again what came before the loss, and would have to
        # do so in the same order.
        remote = self.ray.remote(
            num_cpus=self.capacity.cpus,
            num_gpus=gpus,
            num_returns="streaming",
            max_retries=0,
            name=function.__name__,
        )(function)
        environment = TaskEnvironment(
            folder=Path.cwd(),
            host=socket.gethostname(),
            cpus=self.capacity.cpus,
            gpus=gpus,
            tasks_of_a_node=self.capacity.tasks_of_a_node,
        )
        shared = [self.ray.put(value) for value in (self.request, self.describe, environment)]
        return lambda part: remote.remote({number: self.items[number] for number in part.numbers}, *shared)

    def _describe_lost_item(self, number: int, error: Exception) -> Record:
        item = self.items[number]
        reason = next(iter(str(error).strip().splitlines()), "")
        loss = ClusterError(
            f"{item.checkpoint}: its Ray worker was lost {_ATTEMPTS} times, the last time by "
            f"{type(error).__name__}: {reason} Memory is the usual reason: try a smaller "
            "--batch-size, or more --ray-cpus, so that fewer tasks share a node."
        )
        return self.describe(ItemResult(item, "failed", error=loss))

    def _cancel(self, running: Mapping[Any, _Part]) -> None:
        """Interrupt tasks, and wait until they have removed their unfinished outputs."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for task in running:
                self.ray.cancel(task)
            completions = [task.completed() for task in running]
            if completions:
                self.ray.wait(completions, num_returns=len(completions), timeout=_GRACE)


def _refuse_remote(items: Sequence[CheckpointItem], request: Request) -> None:
    """Raise UsageError for a URL, whose copy is on this machine only.

    The data may be one, since each worker opens it itself.
    """
    locations = [location for item in items for location in (item.checkpoint, item.output)]
    locations += filter(None, [request.evaluation.class_map, request.evaluation.labels])
    for location in locations:
        if location.store is not None:
            raise UsageError(
                f"{location}: expected a path on a file system that all nodes "
                "share, found a URL. With --engine ray, only --data and --eval-data may be one."
            )


def _divide_group(group: Sequence[int], largest: int) -> Iterator[tuple[int, ...]]:
    parts = -(-len(group) // largest)
    return (tuple(group[part::parts]) for part in range(parts))


def _task_failure(error: Any) -> CkptToolsError:
    """The error of a task, which concerns all tasks.

    It is about the data, the request, or the software that is installed on the nodes: what concerns
    a single checkpoint becomes its record.
    """
    cause = error.cause
    if isinstance(cause, CkptToolsError):
        return cause
    reason = str(cause).rstrip(" .\n").rpartition("\n")[2]  # Ray puts a traceback before it
    return ClusterError(
        f"a task of the Ray cluster failed with {type(cause).__name__}: {reason}. Expected "
        "ckpt-tools in this version, and what the checkpoints need, on every node: install them "
        "there."
    )
