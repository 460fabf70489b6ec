"""Distributed checkpoints: folders that torch.distributed.checkpoint writes.

Only the metadata and recorded values are read at first. Tensors are stand-ins on the meta device
until somebody asks for them, so that optimizer states, which can be twice the size of the model,
stay on the disk.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.paths import path_below, require_below
from ckpt_tools.storage.contents.state_dict_search import is_trainer_state
from ckpt_tools.storage.dcp.assembly import assemble_tensor
from ckpt_tools.storage.dcp.dcp_metadata import (
    DistributedMetadata,
    ShardPiece,
    TensorEntry,
    parse_distributed_metadata,
)
from ckpt_tools.storage.formats.pickles import load_pickle, load_stream

__all__ = ["METADATA_NAME", "SHARD_SUFFIX", "DistributedCheckpoint", "load_distributed"]

METADATA_NAME = ".metadata"
SHARD_SUFFIX = ".distcp"
_TRAINER = "meta.pt"  # where Lightning keeps what it saves beside the weights


@dataclass(frozen=True)
class DistributedCheckpoint:
    """The content of a folder.

    ``root`` nests recorded values and stand-ins of tensors as they were saved. ``shards`` are the
    paths of the shards, by the names that the metadata has for them. ``stand_ins`` are the entries
    of the tensors, by the identities of their stand-ins in ``root``.
    """

    folder: Path
    shards: Mapping[str, Path]
    root: Mapping[str, object]
    stand_ins: Mapping[int, TensorEntry]

    def load(self, state: Mapping[str, object]) -> dict[str, object]:
        """Return a mapping of ``root`` with its tensors read from the shards.

        Raises CheckpointError.
        """
        return {key: self._load_value(value) for key, value in state.items()}

    def _load_value(self, value: object) -> object:
        entry = self.stand_ins.get(id(value))
        if entry is None:
            return value
        parts = {start: _load_part(self.folder, self.shards, entry, start) for start in entry.pieces}
        return assemble_tensor(self.folder, entry.name, entry.size, parts)


def load_distributed(folder: Path) -> DistributedCheckpoint:
    """Read the metadata and the recorded values of a distributed checkpoint.

    Raises CheckpointError.
    """
    path = require_below(folder, folder / METADATA_NAME, origin=folder)
    try:
        metadata = parse_distributed_metadata(load_pickle(path))
    except (ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: expected the metadata of torch.distributed.checkpoint, found {error}. Fetch "
            "the folder again."
        ) from error
    shards = _find_shards(folder, metadata)
    stand_ins: dict[int, TensorEntry] = {}
    leaves: dict[tuple[str | int, ...], object] = {}
    for entry in metadata.tensors:
        # ``leaves``, and later ``root``, keep the stand-in alive, so that its identity stays its
        # own.
        stand_in = torch.empty(entry.size, dtype=entry.dtype, device="meta")
        stand_ins[id(stand_in)] = entry
        leaves[metadata.paths[entry.name]] = stand_in
    for name, piece in metadata.words.items():
        place = metadata.paths[name]
        # Settings of optimizers are hundreds of tiny pickles that nobody asks for.
        if not any(isinstance(part, str) and is_trainer_state(part) for part in place):
            leaves[place] = _read_piece(shards[piece.file], name, piece)
    root = _nest_entries(path, {place: leaves[place] for place in metadata.paths.values() if place in leaves})
    # Where two names are equal, what torch.distributed.checkpoint saved counts.
    return DistributedCheckpoint(folder, shards, {**_load_trainer_values(folder), **root}, stand_ins)


def _find_shards(folder: Path, metadata: DistributedMetadata) -> dict[str, Path]:
    """Return the shards that the metadata names, by their names.

    Raises CheckpointError if one is missing, lies elsewhere, or has fewer bytes than the metadata
    claims.
    """
    pieces = [
        *metadata.words.values(),
        *(piece for entry in metadata.tensors for piece in entry.pieces.values()),
    ]
    shards, sizes = {}, {}
    for name in sorted({piece.file for piece in pieces}):
        # The names come from a file of unknown origin; path_below refuses those that lead
        # elsewhere.
        file = shards[name] = path_below(folder, name, origin=folder / METADATA_NAME)
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: expected the shard {name}, which {METADATA_NAME} names, found no such "
                "file. Fetch the whole folder again: every rank writes shards of its own."
            )
        sizes[name] = file.stat().st_size
    for piece in pieces:
        if piece.offset + piece.length > sizes[piece.file]:
            raise CheckpointError(
                f"{folder / piece.file}: expected at least {piece.offset + piece.length:,} bytes, "
                f"found {sizes[piece.file]:,}. The shard was cut short or belongs to another run; "
                "fetch the folder again."
            )
    # Entries that claim the same bytes many times over could fill any memory.
    if sum(piece.length for piece in pieces) > sum(sizes.values()):
        raise CheckpointError(
            f"{folder / METADATA_NAME}: expected entries that share no bytes, found more bytes "
            "claimed than the shards hold. Do not use this file."
        )
    return shards


def _load_trainer_values(folder: Path) -> Mapping[str, object]:
    file = folder / _TRAINER
    content = load_pickle(require_below(folder, file, origin=folder)) if file.is_file() else {}
    return {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}


def _read_piece(shard: Path, name: str, piece: ShardPiece) -> object:
    if piece.transformed:
        raise CheckpointError(
            f"{shard.parent}: {name}: expected plain bytes, found an entry that was saved through "
            f"extensions ({piece.transformed}). Save the checkpoint again without them."
        )
    try:
        with shard.open("rb") as file:
            file.seek(piece.offset)
            return load_stream(io.BytesIO(file.read(piece.length)), f"{shard}: {name}")
    except OSError as error:
        raise CheckpointError(
            f"{shard}: cannot be read ({error.strerror}). Check its permissions."
        ) from error


def _load_part(
    folder: Path, shards: Mapping[str, Path], entry: TensorEntry, start: tuple[int, ...]
) -> Tensor:
    piece = entry.pieces[start]
    part = _read_piece(shards[piece.file], entry.name, piece)
    sizes = entry.chunks[start]
    description = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else "no tensor"
    if not isinstance(part, Tensor) or part.dtype != entry.dtype or tuple(part.shape) != sizes:
        raise CheckpointError(
            f"{folder}: {entry.name}: expected {entry.dtype} {sizes} at {start}, found "
            f"{description}. The shards belong to another run; fetch the folder again."
        )
    return part.detach()


def _nest_entries(path: Path, leaves: Mapping[tuple[str | int, ...], object]) -> dict[str, object]:
    """Return the nested containers that have each value of ``leaves`` at its path.

    Raises CheckpointError, in which ``path`` names the metadata, for a path that leads through a
    value.
    """
    root: dict[str | int, object] = {}
    holders: dict[tuple[str | int, ...], dict[str | int, object]] = {(): root}
    for place, value in leaves.items():
        for depth in range(1, len(place)):
            if place[:depth] not in holders:
                holders[place[:depth]] = {}
                holders[place[: depth - 1]].setdefault(place[depth - 1], holders[place[:depth]])
        holders[place[:-1]][place[-1]] = value
    if any(place in leaves for place in holders):
        raise CheckpointError(
            f"{path}: expected entries that are values or containers, found one that is both."
        )
    return {str(key): _restore_lists(value) for key, value in root.items()}


def _restore_lists(value: object) -> object:
    """Return a container with lists in place of the dicts whose keys are all numbers."""
    if not isinstance(value, dict):
        return value
    inner = {key: _restore_lists(item) for key, item in value.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [inner[key] for key in sorted(inner)]
    return {str(key): item for key, item in inner.items()}
