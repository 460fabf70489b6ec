"""Which checkpoints of a folder run are corrected, and where the output of each goes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import UsageError
from ckpt_tools.jobs.earlier_output import EarlierOutput
from ckpt_tools.jobs.outputs import default_output_path
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.storage.discovery import DiscoveredCheckpoint
from ckpt_tools.storage.provenance import read_provenance_entry


@dataclass(frozen=True)
class CheckpointItem:
    """One checkpoint of many, and where its output goes.

    ``in_manifest`` is what a manifest says of that output, ``also_named`` are further paths to the
    checkpoint's file.
    """

    checkpoint: Location
    output: Location
    in_manifest: EarlierOutput | None = None
    also_named: tuple[Location, ...] = ()


def plan_items(
    checkpoints: Sequence[DiscoveredCheckpoint], output_dir: LocationLike | None
) -> tuple[CheckpointItem, ...]:
    """Decide where the output of each checkpoint goes.

    Outputs lie below ``output_dir`` as the checkpoints lie below the folder that was searched, or
    beside each checkpoint. Where two would share an output (``a.pt`` and ``a.pth``), or one would
    take the place of a checkpoint, the suffix is kept in its name. An earlier output beside its
    checkpoint is no checkpoint of its own, even if a pattern names it.

    Raises UsageError if a checkpoint would be replaced all the same.
    """
    outputs_beside = set()
    for checkpoint in checkpoints:
        output = default_output_path(checkpoint.location, "bn")
        outputs_beside |= {_absolute(output), _absolute(_name_with_suffix(output, checkpoint))}
    checkpoints = [
        checkpoint
        for checkpoint in checkpoints
        if _absolute(checkpoint.location) not in outputs_beside
        or read_provenance_entry(checkpoint.location) is None
    ]
    # What is left are checkpoints to correct: outputs are known by their place and their
    # provenance.
    outputs = {}
    for checkpoint in checkpoints:
        location = checkpoint.location
        if output_dir is not None:
            location = Location.of(output_dir) / checkpoint.place
        outputs[checkpoint] = default_output_path(location, "bn")
    # A longer name may clash with another output in turn, so this goes on until nothing changes.
    while renamed := {
        checkpoint: name
        for checkpoint in _clashing_checkpoints(outputs)
        if (name := _name_with_suffix(outputs[checkpoint], checkpoint)) != outputs[checkpoint]
    }:
        outputs |= renamed
    for checkpoint in _clashing_checkpoints(outputs):
        raise UsageError(
            f"{outputs[checkpoint]}: expected a name for one file alone. "
            f"Rename {checkpoint.location}, or give --output-dir."
        )
    return tuple(
        CheckpointItem(checkpoint.location, output, also_named=checkpoint.also_named)
        for checkpoint, output in outputs.items()
    )


def _clashing_checkpoints(
    outputs: Mapping[DiscoveredCheckpoint, Location],
) -> list[DiscoveredCheckpoint]:
    """Those whose output has the name of another output, or of a checkpoint."""
    locations = list(outputs.values())
    for checkpoint in outputs:
        locations += [checkpoint.location, *checkpoint.also_named]
    uses = Counter(map(_absolute, locations))
    return [checkpoint for checkpoint, output in outputs.items() if uses[_absolute(output)] > 1]


def _absolute(location: Location) -> str:
    return os.path.abspath(location.path)  # noqa: PTH100 - without .., and without following links


def _name_with_suffix(output: Location, checkpoint: DiscoveredCheckpoint) -> Location:
    """``a.pt.bn.safetensors`` for ``a.bn.safetensors``."""
    return output.parent / f"{Path(_absolute(checkpoint.location)).name}.bn.safetensors"
