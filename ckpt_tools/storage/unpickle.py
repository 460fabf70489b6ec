"""Loading what ``torch.save`` wrote, without executing anything unless the user says so."""

from __future__ import annotations

import pickle
import re
import threading
import warnings
import zipfile
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from ckpt_tools.errors import BlockedPickle, CheckpointError
from ckpt_tools.storage.allowlist import ALLOWED

__all__ = ["load_pickle"]

_BLOCKED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_SHOWN = 5
_ALLOWING = threading.Lock()  # torch keeps its allow-list per process


def load_pickle(path: Path, *, trust: bool = False) -> object:
    """The object in a ``torch.save`` file, its tensors on the CPU and, where the format permits, memory-mapped.

    With ``trust`` the file may execute code. Raises BlockedPickle or CheckpointError.
    """
    mmap = _is_zip(path) and _can_map(path)
    try:
        return _load(path, trust=trust, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _explain(path, error) from error
    except Exception as error:
        raise _unreadable(path, error, trust=trust) from error


def _load(path: Path, *, trust: bool, mmap: bool) -> object:
    allowed = set(ALLOWED).difference(torch.serialization.get_safe_globals())
    # torch takes a path that ends in .safetensors for that format; an open file it judges by its content.
    disguised = path.suffix == ".safetensors"
    with (
        warnings.catch_warnings(action="ignore"),
        _ALLOWING,
        torch.serialization.safe_globals(list(allowed)),
        path.open("rb") if disguised else nullcontext(path) as source,
    ):
        return torch.load(source, map_location="cpu", mmap=mmap and not disguised, weights_only=not trust)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _can_map(path: Path) -> bool:
    """Whether every record lies in the archive as it is; a repacked, compressed one would map as noise."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a complete torch.save archive, found {path.stat().st_size:,} bytes without the "
            "table of contents at the end. The file was cut short; copy or download it again."
        ) from error
    names = {record.filename.partition("/")[2] for record in records}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: expected a state dict, found a TorchScript archive, which is not supported. Load it with "
            "torch.jit.load and torch.save its state_dict()."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path}: expected a checkpoint, found a zip archive that torch.save did not write. "
            "If it holds a checkpoint, unpack it and give the file inside."
        )
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _explain(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    names = _blocked_globals(path, str(error))
    way_out = "Save model.state_dict() instead, or pass --trust if you trust the file: it can then run any code."
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found = f"{', '.join(names[:_SHOWN])}{more}"
        return BlockedPickle(f"{path}: expected tensors and plain values, found a pickle that needs {found}. {way_out}")
    detail = _core(str(error))
    if "Unsupported operand" in detail:
        return BlockedPickle(
            f"{path}: expected a pickle of protocol 2, which torch.save writes, found one that the safe reader "
            f"does not know ({detail}): another protocol, or a damaged file. {way_out}"
        )
    return BlockedPickle(
        f"{path}: expected tensors and plain values, found a pickle that needs more: {detail}. {way_out}"
    )


def _blocked_globals(path: Path, message: str) -> list[str]:
    """Names that are not on the allow-list, read off the opcodes; nothing is executed."""
    names = set(_BLOCKED.findall(message))
    allowed = {name for _, name in ALLOWED}
    with suppress(Exception):  # no archive, or opcodes it does not know: what the message names has to do
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed
    return sorted({name.removeprefix("builtins.") for name in names})


def _core(message: str) -> str:
    """The unpickler's own sentence, without torch's advice around it."""
    paragraphs = message.split("\n\n")
    sentence = paragraphs[-2] if len(paragraphs) > 1 else message.partition("\n")[0]
    return sentence.strip().rstrip(".")


def _unreadable(path: Path, error: Exception, *, trust: bool) -> CheckpointError:
    detail = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if trust and isinstance(error, ImportError | AttributeError):
        return CheckpointError(
            f"{path}: expected its classes to be importable, found {detail}. Run where the training code can be "
            "imported (PYTHONPATH), or save model.state_dict() there."
        )
    return CheckpointError(
        f"{path}: expected a complete torch.save file, found one that does not read to its end ({detail}). "
        "The file is damaged or was cut short; copy or download it again."
    )
