"""Many checkpoints on a Ray cluster: groups become tasks, records stream back, lost workers are replaced."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptToolsError, ClusterError, UsageError
from ckpt_tools.jobs.many.engine import Record, RecordBuilder
from ckpt_tools.jobs.many.folder_run import CheckpointItem, ItemResult, ProgressCallback, StreamKey
from ckpt_tools.jobs.many.ray_cluster import ClusterCapacity, connect_to_ray, measure_capacity
from ckpt_tools.jobs.many.ray_worker import TaskEnvironment, inspect_items_in_worker, reestimate_items_in_worker
from ckpt_tools.jobs.plan import check_request
from ckpt_tools.jobs.request import Request

__all__ = ["RayEngine"]

_ATTEMPTS = 4  # at a part whose worker is lost, as with Ray's own tasks
_GRACE = 10.0  # seconds in which cancelled tasks may remove their temporary files


@dataclass(frozen=True)
class RayEngine:
    """Every checkpoint is looked at first, in a task of its own; those that read the same are divided into as many
    tasks as the cluster runs at once, each of which is a local run.

    ``address``: see ``connect_to_ray``. ``cpus`` of a task: see ``measure_capacity``. Paths must mean the same on every node.
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
        """As any engine; ``watch`` is not used, for batches stay in their workers.

        A checkpoint whose workers were lost four times has failed, and the others go on.
        """
        _refuse_remote(items, request)
        check_request(request)
        with connect_to_ray(self.address) as ray:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            cluster = _Cluster(ray, measure_capacity(nodes, request.device, self.cpus), items, request, describe)
            groups: dict[StreamKey, list[int]] = {}
            with contextlib.closing(cluster.inspect_all_items()) as looks:
                for number, found in looks:
                    if isinstance(found, Mapping):
                        record(found)
                    else:
                        groups.setdefault(found, []).append(number)
            with contextlib.closing(cluster.reestimate_groups(map(sorted, groups.values()))) as records:
                for _, found in records:
                    record(found)


@dataclass(frozen=True)
class _Part:
    """Items of one task, by number, and which attempt at them it is."""

    numbers: tuple[int, ...]
    attempt: int = 1

    def without_item(self, number: int) -> _Part:
        return _Part(tuple(other for other in self.numbers if other != number), self.attempt)

    def split_for_retry(self) -> Iterator[_Part]:
        """After a loss: all that is left once more, then one by one, so that an item that kills stands alone."""
        if self.attempt == 1 and self.numbers:
            yield _Part(self.numbers, 2)
        elif self.attempt > 1:
            yield from (_Part((number,), self.attempt + 1) for number in self.numbers)


@dataclass(frozen=True)
class _Cluster:
    """A run on a cluster: starts its tasks, takes what they hand over, and replaces those that are lost."""

    ray: Any
    size: ClusterCapacity
    items: Sequence[CheckpointItem]
    request: Request
    describe: RecordBuilder

    def inspect_all_items(self) -> Generator[tuple[int, Record | StreamKey], None, None]:
        """A task for every item, none with a GPU."""
        parts = [_Part((number,)) for number in range(len(self.items))]
        for _, number, found in self._supervise_tasks(inspect_items_in_worker, 0, parts):
            yield number, found

    def reestimate_groups(self, groups: Iterable[Sequence[int]]) -> Generator[tuple[int, Record], None, None]:
        """The groups in parts of equal size, one for each task that fits; large ones first."""
        groups = list(groups)
        largest = -(-sum(map(len, groups)) // self.size.tasks) or 1
        parts = [_Part(part) for group in groups for part in _divide_group(group, largest)]
        parts.sort(key=lambda part: -len(part.numbers))
        for attempt, number, record in self._supervise_tasks(reestimate_items_in_worker, self.size.gpus, parts):
            if attempt > 1 and record["status"] == "done before":  # by a worker that was lost before it could say so
                record = {**record, "status": "done"}
            yield number, record

    def _supervise_tasks(
        self, function: Callable[..., Any], gpus: int, parts: Iterable[_Part]
    ) -> Iterator[tuple[int, int, Any]]:
        """What the tasks hand over, as they do: the attempt, an item's number, what was found.

        Each number comes once. Tasks under way are cancelled if the iteration ends early. Raises what a task raised.
        """
        start = self._starter(function, gpus)
        errors = self.ray.exceptions
        running = {start(part): part for part in parts}
        try:
            while running:
                task = self.ray.wait(list(running), num_returns=1)[0][0]
                part = running[task]
                try:
                    number, found = self.ray.get(next(task))
                except StopIteration:
                    del running[task]
                except errors.RayTaskError as error:
                    raise _reason(error) from error
                except errors.RayError as error:
                    del running[task]
                    if part.attempt < _ATTEMPTS:
                        running.update({start(again): again for again in part.split_for_retry()})
                    else:
                        yield from (
                            (part.attempt, number, self._describe_lost_item(number, error)) for number in part.numbers
                        )
                else:
                    running[task] = part.without_item(number)
                    yield part.attempt, number, found
        finally:
            self._cancel(running)

    def _starter(self, function: Callable[..., Any], gpus: int) -> Callable[[_Part], Any]:
        # Ray's own retry would hand over again what came before the loss, and must do so in the same order
        remote = self.ray.remote(
            num_cpus=self.size.cpus, num_gpus=gpus, num_returns="streaming", max_retries=0, name=function.__name__
        )(function)
        site = TaskEnvironment(Path.cwd(), socket.gethostname(), self.size.cpus, gpus, self.size.tasks_of_a_node)
        shared = [self.ray.put(value) for value in (self.request, self.describe, site)]
        return lambda part: remote.remote({number: self.items[number] for number in part.numbers}, *shared)

    def _describe_lost_item(self, number: int, error: Exception) -> Record:
        item = self.items[number]
        said = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return self.describe(
            ItemResult(
                item,
                "failed",
                error=ClusterError(
                    f"{item.checkpoint}: its Ray worker was lost {_ATTEMPTS} times, the last time by "
                    f"{type(error).__name__}: {said} Memory is the usual reason: try a smaller --batch-size, or more "
                    "--ray-cpus, so that fewer tasks share a node."
                ),
            )
        )

    def _cancel(self, running: Mapping[Any, _Part]) -> None:
        """Interrupt tasks and wait until they have removed what is half-done."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for task in running:
                self.ray.cancel(task)
            ends = [task.completed() for task in running]
            if ends:
                self.ray.wait(ends, num_returns=len(ends), timeout=_GRACE)


def _refuse_remote(items: Sequence[CheckpointItem], request: Request) -> None:
    """A remote file has its place on this machine only; data is opened by each worker itself."""
    locations = [location for item in items for location in (item.checkpoint, item.output)]
    for location in (*locations, *([request.class_map] if request.class_map else [])):
        if location.store is not None:
            raise UsageError(
                f"{location}: expected a path on a file system that all nodes share, found a URL. With "
                "--engine ray, only --data and --eval-data may be one."
            )


def _divide_group(group: Sequence[int], largest: int) -> Iterator[tuple[int, ...]]:
    parts = -(-len(group) // largest)
    return (tuple(group[part::parts]) for part in range(parts))


def _reason(error: Any) -> CkptToolsError:
    """What a task raised concerns all of them: the data, the request, or what is installed on the nodes."""
    cause = error.cause
    if isinstance(cause, CkptToolsError):
        return cause
    said = str(cause).rstrip(" .\n").rpartition("\n")[2]  # Ray puts a traceback before it
    return ClusterError(
        f"a task of the Ray cluster failed with {type(cause).__name__}: {said}. Expected ckpt-tools in this "
        "version, and what the checkpoints need, on every node: install them there."
    )
