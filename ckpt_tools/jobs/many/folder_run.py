"""Re-estimation of many checkpoints.

Those with the same preprocessing share one stream of images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.shared_stream import read_together
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.errors import CkptToolsError, NothingToDo, OutputError
from ckpt_tools.jobs.earlier_output import DamagedOutput, EarlierOutput, find_earlier_output
from ckpt_tools.jobs.many.folder_items import CheckpointItem
from ckpt_tools.jobs.plan import (
    Plan,
    Sources,
    choose_device,
    parse_evaluation_request,
    prepare_reestimation,
)
from ckpt_tools.jobs.reestimation import ReestimationOutcome, execute_reestimation
from ckpt_tools.jobs.request import Request
from ckpt_tools.jobs.walk_cache import WalkCache
from ckpt_tools.location import Location
from ckpt_tools.machine.memory import available_bytes, free_bytes
from ckpt_tools.machine.temporary_folders import remove_abandoned_folders
from ckpt_tools.storage.output.integrity import FileDigest

Status = Literal["done", "done before", "nothing to do", "failed"]
ProgressCallback = Callable[[int, int, int | None], None]
"""Called with the number of checkpoints that share a stream, the images read so far, and those of a
pass.
"""

StreamKey = tuple[InputSpec | None, int, str, int | None]
"""What a checkpoint reads: preprocessing, batch size, device, number of samples.

Those with equal keys share one stream.
"""

_MODEL_SHARE = 0.4  # of the free memory, for the models of a group; activations need what is left


@dataclass(frozen=True)
class ItemResult:
    """The result of one checkpoint.

    ``outcome`` is there if it was re-estimated, ``error`` if it was not, ``written`` if an output
    stands. ``seconds`` are those from its reading to its end, including the others of its group.
    ``replaced`` says what was wrong with an earlier output in whose place the new one is; it is
    empty if there was none.
    """

    item: CheckpointItem
    status: Status
    outcome: ReestimationOutcome | None = None
    written: EarlierOutput | None = None
    error: Exception | None = None
    seconds: float = 0.0
    replaced: str = ""

    @property
    def error_is_expected(self) -> bool:
        """Whether the error is one of ours.

        Any other is a bug, of a model's code or of this tool.
        """
        return self.error is None or isinstance(self.error, CkptToolsError)


def reestimate_items(
    items: Sequence[CheckpointItem],
    request: Request,
    record: Callable[[ItemResult], None],
    watch: ProgressCallback | None = None,
) -> None:
    """Re-estimate every item; ``record`` gets each result as soon as its output stands.

    One failure stops no other. What an earlier run finished with the same settings from the same
    bytes is not done again, unless ``request.overwrite`` is set or its output is damaged. Raises
    what concerns all items: DataError, UsageError, ModelError for a device.
    """
    sources = open_data_sources(request)
    choose_device(request)  # a device that is not there concerns all items
    groups, walks = _PreparedGroups(), WalkCache()
    # Also of items that are done already: a process may be killed between its output and its last
    # step.
    for folder in {item.output.path.parent for item in items}:
        remove_abandoned_folders(folder)
    for item in items:
        started = time.perf_counter()
        item_request = _request_for_item(item, request)
        try:
            prepared = _prepare_item(item, item_request, item_request, sources, walks)
        except Exception as error:  # noqa: BLE001 - it must not stop the others
            record(_failed_result(item, error, started))
            continue
        if isinstance(prepared, ItemResult):
            record(prepared)
            continue
        groups.add(prepared)
        # Groups are as large as memory allows: each pass over the data then serves more
        # checkpoints.
        if groups.fill_memory:
            _reestimate_group(groups.pop_largest(), record, watch)
    while groups:
        _reestimate_group(groups.pop_largest(), record, watch)


def open_data_sources(request: Request) -> Sources:
    """Open the data without reading it, once the request is checked as far as no checkpoint is
    needed.

    Raises UsageError, DataError, also for the labelled data.
    """
    parse_evaluation_request(request)
    return Sources.from_request(request)


def make_folder(folder: Location) -> None:
    """Make a folder for outputs, and its parents. Raises OutputError."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made ({error.strerror}). Choose another --output-dir."
        ) from error


def inspect_item(item: CheckpointItem, request: Request, sources: Sources) -> ItemResult | StreamKey:
    """The result of an item that needs no pass (done before, nothing to do, failed), else what it
    reads.

    It is looked at on the CPU and so needs no GPU. Where the pass runs, memory may allow another
    batch size.
    """
    started = time.perf_counter()
    item_request = _request_for_item(item, request)
    cpu_request = replace(
        item_request,
        reading=replace(request.reading, device="cpu"),
        method=replace(request.method, precision="fp32"),
    )
    remove_abandoned_folders(item.output.path.parent)
    try:
        prepared = _prepare_item(item, item_request, cpu_request, sources, WalkCache())
    except Exception as error:  # noqa: BLE001 - as above
        return _failed_result(item, error, started)
    return prepared if isinstance(prepared, ItemResult) else _stream_key(prepared.plan)


def _request_for_item(item: CheckpointItem, request: Request) -> Request:
    return replace(request, checkpoint=item.checkpoint, output=item.output)


def _stream_key(plan: Plan) -> StreamKey:
    return plan.input_spec, plan.batch_size, plan.device, plan.stream.count


@dataclass(frozen=True)
class _PreparedItem:
    item: CheckpointItem
    plan: Plan
    started: float
    replaced: str = ""  # what was wrong with an earlier output


def _prepare_item(
    item: CheckpointItem,
    request: Request,
    plan_request: Request,
    sources: Sources,
    walks: WalkCache,
) -> ItemResult | _PreparedItem:
    """The result of an earlier run with ``request``, or a plan for ``plan_request``."""
    started = time.perf_counter()
    earlier = find_earlier_output(item.output, request, item.in_manifest)
    if isinstance(earlier, EarlierOutput):
        seconds = time.perf_counter() - started
        return ItemResult(item, "done before", written=earlier, seconds=seconds)
    make_folder(item.output.parent)
    stamp, damage = None, ""
    if isinstance(earlier, DamagedOutput):
        stamp, damage = earlier.stamp, earlier.why
    plan = prepare_reestimation(plan_request, sources, walks=walks, replaces=stamp)
    return _PreparedItem(item, plan, started, damage)


class _PreparedGroups:
    """Prepared checkpoints, in groups that read the same and so share one stream."""

    def __init__(self) -> None:
        self._groups: dict[StreamKey, list[_PreparedItem]] = {}
        self._model_bytes, self._device = 0, "cpu"

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, prepared: _PreparedItem) -> None:
        self._groups.setdefault(_stream_key(prepared.plan), []).append(prepared)
        self._model_bytes += _model_bytes(prepared.plan)
        self._device = prepared.plan.device

    @property
    def fill_memory(self) -> bool:
        """Whether the models take so much memory that no further one should be loaded before a
        pass.
        """
        taken = self._model_bytes
        # Models wait on the CPU, and all of a group are moved to the device for their pass.
        if taken > _MODEL_SHARE * (available_bytes() + taken):
            return True
        return self._device != "cpu" and taken > _MODEL_SHARE * free_bytes(self._device)

    def pop_largest(self) -> list[_PreparedItem]:
        """Remove the group with the most checkpoints, and return it."""
        key = max(self._groups, key=lambda key: len(self._groups[key]))
        group = self._groups.pop(key)
        self._model_bytes -= sum(_model_bytes(prepared.plan) for prepared in group)
        return group


def _model_bytes(plan: Plan) -> int:
    model = plan.loaded_model.model
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _reestimate_group(
    group: Sequence[_PreparedItem],
    record: Callable[[ItemResult], None],
    watch: ProgressCallback | None,
) -> None:
    """Run all of a group on one stream, after a check of each on the same first images."""
    stream, first_samples = group[0].plan.stream, group[0].plan.look
    images_read = 0

    def count_images(images: int) -> None:
        nonlocal images_read
        images_read += images
        if watch is not None:
            watch(len(group), images_read, stream.count)

    jobs = [partial(_finish_item, prepared, first_samples, record) for prepared in group]
    read_together(stream, jobs, count_images)


def _finish_item(
    prepared: _PreparedItem,
    first_samples: BatchStream,
    record: Callable[[ItemResult], None],
    stream: BatchStream,
) -> None:
    item, plan = prepared.item, prepared.plan
    try:
        outcome = execute_reestimation(replace(plan, stream=stream, look=first_samples))
    except Exception as error:  # noqa: BLE001 - as above
        record(_failed_result(item, error, prepared.started))
        return
    # A folder run is never a dry one, so the digests are there.
    assert outcome.source_sha256 is not None
    assert outcome.output_sha256 is not None
    assert outcome.output_bytes is not None
    file = FileDigest(outcome.output_sha256, outcome.output_bytes)
    written = EarlierOutput(outcome.source_sha256, plan.request.settings_digest(), file)
    seconds = time.perf_counter() - prepared.started
    record(ItemResult(item, "done", outcome, written, None, seconds, prepared.replaced))


def _failed_result(item: CheckpointItem, error: Exception, started: float) -> ItemResult:
    status: Status = "nothing to do" if isinstance(error, NothingToDo) else "failed"
    return ItemResult(item, status, error=error, seconds=time.perf_counter() - started)
