"""The metadata of a distributed checkpoint: its tensors, their chunks, and where the bytes lie.

Written against torch.distributed.checkpoint.metadata and .filesystem of torch 2.15; older releases
pickle the same classes with fewer attributes. Objects arrive as inert placeholders
(``OpaqueObject``), and nothing in them is believed before it is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from reprlib import repr as shorten  # a short and shallow text of a foreign value

import torch

from ckpt_tools.paths import name_fault, shown_name
from ckpt_tools.storage.formats.pickles import OpaqueObject

__all__ = ["DistributedMetadata", "ShardPiece", "TensorEntry", "parse_distributed_metadata"]

_MAX_LENGTH = 64  # of a path, and of sizes
_LARGEST = 2**62

Ints = tuple[int, ...]


@dataclass(frozen=True)
class ShardPiece:
    """Some bytes of a shard, which torch.save wrote for one chunk or one recorded value."""

    file: str
    offset: int
    length: int
    transformed: str = ""  # names of the extensions that the bytes went through


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of shape ``size``.

    ``chunks`` maps the offsets of each chunk to its shape, ``pieces`` to its bytes.
    """

    name: str
    dtype: torch.dtype
    size: Ints
    chunks: Mapping[Ints, Ints]
    pieces: Mapping[Ints, ShardPiece]


@dataclass(frozen=True)
class DistributedMetadata:
    """All entries of a checkpoint by their flat names.

    ``paths`` are their places in the object that was saved, in its order.
    """

    tensors: tuple[TensorEntry, ...]
    words: Mapping[str, ShardPiece]
    paths: Mapping[str, tuple[str | int, ...]]


def parse_distributed_metadata(content: object) -> DistributedMetadata:
    """Return the entries of a ``.metadata`` file.

    Raises ValueError, whose message stands behind "found", for a malformed one.
    """
    state = _require_state(content, "Metadata")
    entries = _require_mapping(state.get("state_dict_metadata"), "state_dict_metadata")
    pieces = _parse_pieces(_require_mapping(state.get("storage_data"), "storage_data"))
    paths = _parse_paths(state.get("planner_data"), entries)
    tensors, words = [], {}
    for name in paths:
        kind = _class_name(entries[name])
        if kind == "TensorStorageMetadata":
            tensors.append(_parse_tensor(name, _require_state(entries[name], kind), pieces))
        elif kind == "BytesStorageMetadata":
            words[name] = _find_piece(pieces, name, None)
        else:
            raise ValueError(f"{name} described by {shorten(entries[name])}")
    return DistributedMetadata(tuple(tensors), words, paths)


def _parse_tensor(
    name: str, state: Mapping[str, object], pieces: Mapping[tuple[str, Ints | None], ShardPiece]
) -> TensorEntry:
    dtype, size = _require_dtype(state.get("properties")), _require_sizes(state.get("size"), name)
    chunks: dict[Ints, Ints] = {}
    for chunk in _require_sequence(state.get("chunks"), f"chunks of {name}"):
        chunk_state = _require_state(chunk, "ChunkStorageMetadata")
        start = _require_sizes(chunk_state.get("offsets"), name)
        length = _require_sizes(chunk_state.get("sizes"), name)
        if not len(start) == len(length) == len(size) or any(
            first + count > total for first, count, total in zip(start, length, size, strict=True)
        ):
            raise ValueError(f"{name}: a chunk of {length} at {start} in a tensor of {size}")
        chunks[start] = length
    # A tensor without elements has strides, too, which must fit into 64 bits.
    if prod(max(length, 1) for length in size) > _LARGEST:
        raise ValueError(f"{name}: the size {size}")
    if prod(size) > sum(prod(length) for length in chunks.values()):
        raise ValueError(f"{name}: chunks that do not cover its {size}")
    pieces_of_chunks = {start: _find_piece(pieces, name, start) for start in chunks}
    for start, length in chunks.items():
        piece = pieces_of_chunks[start]
        if prod(length) * dtype.itemsize > piece.length and not piece.transformed:
            raise ValueError(f"{name}: {piece.length} bytes for a chunk of {length}")
    return TensorEntry(name, dtype, size, chunks, pieces_of_chunks)


def _parse_pieces(storage: Mapping[object, object]) -> dict[tuple[str, Ints | None], ShardPiece]:
    pieces: dict[tuple[str, Ints | None], ShardPiece] = {}
    for key, value in storage.items():
        index, info = _require_state(key, "MetadataIndex"), _require_state(value, "_StorageInfo")
        name = _require_text(index.get("fqn"), "fqn")
        start = None if index.get("offset") is None else _require_sizes(index["offset"], name)
        offset, length = _require_sizes((info.get("offset"), info.get("length")), name)
        extensions = info.get("transform_descriptors") or ()
        descriptors = _require_sequence(extensions, "transform_descriptors")[:8]
        transformed = ", ".join(shorten(descriptor) for descriptor in descriptors)
        file = _require_file_name(info.get("relative_path"))
        pieces[name, start] = ShardPiece(file, offset, length, transformed)
    return pieces


def _find_piece(
    pieces: Mapping[tuple[str, Ints | None], ShardPiece], name: str, start: Ints | None
) -> ShardPiece:
    piece = pieces.get((name, start))
    # Complete tensors may be filed without an offset, scalars with an empty one.
    if piece is None and not any(start or ()):
        piece = pieces.get((name, None)) or pieces.get((name, ()))
    if piece is None:
        raise ValueError(f"no bytes for {name}" + (f" at {start}" if start else ""))
    return piece


def _parse_paths(planner: object, entries: Mapping[object, object]) -> dict[str, tuple[str | int, ...]]:
    """Return the path of each entry.

    An entry for which the planner has recorded none stood at the top level.
    """
    recorded_paths = planner if isinstance(planner, Mapping) else {}
    names = [
        *(name for name in recorded_paths if name in entries),
        *(name for name in entries if name not in recorded_paths),
    ]
    return {_require_text(name, "name"): _parse_path(recorded_paths.get(name), str(name)) for name in names}


def _parse_path(path: object, name: str) -> tuple[str | int, ...]:
    if not isinstance(path, tuple | list) or not 0 < len(path) <= _MAX_LENGTH:
        return (name,)
    if not all(type(part) in (str, int) for part in path):
        raise ValueError(f"the path {shorten(path)} of {name}")
    return tuple(path)


def _require_file_name(name: object) -> str:
    text, fault = _require_text(name, "relative_path"), name_fault(name)
    if fault is not None:
        raise ValueError(f"the shard {shown_name(text)}, {fault}")
    return text


def _require_dtype(properties: object) -> torch.dtype:
    state = properties.state if isinstance(properties, OpaqueObject) else None
    # The state of TensorProperties is a tuple that begins with the dtype.
    dtype = state[0] if isinstance(state, tuple | list) and state else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the type {shorten(dtype)} of a tensor")
    return dtype


def _class_name(value: object) -> str:
    return value.name.rpartition(".")[2] if isinstance(value, OpaqueObject) else type(value).__name__


def _require_state(value: object, kind: str) -> Mapping[str, object]:
    state = value.state if isinstance(value, OpaqueObject) and _class_name(value) == kind else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{shorten(value)} in place of {kind}")
    return state


def _require_mapping(value: object, name: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{shorten(value)} in place of {name}")
    return value


def _require_sequence(value: object, name: str) -> tuple[object, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{shorten(value)} in place of {name}")
    return tuple(value)


def _require_text(value: object, name: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{shorten(value)} in place of {name}")
    return value


def _require_sizes(value: object, name: str) -> Ints:
    numbers = _require_sequence(value, f"numbers of {name}")
    if len(numbers) > _MAX_LENGTH or not all(type(x) is int and 0 <= x < _LARGEST for x in numbers):
        raise ValueError(f"{name}: {shorten(value)} in place of sizes")
    return tuple(int(x) for x in numbers)  # type: ignore[call-overload]
