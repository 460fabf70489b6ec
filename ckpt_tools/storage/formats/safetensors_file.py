"""The safetensors format: https://huggingface.co/docs/safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ckpt_tools.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes, from the format's specification


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return memory-mapped tensors in the order of the header, and the metadata.

    Raises CheckpointError.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = [key for key in read_safetensors_header(path) if key != "__metadata__"]
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except Exception as error:
        size, promised = path.stat().st_size, _promised_size(path)
        mismatch = f"a safetensors file, found {error}"
        if size < promised:
            mismatch = f"the {promised:,} bytes its header promises, found {size:,} of them"
        raise CheckpointError(
            f"{path}: expected {mismatch}. The file is damaged or was cut short; copy or download it again."
        ) from error


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return the JSON header. Raises ValueError if there is none.

    Its keys are in the order of the file. The library sorts the keys that it returns.
    """
    header = json.loads(read_header_bytes(path))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header


def read_header_bytes(path: Path) -> bytes:
    """Return the bytes of a safetensors file's header, with its padding.

    Raises ValueError if the file ends before the header does, or if the header is too long.
    """
    with path.open("rb") as file:
        # A damaged file may claim any length, so that no more than the limit is read.
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, HEADER_LIMIT))
    if len(text) != length:
        raise ValueError(f"{len(text):,} bytes of a header of {length:,}")
    return text


def data_offset(path: Path) -> int:
    """Return the place in a safetensors file where its header ends and its data begins."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _promised_size(path: Path) -> int:
    """Return how many bytes the complete file has by its header; 0 if the header tells nothing."""
    start = data_offset(path)
    if start > path.stat().st_size:
        return start
    try:
        entries = [entry for key, entry in read_safetensors_header(path).items() if key != "__metadata__"]
        # Nobody has a larger file than that, and Python refuses to print much larger numbers.
        return start + min(max((int(entry["data_offsets"][1]) for entry in entries), default=0), 1 << 63)
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        MemoryError,
    ):
        return 0
