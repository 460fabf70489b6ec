"""Loading with the real classes, for files that the user trusts: this runs whatever code they name."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.pickles import archive, legacy
from ckpt_tools.storage.formats.pickles.tarball import is_tar

__all__ = ["load_trusted"]


def load_trusted(path: Path) -> object:
    """What ``torch.load`` or ``pickle.load`` make of a file, tensors on the CPU. Raises whatever the file raises."""
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        head = file.read(512)
        file.seek(0)
        try:
            if (
                head.startswith(archive.ZIP_MAGIC)
                or legacy.LEGACY_MAGIC in head[:32]
                or is_tar(head)
            ):
                # An open file, as torch takes a path that ends in .safetensors for that format.
                return torch.load(file, map_location="cpu", weights_only=False)
            return _OnCpu(file).load()
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: expected its classes to be importable, found {type(error).__name__}: {error}. Run where the "
                "training code can be imported (PYTHONPATH), or save model.state_dict() there."
            ) from error


class _OnCpu(pickle.Unpickler):
    """Tensors in a plain pickle come with the device they were on, which need not be here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_from_bytes
        return super().find_class(module, name)


def _load_from_bytes(raw: bytes) -> object:
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)
