"""``ckpt-fix bn-reestimate`` on many checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Never

import click

from ckpt_tools.cli import github
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.options import combine_options, pack, path
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout
from ckpt_tools.cli.progress import progress_bar, write_above_bars
from ckpt_tools.errors import CheckFailed, CkptToolsError, NothingToDo, UsageError
from ckpt_tools.location import Location
from ckpt_tools.machine.heap import keep_freed_memory
from ckpt_tools.paths import matching_paths
from ckpt_tools.plain_text import one_line
from ckpt_tools.redaction import without_secrets

if TYPE_CHECKING:
    from tqdm import tqdm  # noqa: TID251 - a type

    from ckpt_tools.jobs.many.engine import Engine, Record
    from ckpt_tools.jobs.many.folder_items import CheckpointItem
    from ckpt_tools.jobs.request import Request
    from ckpt_tools.report.records.manifest import Manifest

_MANIFEST = "ckpt-fix.jsonl"


@dataclass(frozen=True)
class FolderOptions:
    """Which of many checkpoints are meant, where their outputs go, and what works on them."""

    output_dir: Location | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    manifest: Location | None = None
    engine: str = "local"
    ray_address: str | None = None
    ray_cpus: int | None = None

    def make_engine(self) -> Engine:
        """The engine that works on the checkpoints. Raises UsageError, ClusterError."""
        if self.engine == "ray":
            from ckpt_tools.jobs.many.ray_cluster import require_ray
            from ckpt_tools.jobs.many.ray_engine import RayEngine

            require_ray(self.ray_address)  # before anything is written
            return RayEngine(self.ray_address, self.ray_cpus)
        from ckpt_tools.jobs.many.engine import LocalEngine

        if self.ray_address or self.ray_cpus:
            raise UsageError("--ray-address and --ray-cpus describe a Ray cluster. Give --engine ray, too.")
        return LocalEngine()


options = combine_options(
    pack("folder", __name__, "FolderOptions"),
    click.option(
        "--output-dir",
        type=path,
        help="For several checkpoints: where outputs go, laid out as the checkpoints are. Default: "
        "beside each.",
    ),
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Of a folder, only these names; repeatable.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="GLOB", help="Of a folder, not these names; repeatable."
    ),
    click.option(
        "--manifest",
        type=path,
        help=f"For several checkpoints: one line of JSON for each. Default: {_MANIFEST} in "
        "--output-dir, else in the folder that was given.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default=FolderOptions.engine,
        show_default=True,
        help="What works on the checkpoints: this process, or the workers of a Ray cluster "
        "(extra `ray`), on which ckpt-tools is installed and all paths mean the same.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Of the cluster's head; auto: one that runs on this machine. Default: RAY_ADDRESS, "
        "else Ray is started on this machine for the run.",
    ),
    click.option(
        "--ray-cpus",
        type=click.IntRange(min=1),
        help="CPUs, and threads, of a Ray task. Default: 8, or what the smallest node has for each "
        "of its GPUs.",
    ),
)


def is_folder_run(paths: Sequence[Location], folder: FolderOptions) -> bool:
    """Whether a run has, or may have, more than one checkpoint."""
    from ckpt_tools.storage.discovery import is_one_checkpoint

    return len(paths) > 1 or folder != FolderOptions() or not is_one_checkpoint(paths[0])


def reestimate_checkpoints(
    paths: Sequence[Location],
    request: Request,
    folder: FolderOptions,
    reports: Sequence[Location],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Re-estimate all checkpoints in ``paths``. Raises CkptToolsError at the end if any failed."""
    from ckpt_tools.jobs.many.folder_items import plan_items
    from ckpt_tools.jobs.many.folder_run import make_folder
    from ckpt_tools.report.records.manifest import Manifest, check_manifest
    from ckpt_tools.report.report_files import check_reports, write_report
    from ckpt_tools.report.text.folder_text import folder_text
    from ckpt_tools.storage.discovery import find_checkpoints

    engine = folder.make_engine()
    # torchrun sets this to the number of its processes.
    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        raise UsageError(
            "torchrun shares one checkpoint among processes, not several. Run a folder in one process."
        )
    if request.dry_run:
        raise UsageError("--dry-run looks at one checkpoint, but there may be several. Name a single one.")
    if request.output is not None:
        raise UsageError("--output names one file, but there may be several checkpoints. Give --output-dir.")
    # Data and earlier outputs may lie in the folders that are searched, and are no checkpoints to
    # correct.
    outside = _data_files(request)
    if folder.output_dir is not None:
        outside.append(folder.output_dir)
    checkpoints = find_checkpoints(paths, folder.include, folder.exclude, outside=outside)
    items = plan_items(checkpoints, folder.output_dir)
    manifest_location = folder.manifest or _default_manifest(paths, folder.output_dir)
    inputs = input_files(request, [item.checkpoint for item in items])
    files = (*inputs, *(item.output for item in items))
    check_manifest(manifest_location, files)  # all of this before anything is written
    check_reports(reports, (manifest_location, *files), new_folder=folder.output_dir)
    if folder.output_dir is not None:
        make_folder(folder.output_dir)  # reports may go into it
    manifest = Manifest(manifest_location)
    try:
        records = _run_engine(engine, items, request, manifest, quiet=quiet)
    finally:
        manifest.publish()
    for report in reports:
        write_report(report, records)
    if as_json:
        print_json({"checkpoints": records})
    else:
        print_result(folder_text(records, manifest.location))
    github.report_folder_run(records)
    _raise_failures(records, manifest.location)


def _run_engine(
    engine: Engine,
    items: Sequence[CheckpointItem],
    request: Request,
    manifest: Manifest,
    *,
    quiet: bool,
) -> list[Record]:
    """Run the engine on all items, and write each record into the manifest as it comes.

    Returns the records in the order of the items. An engine hands them over in the order of their
    ends.
    """
    from ckpt_tools.report.records.manifest import make_record

    records: list[Record] = []
    # Records hold no secrets, so the names of the items are compared without them.
    numbers = {without_secrets(str(item.checkpoint)): number for number, item in enumerate(items)}

    def add_record(record: Record) -> None:
        record = manifest.add_record(record)
        bars.count_checkpoint(record)
        records.append(record)
        _remove_copies(items[numbers[record["checkpoint"]]])

    items = [replace(item, in_manifest=manifest.recorded_output(item.output)) for item in items]
    with (
        _FolderBars(len(items), hidden=quiet) as bars,
        redirect_foreign_stdout(),
        keep_freed_memory(),
        interrupt_on_sigterm(),
    ):
        engine.run(items, request, make_record, add_record, bars.show_images)
    return sorted(records, key=lambda record: numbers[record["checkpoint"]])


def _data_files(request: Request) -> list[Location]:
    """The files and folders that hold the data. They lie beside the checkpoints now and then."""
    from ckpt_tools.data.shards.shard_names import expand_braces

    specs = [spec for spec in (request.data, request.eval_data) if spec is not None]
    locations = list(map(Location.of, specs))
    for pattern in [str(location.path) for location in locations]:
        with contextlib.suppress(OverflowError):  # too many to be files of this machine
            for name in expand_braces(pattern):
                locations += map(Location, matching_paths(name))
    return locations


def input_files(request: Request, checkpoints: Sequence[Location]) -> tuple[Location, ...]:
    """The files that a run reads: those of its checkpoints, its data, labels and class map."""
    from ckpt_tools.storage.files.input_files import files_of_checkpoint

    files = [file for checkpoint in checkpoints for file in files_of_checkpoint(checkpoint)]
    evaluation = request.evaluation
    return (*files, *_data_files(request), *filter(None, [evaluation.class_map, evaluation.labels]))


def _remove_copies(item: CheckpointItem) -> None:
    """Remove the copies of remote files, so that a folder may be larger than the disk."""
    from ckpt_tools.storage.files.fetching import remove_checkpoint_copies

    for location in (item.checkpoint, item.output):
        remove_checkpoint_copies(location)


def _raise_failures(records: Sequence[Record], manifest: Location) -> None:
    """Raise CheckFailed if only checks failed, CkptToolsError for any other failure.

    Raises NothingToDo if there was nothing to do in any checkpoint.
    """
    failures = [record for record in records if record["status"] == "failed"]
    if failures:
        only_checks = {record["exit_code"] for record in failures} == {CheckFailed.exit_code}
        kind = CheckFailed if only_checks else CkptToolsError
        raise kind(f"{len(failures)} of {len(records)} checkpoints failed; {manifest} says why.")
    if {record["status"] for record in records} == {"nothing to do"}:
        raise NothingToDo(f"nothing to do in any of {len(records)} checkpoints; {manifest} says why.")


def _default_manifest(paths: Sequence[Location], output_dir: Location | None) -> Location:
    """In the folder of the outputs; without one in the folder that was given, else in the current
    one.
    """
    if output_dir is not None:
        return output_dir / _MANIFEST
    if len(paths) == 1 and paths[0].path.is_dir() and paths[0].may_write_beside():
        return paths[0] / _MANIFEST
    return Location(Path(_MANIFEST))


class _FolderBars:
    """Two bars on stderr: checkpoints that have come to an end, and the images of the running
    group.
    """

    def __init__(self, total: int, *, hidden: bool) -> None:
        self._hidden = hidden
        self._checkpoints = progress_bar("checkpoints", total, hidden=hidden, position=0)
        self._images: tqdm[Never] | None = None

    def __enter__(self) -> _FolderBars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._images is not None:
            self._images.close()
        self._checkpoints.close()

    def count_checkpoint(self, record: Record) -> None:
        """Count a checkpoint; a failure is shown at once."""
        if record.get("error") and not self._hidden:
            write_above_bars(f"{one_line(record['checkpoint'])}: {record['status']}")
        self._checkpoints.update()

    def show_images(self, models: int, images: int, total: int | None) -> None:
        """Show how far the passes of a group are; a second pass over the data counts on."""
        if self._images is None or images < self._images.n:
            if self._images is not None:
                self._images.close()
            name = f"images × {models}"
            self._images = progress_bar(name, total, unit="img", hidden=self._hidden, position=1)
        self._images.update(images - self._images.n)
