"""What one file holds, decided by its first bytes rather than by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.exported_program import is_torch_export, load_torch_export
from ckpt_tools.storage.formats.foreign_formats import foreign_archive_error, foreign_file_error
from ckpt_tools.storage.formats.pickles import load_pickle
from ckpt_tools.storage.formats.safetensors_file import (
    _HEADER_LIMIT,
    load_safetensors,
)
from ckpt_tools.storage.formats.torchscript import is_torchscript, load_torchscript
from ckpt_tools.storage.formats.zip_records import record_names

__all__ = ["FileContent", "load_file_content"]

_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization.MAGIC_NUMBER as pickle writes it
_TAIL = 64 * 1024  # bytes of the table of contents that are looked at

_PICKLE = re.compile(  # protocols 2 to 5; protocol 0 and 1: a mark and a container, or a global
    rb"\x80[\x02-\x05]|\([dl]p?\d*\n|\}q|\]q|c[A-Za-z_][\w.]*\n[\w.]+\n|\(i[\w.]+\n"
)


@dataclass(frozen=True)
class FileContent:
    """The object in a file, not yet searched for a state dict."""

    format: str
    root: object
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, object] = field(default_factory=dict)  # from files beside it
    load: Callable[[Mapping[str, object]], Mapping[str, object]] = (
        dict  # reads the stand-ins in a part of ``root``
    )


def load_file_content(path: Path, *, trust: bool = False) -> FileContent:
    """Read one checkpoint file of any format. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened ({error.strerror}). Check its permissions."
        ) from error
    if not head:
        raise CheckpointError(
            f"{path}: expected a checkpoint, found an empty file. Copy or download it again."
        )
    if head.startswith(b"PK\x03\x04"):
        return _load_archive(path, head, trust=trust)
    if _LEGACY_MAGIC in head[:32] or _is_old_tar(head):
        return FileContent("torch.save (legacy)", load_pickle(path, trust=trust))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_LIMIT:
        tensors, metadata = load_safetensors(path)
        return FileContent("safetensors", tensors, metadata)
    if _PICKLE.match(head):
        return FileContent("pickle", load_pickle(path, trust=trust))
    raise foreign_file_error(path, head)


def _load_archive(path: Path, head: bytes, *, trust: bool) -> FileContent:
    names = {"data.pkl"} if _is_plain(path, head) else record_names(path)
    if is_torch_export(names):
        return FileContent("torch.export", load_torch_export(path))
    if is_torchscript(names):
        tensors, words = load_torchscript(path)
        return FileContent("TorchScript", tensors, words=words)
    if "data.pkl" not in names:
        raise foreign_archive_error(path, names)
    return FileContent("torch.save", load_pickle(path, trust=trust))


def _is_plain(path: Path, head: bytes) -> bool:
    """Whether torch.save wrote an archive: the pickle comes first. Spares listing thousands of records."""
    length = int.from_bytes(head[26:28], "little")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return (
            head[30 : 30 + length].endswith(b"/data.pkl") and b"/constants.pkl" not in file.read()
        )


def _is_old_tar(head: bytes) -> bool:
    """PyTorch 0.1 saved a tar archive whose first member is ``sys_info``."""
    return head[257:262] == b"ustar" and head.startswith((b"sys_info", b"./sys_info"))
