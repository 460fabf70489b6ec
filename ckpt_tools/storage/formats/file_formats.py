"""Reading one file of any format, which its first bytes tell rather than its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.exported_program import is_torch_export, load_torch_export
from ckpt_tools.storage.formats.foreign_formats import foreign_archive_error, foreign_file_error
from ckpt_tools.storage.formats.pickles import load_pickle
from ckpt_tools.storage.formats.pickles.archive import ZIP_MAGIC
from ckpt_tools.storage.formats.pickles.legacy import LEGACY_MAGIC
from ckpt_tools.storage.formats.pickles.tarball import is_tar
from ckpt_tools.storage.formats.safetensors_file import HEADER_LIMIT, load_safetensors
from ckpt_tools.storage.formats.torchscript import is_torchscript, load_torchscript
from ckpt_tools.storage.formats.zip_records import record_names

__all__ = ["FileContent", "load_file_content"]

_TAIL = 64 * 1024  # bytes of the table of contents that are looked at

# Protocols 2 to 5 begin with their number. Protocols 0 and 1 begin with a container or a global.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\([dl]p?\d*\n|\}q|\]q|c[A-Za-z_][\w.]*\n[\w.]+\n|\(i[\w.]+\n")


@dataclass(frozen=True)
class FileContent:
    """The object in a file, not yet searched for a state dict.

    ``words`` are what the file, or a file beside it, says about the model. ``load`` reads the
    tensors of a mapping in ``root`` where those are only stand-ins, as in a distributed checkpoint;
    elsewhere it copies the mapping.
    """

    format: str
    root: object
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, object] = field(default_factory=dict)
    load: Callable[[Mapping[str, object]], Mapping[str, object]] = dict


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
    if head.startswith(ZIP_MAGIC):
        return _load_archive(path, head, trust=trust)
    # PyTorch 0.1 saved a tar archive whose first member is sys_info.
    is_old_tar = is_tar(head) and head.startswith((b"sys_info", b"./sys_info"))
    if LEGACY_MAGIC in head[:32] or is_old_tar:
        return FileContent("torch.save (legacy)", load_pickle(path, trust=trust))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER_LIMIT:
        tensors, metadata = load_safetensors(path)
        return FileContent("safetensors", tensors, metadata)
    if _PICKLE.match(head):
        return FileContent("pickle", load_pickle(path, trust=trust))
    raise foreign_file_error(path, head)


def _load_archive(path: Path, head: bytes, *, trust: bool) -> FileContent:
    names = {"data.pkl"} if _is_torch_save(path, head) else record_names(path)
    if is_torch_export(names):
        return FileContent("torch.export", load_torch_export(path))
    # TorchScript archives have a data.pkl, too, so that they must be recognised first.
    if is_torchscript(names):
        tensors, words = load_torchscript(path)
        return FileContent("TorchScript", tensors, words=words)
    if "data.pkl" not in names:
        raise foreign_archive_error(path, names)
    return FileContent("torch.save", load_pickle(path, trust=trust))


def _is_torch_save(path: Path, head: bytes) -> bool:
    """Return whether torch.save wrote an archive, whose first record then is the pickle.

    This spares listing thousands of records. TorchScript archives have a second pickle,
    ``constants.pkl``.
    """
    length = int.from_bytes(head[26:28], "little")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return head[30 : 30 + length].endswith(b"/data.pkl") and b"/constants.pkl" not in file.read()
