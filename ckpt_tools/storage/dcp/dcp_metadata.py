"""The metadata of a distributed checkpoint: which tensors it has, in which chunks, and where their bytes lie.

Written against torch.distributed.checkpoint.metadata and .filesystem of torch 2.15; older releases pickle the same
classes with fewer attributes. Objects arrive as inert placeholders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from reprlib import repr as shown  # of foreign values: short, and shallow

import torch

from ckpt_tools.paths import name_fault, shown_name
from ckpt_tools.storage.formats.pickles import OpaqueObject

__all__ = ["DistributedMetadata", "ShardPiece", "TensorEntry", "parse_distributed_metadata"]

_DEEPEST = 64  # containers within containers
_LARGEST = 2**62

Ints = tuple[int, ...]


@dataclass(frozen=True)
class ShardPiece:
    """Some bytes of a shard: what torch.save wrote for one chunk or one word."""

    file: str
    offset: int
    length: int
    transformed: str = ""  # names of the extensions that the bytes went through


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of shape ``size``: ``chunks`` maps the offsets of each chunk to its shape, ``pieces`` to its bytes."""

    name: str
    dtype: torch.dtype
    size: Ints
    chunks: Mapping[Ints, Ints]
    pieces: Mapping[Ints, ShardPiece]


@dataclass(frozen=True)
class DistributedMetadata:
    """All entries by their flat names; ``paths`` says where each stood, in the order it was saved."""

    tensors: tuple[TensorEntry, ...]
    words: Mapping[str, ShardPiece]
    paths: Mapping[str, tuple[str | int, ...]]


def parse_distributed_metadata(content: object) -> DistributedMetadata:
    """What a ``.metadata`` file says. Raises ValueError, with a phrase for what was found instead."""
    state = _state(content, "Metadata")
    entries = _mapping(state.get("state_dict_metadata"), "state_dict_metadata")
    pieces = _pieces(_mapping(state.get("storage_data"), "storage_data"))
    paths = _paths(state.get("planner_data"), entries)
    tensors, words = [], {}
    for name in paths:
        kind = _class(entries[name])
        if kind == "TensorStorageMetadata":
            tensors.append(_tensor(name, _state(entries[name], kind), pieces))
        elif kind == "BytesStorageMetadata":
            words[name] = _piece_of(pieces, name, None)
        else:
            raise ValueError(f"{name} described by {shown(entries[name])}")
    return DistributedMetadata(tuple(tensors), words, paths)


def _tensor(
    name: str, state: Mapping[str, object], pieces: Mapping[tuple[str, Ints | None], ShardPiece]
) -> TensorEntry:
    dtype, size = _dtype(state.get("properties")), _ints(state.get("size"), name)
    chunks: dict[Ints, Ints] = {}
    for chunk in _sequence(state.get("chunks"), f"chunks of {name}"):
        said = _state(chunk, "ChunkStorageMetadata")
        start, length = _ints(said.get("offsets"), name), _ints(said.get("sizes"), name)
        if not len(start) == len(length) == len(size) or any(
            first + count > whole for first, count, whole in zip(start, length, size, strict=True)
        ):
            raise ValueError(f"{name}: a chunk of {length} at {start} in a tensor of {size}")
        chunks[start] = length
    if prod(max(length, 1) for length in size) > _LARGEST:
        raise ValueError(f"{name}: the size {size}")
    if prod(size) > sum(prod(length) for length in chunks.values()):
        raise ValueError(f"{name}: chunks that do not cover its {size}")
    found = {start: _piece_of(pieces, name, start) for start in chunks}
    for start, length in chunks.items():
        if prod(length) * dtype.itemsize > found[start].length and not found[start].transformed:
            raise ValueError(f"{name}: {found[start].length} bytes for a chunk of {length}")
    return TensorEntry(name, dtype, size, chunks, found)


def _pieces(storage: Mapping[object, object]) -> dict[tuple[str, Ints | None], ShardPiece]:
    found: dict[tuple[str, Ints | None], ShardPiece] = {}
    for key, value in storage.items():
        index, info = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
        name = _text(index.get("fqn"), "fqn")
        start = None if index.get("offset") is None else _ints(index["offset"], name)
        offset, length = _ints((info.get("offset"), info.get("length")), name)
        extensions = info.get("transform_descriptors") or ()
        transformed = ", ".join(
            shown(x) for x in _sequence(extensions, "transform_descriptors")[:8]
        )
        found[name, start] = ShardPiece(
            _file(info.get("relative_path")), offset, length, transformed
        )
    return found


def _piece_of(
    pieces: Mapping[tuple[str, Ints | None], ShardPiece], name: str, start: Ints | None
) -> ShardPiece:
    piece = pieces.get((name, start))
    if piece is None and not any(
        start or ()
    ):  # whole tensors may be filed without an offset, scalars with one
        piece = pieces.get((name, None)) or pieces.get((name, ()))
    if piece is None:
        raise ValueError(f"no bytes for {name}" + (f" at {start}" if start else ""))
    return piece


def _paths(planner: object, entries: Mapping[object, object]) -> dict[str, tuple[str | int, ...]]:
    """Where each entry stood. Without the planner's word the state dict was flat."""
    said = planner if isinstance(planner, Mapping) else {}
    names = [
        *(name for name in said if name in entries),
        *(name for name in entries if name not in said),
    ]
    return {_text(name, "name"): _path(said.get(name), str(name)) for name in names}


def _path(said: object, name: str) -> tuple[str | int, ...]:
    if not isinstance(said, tuple | list) or not 0 < len(said) <= _DEEPEST:
        return (name,)
    if not all(type(part) in (str, int) for part in said):
        raise ValueError(f"the path {shown(said)} of {name}")
    return tuple(said)


def _file(name: object) -> str:
    text, fault = _text(name, "relative_path"), name_fault(name)
    if fault is not None:
        raise ValueError(f"the shard {shown_name(text)}, {fault}")
    return text


def _dtype(properties: object) -> torch.dtype:
    state = properties.state if isinstance(properties, OpaqueObject) else None
    said = state[0] if isinstance(state, tuple | list) and state else None
    if not isinstance(said, torch.dtype):
        raise ValueError(f"the type {shown(said)} of a tensor")
    return said


def _class(value: object) -> str:
    return (
        value.name.rpartition(".")[2] if isinstance(value, OpaqueObject) else type(value).__name__
    )


def _state(value: object, kind: str) -> Mapping[str, object]:
    state = value.state if isinstance(value, OpaqueObject) and _class(value) == kind else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{shown(value)} in place of {kind}")
    return state


def _mapping(value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{shown(value)} in place of {what}")
    return value


def _sequence(value: object, what: str) -> tuple[object, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{shown(value)} in place of {what}")
    return tuple(value)


def _text(value: object, what: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{shown(value)} in place of {what}")
    return value


def _ints(value: object, name: str) -> Ints:
    numbers = _sequence(value, f"numbers of {name}")
    if len(numbers) > _DEEPEST or not all(type(x) is int and 0 <= x < _LARGEST for x in numbers):
        raise ValueError(f"{name}: {shown(value)} in place of sizes")
    return tuple(int(x) for x in numbers)  # type: ignore[call-overload]
