"""``ckpt-fix bn-reestimate`` on many checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never

import click

from ckpt_tools.cli import github
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.options import combine_options, path, redirect_foreign_stdout
from ckpt_tools.cli.printing import print_json, print_result
from ckpt_tools.cli.progress import progress_bar, write_above_bars
from ckpt_tools.errors import CheckFailed, CkptToolsError, NothingToDo, UsageError
from ckpt_tools.location import Location
from ckpt_tools.paths import matching_paths
from ckpt_tools.plain_text import one_line
from ckpt_tools.redaction import without_secrets

if TYPE_CHECKING:
    from tqdm import tqdm  # noqa: TID251 - a type

    from ckpt_tools.jobs.many.engine import Engine, Record
    from ckpt_tools.jobs.many.folder_run import CheckpointItem
    from ckpt_tools.jobs.request import Request

_MANIFEST = "ckpt-fix.jsonl"

options = combine_options(
    click.option(
        "--output-dir",
        type=path,
        help="For several checkpoints: where outputs go, laid out as the checkpoints are. Default: beside each.",
    ),
    click.option("--include", multiple=True, metavar="GLOB", help="Of a folder, only these names; repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Of a folder, not these names; repeatable."),
    click.option(
        "--manifest",
        type=path,
        help=f"For several checkpoints: one line of JSON for each. Default: {_MANIFEST} in --output-dir, else in the "
        "folder that was given.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="What works on the checkpoints: this process, or the workers of a Ray cluster (extra `ray`), on which "
        "ckpt-tools is installed and all paths mean the same.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Of the cluster's head; auto: one that runs on this machine. Default: RAY_ADDRESS, else Ray is started "
        "on this machine for the run.",
    ),
    click.option(
        "--ray-cpus",
        type=click.IntRange(min=1),
        help="CPUs, and threads, of a Ray task. Default: 8, or what the smallest node has for each of its GPUs.",
    ),
)


@dataclass(frozen=True)
class FolderOptions:
    """Which of many checkpoints are meant, where their outputs go, and what works on them (None: this process)."""

    output_dir: Location | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    manifest: Location | None
    engine: Engine | None


def pop_folder_options(said: dict[str, Any]) -> FolderOptions:
    """Take the values of the options above out of a command's arguments."""
    names = ("output_dir", "include", "exclude", "manifest")
    return FolderOptions(**{name: said.pop(name) for name in names}, engine=_pop_engine(said))


def _pop_engine(said: dict[str, Any]) -> Engine | None:
    engine, address, cpus = (said.pop(name) for name in ("engine", "ray_address", "ray_cpus"))
    if engine == "ray":
        from ckpt_tools.jobs.many.ray_cluster import require_ray
        from ckpt_tools.jobs.many.ray_engine import RayEngine

        require_ray(address)  # before anything is written
        return RayEngine(address, cpus)
    if address or cpus:
        raise UsageError("--ray-address and --ray-cpus describe a Ray cluster. Give --engine ray, too.")
    return None


def is_folder_run(paths: Sequence[Location], place: FolderOptions) -> bool:
    """Whether a run has, or may have, more than one checkpoint."""
    from ckpt_tools.storage.discovery import is_one_checkpoint

    return len(paths) > 1 or any(vars(place).values()) or not is_one_checkpoint(paths[0])


def reestimate_checkpoints(
    paths: Sequence[Location],
    request: Request,
    place: FolderOptions,
    reports: Sequence[Location],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Re-estimate all checkpoints in ``paths``. Raises CkptToolsError at the end if any failed."""
    from ckpt_tools.jobs.many.engine import LocalEngine
    from ckpt_tools.jobs.many.folder_run import make_folder, plan_items
    from ckpt_tools.report.records.manifest import Manifest, check_manifest, make_record
    from ckpt_tools.report.report_files import check_reports, write_report
    from ckpt_tools.report.text.folder_text import folder_text
    from ckpt_tools.storage.discovery import find_checkpoints

    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        raise UsageError("torchrun shares one checkpoint among processes, not several. Run a folder in one process.")
    if request.output is not None:
        raise UsageError("--output names one file, but there may be several checkpoints. Give --output-dir.")
    outside = [*([place.output_dir] if place.output_dir else []), *_data_files(request)]
    found = find_checkpoints(paths, place.include, place.exclude, outside=outside)
    items = plan_items(found, place.output_dir)
    manifest = place.manifest or _beside(paths, place.output_dir)
    files = (*input_files(request, [item.checkpoint for item in items]), *(item.output for item in items))
    check_manifest(manifest, files)  # all of this before anything is written
    check_reports(reports, (manifest, *files), new_folder=place.output_dir)
    if place.output_dir is not None:
        make_folder(place.output_dir)  # reports may go into it
    records: list[Any] = []
    names = {without_secrets(str(item.checkpoint)): number for number, item in enumerate(items)}

    def record(made: Record) -> None:
        records.append(bars.count_checkpoint(log.add_record(made)))
        _release(items[names[made["checkpoint"]]])

    engine = place.engine or LocalEngine()
    with contextlib.ExitStack() as after:
        log = Manifest(manifest)
        after.callback(log.publish)
        items = tuple(replace(item, in_manifest=log.recorded_output(item.output)) for item in items)
        with _Bars(len(items), hidden=quiet) as bars, redirect_foreign_stdout(), interrupt_on_sigterm():
            engine.run(items, request, make_record, record, bars.show_images)
    records.sort(key=lambda record: names[record["checkpoint"]])
    for report in reports:
        write_report(report, records)
    if as_json:
        print_json({"checkpoints": records})
    else:
        print_result(folder_text(records, log.location))
    github.report_folder_run(records)
    _answer(records, log.location)


def _data_files(request: Request) -> list[Location]:
    """The files and folders that hold the data, which lie beside the checkpoints now and then."""
    from ckpt_tools.data.shards.shard_names import expand_braces

    specs = [spec for spec in (request.data, request.eval_data) if spec is not None]
    locations = list(map(Location.of, specs))
    for pattern in [str(location.path) for location in locations]:
        with contextlib.suppress(OverflowError):  # too many to be files here
            for name in expand_braces(pattern):
                locations += map(Location, matching_paths(name))
    return locations


def input_files(request: Request, checkpoints: Sequence[Location]) -> tuple[Location, ...]:
    """The files that a run reads: those of its checkpoints, its data and its class map."""
    from ckpt_tools.storage.files.input_files import files_of_checkpoint

    files = [file for checkpoint in checkpoints for file in files_of_checkpoint(checkpoint)]
    return (*files, *_data_files(request), *filter(None, [request.class_map]))


def _release(item: CheckpointItem) -> None:
    """Remove the copies of remote files, so that a folder may be larger than the disk."""
    from ckpt_tools.storage.files.fetching import remove_checkpoint_copies

    for location in (item.checkpoint, item.output):
        remove_checkpoint_copies(location)


def _answer(records: Sequence[Record], manifest: Location) -> None:
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        refused = {record["exit_code"] for record in failed} == {CheckFailed.exit_code}
        kind = CheckFailed if refused else CkptToolsError
        raise kind(f"{len(failed)} of {len(records)} checkpoints failed; {manifest} says why.")
    if {record["status"] for record in records} == {"nothing to do"}:
        raise NothingToDo(f"nothing to do in any of {len(records)} checkpoints; {manifest} says why.")


def _beside(paths: Sequence[Location], output_dir: Location | None) -> Location:
    """In the folder of the outputs; without one in the folder that was given, else in the current one."""
    if output_dir is not None:
        return output_dir / _MANIFEST
    if len(paths) == 1 and paths[0].path.is_dir() and paths[0].may_write_beside():
        return paths[0] / _MANIFEST
    return Location(Path(_MANIFEST))


class _Bars:
    """Two bars on stderr: checkpoints that have come to an end, and the images of the round under way."""

    def __init__(self, total: int, *, hidden: bool) -> None:
        self._hidden = hidden
        self._checkpoints: tqdm[Never] = progress_bar("checkpoints", total, unit="", position=0, disable=hidden)
        self._images: tqdm[Never] | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._images is not None:
            self._images.close()
        self._checkpoints.close()

    def count_checkpoint(self, record: Any) -> Any:
        """Count a checkpoint; what went wrong is said at once."""
        if record.get("error") and not self._hidden:
            write_above_bars(f"{one_line(record['checkpoint'])}: {record['status']}")
        self._checkpoints.update()
        return record

    def show_images(self, models: int, seen: int, total: int | None) -> None:
        """Show how far a round is; a second pass over the data counts on."""
        if self._images is None or seen < self._images.n:
            if self._images is not None:
                self._images.close()
            self._images = progress_bar(f"images × {models}", total, unit="img", position=1, disable=self._hidden)
        self._images.update(seen - self._images.n)
