"""Where the output of a job goes."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_tools.errors import OutputError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.paths import identity

_SUFFIXES = (".tar", ".index.json", ".safetensors", ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".pkl")


def default_output_path(checkpoint: LocationLike, kind: str = "") -> Location:
    """Return where the output of a checkpoint goes if the user does not say.

    ``model.pt`` becomes ``model.KIND.safetensors``, or ``model.safetensors`` without a kind, beside
    the file or folder. It goes into the current folder for a checkpoint that was read over http or
    from the Hugging Face Hub, where nobody expects this tool to write.
    """
    location = Location.of(checkpoint)
    path = location.path.absolute()
    if location.path.name in ("", ".."):  # "." and "..": the folder's own name is needed
        path = Path(os.path.realpath(location.path))
    name = path.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    output_name = ".".join(part for part in (name, kind, "safetensors") if part)
    if not location.may_write_beside():
        return Location(Path.cwd() / output_name)
    return location.with_path(path.with_name(output_name))


def refuse_overwriting_data(output: LocationLike, data: str, kind: str = "training") -> None:
    """Raise OutputError if the output would take the place of the data."""
    output_path, data_path = Location.of(output).path, Location.of(data).path
    existing_output = identity(output_path)
    is_same_file = existing_output is not None and existing_output == identity(data_path)
    if output_path == data_path or is_same_file:
        raise OutputError(
            f"{output}: expected a file of its own, found the {kind} data. Choose another name."
        )
