"""Recognises the output of an earlier run, and whether it is still what was written.

An output may also be what is to be corrected. That would be done twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import NothingToDo, OutputError
from ckpt_tools.jobs.request import Request
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.plain_text import one_line
from ckpt_tools.storage.files.stamps import FileStamp, stamp_file
from ckpt_tools.storage.output.integrity import FileDigest, measure_output
from ckpt_tools.storage.provenance import Correction, read_correction, read_provenance_entry, read_seal
from ckpt_tools.storage.reading import checkpoint_sha256

__all__ = [
    "DamagedOutput",
    "EarlierOutput",
    "describe_correction",
    "find_earlier_output",
    "refuse_second_correction",
]


@dataclass(frozen=True)
class EarlierOutput:
    """What an output was made of, and with which settings; ``file`` is its digest, where that is
    known.
    """

    source_sha256: str
    settings: str
    file: FileDigest | None = None


@dataclass(frozen=True)
class DamagedOutput:
    """An output of an earlier run that is no longer what was written.

    ``why`` says what differs, ``stamp`` identifies the file that was looked at.
    """

    why: str
    stamp: FileStamp


def find_earlier_output(
    output: LocationLike, request: Request, in_manifest: EarlierOutput | None
) -> EarlierOutput | DamagedOutput | None:
    """The output of an earlier run with the same checkpoint and settings, whole or damaged; else
    None.

    An output counts as whole if its data has the SHA-256 that the output itself holds, and its file
    the one that the manifest holds, if the manifest tells of this output. The header of a damaged
    one shows that it is this tool's own, which is why it may be replaced. Any other file that has
    the output's name is left to --overwrite.

    Raises OutputError for an output of version 0.1.0, which holds no digests; CheckpointError,
    RemoteError.
    """
    entry = None if request.overwrite else read_provenance_entry(output)
    if entry is None or entry.get("settings") != request.settings_digest():
        return None
    expected = EarlierOutput(checkpoint_sha256(request.checkpoint), request.settings_digest())
    if entry.get("source_sha256") != expected.source_sha256:
        return None
    seal = read_seal(entry)
    if seal is None:
        raise OutputError(
            f"{output}: expected an output that holds its own SHA-256, found one of version "
            f"{entry['version']}, which cannot prove to be whole. Pass --overwrite to make it "
            "again, or give another --output-dir."
        )
    try:
        stamp = stamp_file(Location.of(output).path)
        measured = measure_output(output)
    except OSError as error:
        raise OutputError(
            f"{output}: expected to compare it with what was written, found that it cannot be read "
            f"({error.strerror}). Check its permissions, or pass --overwrite to make it again."
        ) from error
    # A record of an output that was made of other bytes, or with other settings, says nothing of
    # this one.
    recorded_file = None
    if in_manifest is not None and replace(in_manifest, file=None) == expected:
        recorded_file = in_manifest.file
    why = measured.describe_damage(seal, recorded_file)
    return DamagedOutput(why, stamp) if why else replace(expected, file=measured.file)


def refuse_second_correction(checkpoint: Checkpoint) -> None:
    """Raise NothingToDo if the checkpoint is an output of ``bn-reestimate``, or a conversion of one.

    A second correction would take the share of dropout out of variances that no longer have it.
    """
    correction = read_correction(checkpoint)
    if correction is not None:
        raise NothingToDo(
            f"{checkpoint.shown_path}: nothing to do, since it is a corrected file: "
            f"{describe_correction(correction)}. Give the file that it was made from, or pass --again "
            "to correct this one all the same."
        )


def describe_correction(correction: Correction) -> str:
    """Return in words what ``bn-reestimate`` did: the layers, the estimator and the source."""
    what = "variances and means" if correction.statistics == "mean+variance" else "variances"
    layers = "1 layer" if correction.layers == 1 else f"{correction.layers:,} layers"
    source = f" of {one_line(correction.source)}" if correction.source else ""
    return (
        f"bn-reestimate {one_line(correction.version)} has rewritten the running {what} of "
        f"{layers}{source} (estimator {one_line(correction.estimator)})"
    )
