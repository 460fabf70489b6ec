"""What one file holds, decided by its first bytes rather than by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.unpickle import load_pickle

__all__ = ["Content", "load_content", "load_safetensors", "safetensors_header"]

_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization.MAGIC_NUMBER as pickle writes it
_HEADER_LIMIT = 100_000_000  # bytes, from the format's specification

_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer", "Fetch the file itself with `git lfs pull`."),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"\x89PNG", "a PNG image", ""),
    (b"\x89HDF", "an HDF5 file", "Convert Keras weights to PyTorch first."),
    (b"\x93NUMPY", "a numpy array", ""),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"BZh", "a bzip2 archive", "Unpack it first."),
    (b"7z\xbc\xaf", "a 7-zip archive", "Unpack it first."),
    (b"<!DOCTYPE", "a web page", "The download gave an error page; fetch the file again."),
    (b"<!doctype", "a web page", "The download gave an error page; fetch the file again."),
    (b"<html", "a web page", "The download gave an error page; fetch the file again."),
    (b"\x80", "a pickle that torch.save did not write", "Load it with pickle and torch.save its state dict."),
)


@dataclass(frozen=True)
class Content:
    """The object in a file, not yet searched for a state dict."""

    format: str
    root: object
    metadata: Mapping[str, str] = field(default_factory=dict)


def load_content(path: Path, *, trust: bool = False) -> Content:
    """Read one checkpoint file of any format. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}). Check its permissions.") from error
    if not head:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file. Copy or download it again.")
    if head.startswith(b"PK\x03\x04"):
        return Content("torch.save", load_pickle(path, trust=trust))
    if _LEGACY_MAGIC in head[:32]:
        return Content("torch.save (legacy)", load_pickle(path, trust=trust))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_LIMIT:
        tensors, metadata = load_safetensors(path)
        return Content("safetensors", tensors, metadata)
    raise _not_a_checkpoint(path, head)


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Memory-mapped tensors in the order of the file's header, and its metadata. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = [key for key in safetensors_header(path) if key != "__metadata__"]
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except Exception as error:
        size = path.stat().st_size
        promised = _promised_size(path)
        found = f"{size:,} of them" if size < promised else str(error)
        expected = f"the {promised:,} bytes its header promises" if size < promised else "a safetensors file"
        raise CheckpointError(
            f"{path}: expected {expected}, found {found}. "
            "The file is damaged or was cut short; copy or download it again."
        ) from error


def safetensors_header(path: Path) -> dict[str, object]:
    """The JSON header, in the order it was written. Raises ValueError if there is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _HEADER_LIMIT)))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header


def _promised_size(path: Path) -> int:
    """Bytes a whole file would have; 0 if its header tells nothing."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    if start > path.stat().st_size:
        return start
    try:
        entries = [entry for key, entry in safetensors_header(path).items() if key != "__metadata__"]
        return start + max((int(entry["data_offsets"][1]) for entry in entries), default=0)  # type: ignore[index]
    except (ValueError, TypeError, LookupError, RecursionError):
        return 0


def _not_a_checkpoint(path: Path, head: bytes) -> CheckpointError:
    known = [(what, advice) for signature, what, advice in _OTHER_FILES if head.startswith(signature)]
    what, advice = known[0] if known else (_tar_text_or_bytes(head), "")
    return CheckpointError(
        f"{path}: expected a checkpoint (torch.save or safetensors), found {what}. "
        + (advice or "Give the file that the training script saved.")
    )


def _tar_text_or_bytes(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "a tar archive of other files"
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a character cut in two by our own reading does not count
            return f"bytes of no known format, starting with {head[:8].hex(' ')}"
    return "a text file"
