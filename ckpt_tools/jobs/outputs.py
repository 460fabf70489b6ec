"""Where a job runs, and where its output goes."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_tools.errors import OutputError
from ckpt_tools.paths import identity
from ckpt_tools.remote.mirror import resolve_location
from ckpt_tools.remote.uploads import may_write_beside

_SUFFIXES = (".tar", ".index.json", ".safetensors", ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".pkl")


def default_output_path(checkpoint: Path, kind: str = "") -> Path:
    """``model.pt`` → ``model.KIND.safetensors``, or ``model.safetensors`` without a kind, beside the file or folder.

    In the current folder for what was read over http or from a repository, where nobody expects to write.
    """
    whole = Path(os.path.realpath(checkpoint)) if checkpoint.name in ("", "..") else checkpoint.absolute()
    if not may_write_beside(whole):
        whole = Path.cwd() / whole.name
    name = whole.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return whole.with_name(".".join(part for part in (name, kind, "safetensors") if part))


def refuse_overwriting_data(output: Path, data: str, kind: str = "training") -> None:
    """Raise OutputError if the output would take the place of the data."""
    place = resolve_location(data)
    written_over = identity(output)
    if output == place or (written_over is not None and written_over == identity(place)):
        raise OutputError(f"{output}: expected a file of its own, found the {kind} data. Choose another name.")
