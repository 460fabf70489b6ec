"""The provenance that an output file records, and the digests that prove it complete.

Both stand in one entry of its safetensors metadata. An output cannot hold the digest of all its
bytes, as the digest is among them. So it holds two: ``data_sha256`` of the ``data_bytes`` bytes
behind the header, and ``header_sha256`` of the header itself, in which 64 zeros stand for this
digest while it is computed. The second tells an output from a file into which another program has
copied an output's metadata: such a file is a checkpoint like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ckpt_tools.contract import Checkpoint
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.fetching import fetch_header
from ckpt_tools.storage.formats.safetensors_file import read_header_bytes
from ckpt_tools.version import VERSION

__all__ = [
    "BLANK_DIGEST",
    "Correction",
    "Seal",
    "add_seal",
    "checkpoint_provenance",
    "output_metadata",
    "read_correction",
    "read_provenance_entry",
    "read_seal",
    "recorded_correction",
    "seal_header",
]

BLANK_DIGEST = "0" * 64  # stands for a SHA-256 that is not known yet
_ENTRY = "ckpt_tools"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSEALED_VERSION = "0.1.0"  # the only version that wrote outputs without digests
# An output that is made of an output holds the entry of its source, too, and so on.
_MAX_LEVELS = 100
_SOURCE = ("source", "source_sha256", "weights", "prefix")


@dataclass(frozen=True)
class Seal:
    """The SHA-256 and size of an output's data, and the SHA-256 of its header."""

    data_sha256: str
    data_bytes: int
    header_sha256: str = BLANK_DIGEST


_SEAL = tuple(Seal.__dataclass_fields__)


@dataclass(frozen=True)
class Correction:
    """What ``bn-reestimate`` did to a checkpoint, as the output itself says.

    ``layers`` is the number of BN layers that it rewrote, ``source`` the name of the file that it
    read, without the folder.
    """

    estimator: str
    statistics: str
    layers: int
    source: str
    source_sha256: str
    version: str


def checkpoint_provenance(checkpoint: Checkpoint) -> dict[str, object] | None:
    """Return what a checkpoint records about its origin; None for one that records nothing.

    ``source_sha256``, ``weights`` and ``prefix`` tell which entry of which file was taken, if one
    was. ``earlier`` is the provenance of the source, if that was an output as well. The digests of
    the file itself are left out.
    """
    entry = _parse_entry(checkpoint.metadata)
    return None if entry is None else _without_seal(entry)


def recorded_correction(checkpoint: Checkpoint) -> Mapping[str, object]:
    """Return what a checkpoint's metadata say about its correction by ``bn-reestimate``; {} if nothing.

    A conversion of a corrected file is a corrected file, too. Any program may have written these
    words, so they are worth as much as all that a file says of itself.
    """
    entry: object = _parse_entry(checkpoint.metadata)
    for _ in range(_MAX_LEVELS):
        if not isinstance(entry, Mapping):
            return {}
        if isinstance(entry.get("estimator"), str):
            return entry
        if entry.get("expect") != "nothing":
            return {}
        entry = entry.get("earlier")
    return {}


def read_correction(checkpoint: Checkpoint) -> Correction | None:
    """Return the correction of a checkpoint whose file is, as it stands, an output of this tool.

    A file into which another program has copied an output's metadata is none: a training may have
    gone on since. Raises CheckpointError if the file is gone.
    """
    entry = recorded_correction(checkpoint)
    if not entry:
        return None
    files = find_checkpoint_files(checkpoint.path).files
    if not any(read_provenance_entry(file) for file in files):
        return None
    rewritten = entry.get("rewritten")
    return Correction(
        estimator=str(entry["estimator"]),
        statistics=str(entry.get("statistics", "variance")),
        layers=len(rewritten) if isinstance(rewritten, list) else 0,
        source=str(entry.get("source", "")),
        source_sha256=str(entry.get("source_sha256", "")),
        version=str(entry.get("version", "")),
    )


def read_provenance_entry(place: LocationLike) -> dict[str, object] | None:
    """Return the entry of a safetensors file that this tool wrote; None for any other file.

    The entry must have the structure that this tool writes, and the header must have the very bytes
    that it wrote. Nothing but the header is read, also of a remote file. Raises RemoteError.
    """
    location = Location.of(place)
    path = location.path
    try:
        if not path.exists():
            fetch_header(location)
        # Opening a pipe would wait for somebody who writes into it.
        if not path.is_file():
            return None
        text = read_header_bytes(path)
        metadata = json.loads(text).get("__metadata__")
    except (OSError, ValueError, AttributeError, RecursionError, MemoryError):
        return None
    entry = _parse_own_entry(metadata) if isinstance(metadata, dict) else None
    if entry is None:
        return None
    seal = read_seal(entry)
    return entry if seal is None or _hash_header(text, seal) == seal.header_sha256 else None


def _hash_header(text: bytes, seal: Seal) -> str:
    """Return the SHA-256 of a header with its padding, in which 64 zeros stand for this digest."""
    return hashlib.sha256(text.replace(seal.header_sha256.encode(), BLANK_DIGEST.encode())).hexdigest()


def read_seal(entry: Mapping[str, Any]) -> Seal | None:
    """Return the seal in an entry that ``read_provenance_entry`` has returned.

    This is None for an output of version 0.1.0, which has no seal.
    """
    return Seal(**{name: entry[name] for name in _SEAL}) if "header_sha256" in entry else None


def seal_header(
    make_header: Callable[[Mapping[str, str]], bytes],
    metadata: Mapping[str, str],
    data_sha256: str,
    data_bytes: int,
) -> tuple[bytes, dict[str, str]]:
    """Return the sealed first bytes of an output, and the metadata in them.

    ``make_header`` makes such bytes from metadata; they begin with the header's length, which has
    eight bytes.
    """
    blank = make_header(add_seal(metadata, Seal(data_sha256, data_bytes)))
    seal = Seal(data_sha256, data_bytes, hashlib.sha256(blank[8:]).hexdigest())
    sealed_metadata = add_seal(metadata, seal)
    return make_header(sealed_metadata), sealed_metadata


def add_seal(metadata: Mapping[str, str], seal: Seal) -> dict[str, str]:
    """Return the metadata with a seal in this tool's entry, if they have that entry."""
    entry = _parse_entry(metadata)
    if entry is None:
        return dict(metadata)
    return {**metadata, _ENTRY: json.dumps({**entry, **asdict(seal)}, ensure_ascii=False)}


def output_metadata(
    checkpoint: Checkpoint | None, provenance: Mapping[str, object], source_sha256: str = ""
) -> dict[str, str]:
    """Return the metadata of an output.

    They are all of the source's, ``format: pt``, and one entry with the provenance. Without a
    ``checkpoint`` the output has no source, and its provenance names none.
    """
    entry = {**provenance, "version": VERSION}
    if checkpoint is not None:
        entry |= {
            # The folder could tell about its owner and is left out. A name may have bytes that are
            # no UTF-8, which a header must be.
            "source": os.fsencode(checkpoint.path.name).decode(errors="replace"),
            "source_sha256": source_sha256,
            "weights": checkpoint.weights,
            "prefix": checkpoint.prefix,
        }
        earlier = _parse_own_entry(checkpoint.metadata)
        if earlier is not None and _is_shallow(earlier, _MAX_LEVELS - 1):
            entry["earlier"] = _without_seal(earlier)
    # JSON knows neither NaN nor infinity, which become null.
    clean = json.loads(json.dumps(entry, default=str), parse_constant=lambda _: None)
    source_metadata = {} if checkpoint is None else checkpoint.metadata
    return {**source_metadata, "format": "pt", _ENTRY: json.dumps(clean, ensure_ascii=False)}


def _parse_entry(metadata: Mapping[str, str]) -> dict[str, object] | None:
    """Return the JSON object in this tool's entry, which any program may have written."""
    try:
        entry = json.loads(metadata.get(_ENTRY, ""))
    except (ValueError, TypeError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _without_seal(entry: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in entry.items() if name not in _SEAL}


def _parse_own_entry(metadata: Mapping[str, str]) -> dict[str, object] | None:
    """Return the entry if it has the structure that this tool writes; None otherwise."""
    entry = _parse_entry(metadata)
    if entry is None or not isinstance(entry.get("version"), str) or not _is_shallow(entry):
        return None
    if not isinstance(entry.get("settings", ""), str) or not _names_source(entry):
        return None
    if any(name in entry for name in _SEAL):
        return entry if _has_seal(entry) else None
    return entry if _is_unsealed_output(entry) else None


def _names_source(entry: Mapping[str, object]) -> bool:
    """Return whether an entry has all values about a source in the right types, or none."""
    present = [name for name in _SOURCE if name in entry]
    if not present:
        return True
    all_texts = all(isinstance(entry.get(name), str) for name in _SOURCE)
    return all_texts and _is_digest(entry["source_sha256"])


def _has_seal(entry: Mapping[str, object]) -> bool:
    size = entry.get("data_bytes")
    digests = _is_digest(entry.get("data_sha256")) and _is_digest(entry.get("header_sha256"))
    # True and False are integers, too.
    return digests and isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _is_unsealed_output(entry: Mapping[str, object]) -> bool:
    """Return whether version 0.1.0 can have written an entry.

    It has a source, or it is that of a network which ``init-rewrite`` initialised without one.
    """
    if entry["version"] != _UNSEALED_VERSION:
        return False
    return "source" in entry or (entry.get("expect") == "init" and isinstance(entry.get("scheme"), str))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_shallow(value: object, levels: int = _MAX_LEVELS) -> bool:
    """Return whether plain data is nested no deeper than an entry of this tool.

    Data that is much deeper cannot be written as JSON again.
    """
    level = [value]
    for _ in range(levels):
        level = [item for container in level for item in _children(container)]
        if not level:
            return True
    return False


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
