"""Loading with the real classes, for files that the user trusts.

This runs whatever code the files name.
"""

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
    """Load a file with ``torch.load`` or ``pickle.load``, with its tensors on the CPU.

    The code that the file names runs. Raises CheckpointError for a class that cannot be imported,
    and whatever that code raises.
    """
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        head = file.read(512)
        file.seek(0)
        try:
            if head.startswith(archive.ZIP_MAGIC) or legacy.LEGACY_MAGIC in head[:32] or is_tar(head):
                # torch takes a path that ends in .safetensors for that format, so it gets an open
                # file.
                return torch.load(file, map_location="cpu", weights_only=False)
            return _CpuUnpickler(file).load()
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: expected its classes to be importable, found {type(error).__name__}: "
                f"{error}. Run where the training code can be imported (PYTHONPATH), or save "
                "model.state_dict() there."
            ) from error


class _CpuUnpickler(pickle.Unpickler):
    """Loads the tensors of a plain pickle on the CPU.

    They are nested ``torch.save`` files that name the device they were on, which this machine need
    not have.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_tensor_on_cpu
        return super().find_class(module, name)


def _load_tensor_on_cpu(raw: bytes) -> object:
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)
