"""Re-estimation of many checkpoints: those with the same preprocessing share one stream of images."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.shared_stream import read_together
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.errors import CkptToolsError, NothingToDo, OutputError, UsageError
from ckpt_tools.jobs.earlier_output import DamagedOutput, EarlierOutput, find_earlier_output
from ckpt_tools.jobs.outputs import default_output_path
from ckpt_tools.jobs.plan import Plan, Sources, check_request, choose_device, prepare_reestimation
from ckpt_tools.jobs.reestimation import ReestimationOutcome, execute_reestimation
from ckpt_tools.jobs.request import Request
from ckpt_tools.jobs.walk_cache import WalkCache
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.machine.memory import available_bytes, free_bytes
from ckpt_tools.storage.discovery import DiscoveredCheckpoint
from ckpt_tools.storage.output.integrity import FileDigest
from ckpt_tools.storage.provenance import read_provenance_entry
from ckpt_tools.temporary_folders import remove_abandoned_folders

Status = Literal["done", "done before", "nothing to do", "failed"]
ProgressCallback = Callable[[int, int, int | None], None]
"""Told how many checkpoints share a round, the images it has read so far, and how many a pass has."""

StreamKey = tuple[InputSpec | None, int, str]
"""What a checkpoint reads: preprocessing, batch size, device. Those with the same share one stream."""

_SHARE = 0.4  # of the free memory, for the models of a round; activations need the rest


@dataclass(frozen=True)
class CheckpointItem:
    """One checkpoint of many, and where its output goes.

    ``in_manifest`` is what a manifest says of that output, ``also_named`` are further paths to the checkpoint's file.
    """

    checkpoint: Location
    output: Location
    in_manifest: EarlierOutput | None = None
    also_named: tuple[Location, ...] = ()


@dataclass(frozen=True)
class ItemResult:
    """What became of an item. ``outcome`` is there if it was done, ``error`` if it was not, ``made`` with an output.

    ``seconds`` from its reading to its end, with the others of its round in between. ``replaced``: what was wrong with
    an earlier output in whose place the new one is; empty if there was none.
    """

    item: CheckpointItem
    status: Status
    outcome: ReestimationOutcome | None = None
    made: EarlierOutput | None = None
    error: Exception | None = None
    seconds: float = 0.0
    replaced: str = ""

    @property
    def error_is_expected(self) -> bool:
        """Whether the error was foreseen: anything else is a bug, of a model's code or of ours."""
        return self.error is None or isinstance(self.error, CkptToolsError)


def plan_items(found: Sequence[DiscoveredCheckpoint], output_dir: LocationLike | None) -> tuple[CheckpointItem, ...]:
    """Outputs below ``output_dir`` as the checkpoints lie below what was searched, or beside each checkpoint.

    Where two would share an output (``a.pt`` and ``a.pth``), or one take the place of a checkpoint, the suffix is kept
    in its name. An earlier output beside its checkpoint is no checkpoint of its own, though a pattern names it.

    Raises UsageError if a checkpoint would be replaced all the same.
    """
    short = {one: default_output_path(one.location, "bn") for one in found}
    beside = {_spot(name) for one in found for name in (short[one], _full_name(short[one], one))}
    found = [one for one in found if _spot(one.location) not in beside or read_provenance_entry(one.location) is None]
    names = {one: default_output_path(_place(one, output_dir), "bn") for one in found}
    while clashing := [one for one in _clashing(names) if names[one] != _full_name(names[one], one)]:
        names |= {one: _full_name(names[one], one) for one in clashing}
    for one in _clashing(names):
        raise UsageError(
            f"{names[one]}: expected a name for one file alone. Rename {one.location}, or give --output-dir."
        )
    return tuple(CheckpointItem(one.location, name, also_named=one.also_named) for one, name in names.items())


def _clashing(names: Mapping[DiscoveredCheckpoint, Location]) -> list[DiscoveredCheckpoint]:
    """Those whose output another output has as well, or a checkpoint."""
    taken = Counter(map(_spot, [*names.values(), *(path for one in names for path in (one.location, *one.also_named))]))
    return [one for one, name in names.items() if taken[_spot(name)] > 1]


def _spot(location: Location) -> str:
    return os.path.abspath(location.path)  # noqa: PTH100 - without .., and without following links


def _full_name(output: Location, found: DiscoveredCheckpoint) -> Location:
    """``a.pt.bn.safetensors`` for ``a.bn.safetensors``."""
    return output.parent / f"{Path(_spot(found.location)).name}.bn.safetensors"


def reestimate_items(
    items: Sequence[CheckpointItem],
    request: Request,
    record: Callable[[ItemResult], None],
    watch: ProgressCallback | None = None,
) -> None:
    """Re-estimate every item; ``record_forward`` gets each result as soon as its output stands. One failure stops no other.

    What an earlier run finished with the same settings from the same bytes is not done again, unless
    ``request.overwrite`` is set or its output is damaged. Raises what concerns all items: DataError, UsageError,
    ModelError for a device.
    """
    sources = open_data_sources(request)
    choose_device(request)
    waiting, walks = _Waiting(), WalkCache()
    for folder in {item.output.path.parent for item in items}:
        remove_abandoned_folders(
            folder
        )  # also of what is done: a process may be killed between its output and its last step
    for item in items:
        started = time.perf_counter()
        own = _own(item, request)
        try:
            begun = _begin(item, own, own, sources, walks)
        except Exception as error:  # noqa: BLE001 - one bad file, or code of its model, must not stop the rest
            record(_failed_result(item, error, started))
            continue
        if isinstance(begun, ItemResult):
            record(begun)
            continue
        waiting.add(begun)
        if waiting.full:
            _round(waiting.largest(), record, watch)
    while waiting:
        _round(waiting.largest(), record, watch)


def open_data_sources(request: Request) -> Sources:
    """The data, found but not read, after all that can be said of a request without a checkpoint.

    Raises UsageError, DataError; the labelled data is looked for as well.
    """
    check_request(request)
    return Sources.from_request(request)


def make_folder(folder: Location) -> None:
    """Make a folder for outputs, and those that it lies in. Raises OutputError."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}). Choose another --output-dir.") from error


def inspect_item(item: CheckpointItem, request: Request, sources: Sources) -> ItemResult | StreamKey:
    """What came of an item before any pass (done before, nothing to do, failed), or what its pass will read.

    Looked at on the CPU, so that it needs no GPU: where the pass runs, memory may allow another batch size.
    """
    started = time.perf_counter()
    own = _own(item, request)
    remove_abandoned_folders(item.output.path.parent)
    try:
        begun = _begin(item, own, replace(own, device="cpu", precision="fp32"), sources, WalkCache())
        return begun if isinstance(begun, ItemResult) else _reading(begun.plan)
    except Exception as error:  # noqa: BLE001 - as above
        return _failed_result(item, error, started)


def _own(item: CheckpointItem, request: Request) -> Request:
    return replace(request, checkpoint=item.checkpoint, output=item.output)


def _reading(plan: Plan) -> StreamKey:
    return plan.input_spec, plan.batch_size, plan.device


@dataclass(frozen=True)
class _Prepared:
    item: CheckpointItem
    plan: Plan
    started: float
    replaced: str = ""  # what was wrong with an earlier output


def _begin(
    item: CheckpointItem, request: Request, run_as: Request, sources: Sources, walks: WalkCache
) -> ItemResult | _Prepared:
    """What was done before, or an item that is ready for its pass, which is prepared for ``run_as``."""
    started = time.perf_counter()
    earlier = find_earlier_output(item.output, request, item.in_manifest)
    if isinstance(earlier, EarlierOutput):
        return ItemResult(item, "done before", made=earlier, seconds=time.perf_counter() - started)
    make_folder(item.output.parent)
    stamp, why = (earlier.stamp, earlier.why) if isinstance(earlier, DamagedOutput) else (None, "")
    return _Prepared(item, prepare_reestimation(run_as, sources, walks=walks, replaces=stamp), started, why)


class _Waiting:
    """Prepared checkpoints by what they read; those of one group go through one stream."""

    def __init__(self) -> None:
        self._groups: dict[StreamKey, list[_Prepared]] = {}
        self._held, self._device = 0, "cpu"  # bytes of all models, and where they run

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, one: _Prepared) -> None:
        self._groups.setdefault(_reading(one.plan), []).append(one)
        self._held, self._device = self._held + _bytes(one.plan), one.plan.device

    @property
    def full(self) -> bool:
        """Whether the models take as much memory as leaves enough for running them."""
        held, device = self._held, self._device
        return held > _SHARE * (available_bytes() + held) or (device != "cpu" and held > _SHARE * free_bytes(device))

    def largest(self) -> list[_Prepared]:
        """The group with the most checkpoints, which then waits no more."""
        key = max(self._groups, key=lambda key: len(self._groups[key]))
        group = self._groups.pop(key)
        self._held -= sum(_bytes(one.plan) for one in group)
        return group


def _bytes(plan: Plan) -> int:
    model = plan.loaded_model.model
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _round(group: Sequence[_Prepared], record: Callable[[ItemResult], None], watch: ProgressCallback | None) -> None:
    """All of a group through one stream, after one look at the same first images."""
    stream, first = group[0].plan.stream, group[0].plan.look
    seen = 0

    def count(images: int) -> None:
        nonlocal seen
        seen += images
        if watch is not None:
            watch(len(group), seen, stream.count)

    read_together(stream, [partial(_finish, one, first, record) for one in group], count)


def _finish(one: _Prepared, first: BatchStream, record: Callable[[ItemResult], None], stream: BatchStream) -> None:
    try:
        outcome = execute_reestimation(replace(one.plan, stream=stream, look=first))
    except Exception as error:  # noqa: BLE001 - as above
        record(_failed_result(one.item, error, one.started))
    else:
        written = FileDigest(outcome.output_sha256, outcome.output_bytes)
        made = EarlierOutput(outcome.source_sha256, one.plan.request.settings_digest(), written)
        seconds = time.perf_counter() - one.started
        record(ItemResult(one.item, "done", outcome, made, seconds=seconds, replaced=one.replaced))


def _failed_result(item: CheckpointItem, error: Exception, started: float) -> ItemResult:
    status: Status = "nothing to do" if isinstance(error, NothingToDo) else "failed"
    return ItemResult(item, status, error=error, seconds=time.perf_counter() - started)


def _place(found: DiscoveredCheckpoint, output_dir: LocationLike | None) -> Location:
    return found.location if output_dir is None else Location.of(output_dir) / found.place
