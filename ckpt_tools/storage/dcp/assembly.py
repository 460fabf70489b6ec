"""Putting tensors together from the chunks that several ranks saved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ckpt_tools.errors import CheckpointError

__all__ = ["assemble_tensor", "is_rank_file", "load_rank_files"]

_RANK_FILE = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_OFFSETS = "DCP_SHARDING_INFO"  # torch/distributed/checkpoint/_hf_utils.py

Ints = tuple[int, ...]


def assemble_tensor(where: object, name: str, size: Ints, parts: Mapping[Ints, Tensor]) -> Tensor:
    """Return the tensor ``name`` of shape ``size``, whose chunks start at the keys of ``parts``.

    A single chunk is returned as it is, without a copy. Raises CheckpointError, in which ``where``
    names the checkpoint, for chunks that leave gaps, reach beyond the tensor, or differ in type.
    """
    types = {part.dtype for part in parts.values()}
    fits = all(
        len(start) == part.dim() == len(size)
        and all(a + n <= m for a, n, m in zip(start, part.shape, size, strict=True))
        for start, part in parts.items()
    )
    # The chunks must have enough elements before anything of the claimed size is allocated.
    if len(types) != 1 or not fits or prod(size) > sum(part.numel() for part in parts.values()):
        raise _incomplete_error(where, name, size)
    if len(parts) == 1:
        return next(iter(parts.values()))
    result = torch.empty(size, dtype=types.pop())
    # Chunks that overlap can have enough elements and leave gaps all the same.
    filled = torch.zeros(size, dtype=torch.bool)
    for start, part in parts.items():
        window = tuple(slice(first, first + count) for first, count in zip(start, part.shape, strict=True))
        result[window] = part
        filled[window] = True
    if not bool(filled.all()):
        raise _incomplete_error(where, name, size)
    return result


def is_rank_file(name: str) -> bool:
    """Return whether HuggingFaceStorageWriter gives this name to the file of one rank."""
    return _RANK_FILE.fullmatch(name) is not None


def load_rank_files(files: tuple[Path, ...]) -> dict[str, Tensor]:
    """Return the tensors of all ranks' safetensors files.

    They are put together by the offsets in the files' metadata. Raises CheckpointError.
    """
    parts_of_tensors: dict[str, dict[Ints, Tensor]] = {}
    for file in files:
        for key, (start, tensor) in _load_parts(file).items():
            parts_of_tensors.setdefault(key, {})[start] = tensor
    return {
        key: assemble_tensor(files[0].parent, key, _full_size(parts), parts)
        for key, parts in parts_of_tensors.items()
    }


def _load_parts(file: Path) -> dict[str, tuple[Ints, Tensor]]:
    """Return the offsets and values of one rank's part of each tensor."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            offsets = json.loads((opened.metadata() or {})[_OFFSETS])
            parts = {}
            for key in opened.keys():  # noqa: SIM118  (it is no dict, and cannot be iterated)
                start = _require_offsets(offsets[key]["saved_offsets"])
                parts[key] = (start, opened.get_tensor(key))
            return parts
    except Exception as error:  # safetensors raises its own and the system's
        raise CheckpointError(
            f"{file}: expected one rank's part of a checkpoint with the offsets of its tensors, "
            f"found none ({error}). The file is damaged or was cut short; copy or download it "
            "again."
        ) from error


def _require_offsets(value: object) -> Ints:
    if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**40 for x in value):
        raise ValueError(f"the offsets {value!r:.80}")
    return tuple(value)


def _full_size(parts: Mapping[Ints, Tensor]) -> Ints:
    dims = min(min(len(start), part.dim()) for start, part in parts.items())
    return tuple(max(start[i] + part.shape[i] for start, part in parts.items()) for i in range(dims))


def _incomplete_error(where: object, name: str, size: Ints) -> CheckpointError:
    return CheckpointError(
        f"{where}: {name}: expected chunks of one type that cover all of {size}, found others. "
        "A rank's file is missing or belongs to another run; fetch the folder again."
    )
