"""Programs of torch.export (``.pt2``): reads the state dict in the archive, not the program.

Three layouts: raw weights with a JSON description (torch 2.9 on), a pickled state dict within the
same archive (2.7, 2.8), and a zip of pickles (2.1 to 2.6). Source:
torch/export/pt2_archive/_package.py, torch/export/__init__.py.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.pickles import load_stream
from ckpt_tools.storage.formats.pickles.archive import Archive
from ckpt_tools.storage.formats.zip_records import open_zip_archive

__all__ = ["is_torch_export", "load_torch_export"]

_PICKLED_STATES = ("serialized_state_dict.pt", "serialized_state_dict.json")
_PROGRAM = "serialized_exported_program.json"
_WEIGHTS = "data/weights/"
_CONFIG = re.compile(r"data/weights/(.+)_weights_config\.json")
_PICKLED_WEIGHTS = re.compile(r"data/weights/([^/]+)\.pt")
_COMPILED = "data/aotinductor/"
_STRIDED = 7  # Layout in torch/_export/serde/schema.py

# ScalarType in torch/_export/serde/schema.py
_DTYPES = {
    **{
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        6: "float16",
        7: "float32",
        8: "float64",
    },
    **{9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16"},
    **{
        29: "float8_e4m3fn",
        30: "float8_e5m2",
        31: "float8_e4m3fnuz",
        32: "float8_e5m2fnuz",
        33: "float8_e8m0fnu",
    },
    **{34: "uint32", 35: "uint64"},
}


def is_torch_export(names: set[str]) -> bool:
    """Return whether the records of an archive are those of a ``.pt2`` file.

    ``names`` are the records' names without their common folder.
    """
    return "archive_format" in names or not names.isdisjoint(_PICKLED_STATES)


def load_torch_export(path: Path) -> dict[str, object]:
    """Return parameters and persistent buffers, memory-mapped where they are stored raw.

    A file with several models gives one mapping for each, by their names.

    Raises CheckpointError.
    """
    with open_zip_archive(path, "the archive of torch.export.save") as archive:
        models = _load_models(path, archive)
    return next(iter(models.values())) if len(models) == 1 else dict(models)


def _load_models(path: Path, archive: Archive) -> dict[str, dict[str, object]]:
    for name in _PICKLED_STATES:
        if name in archive.records:
            return {"model": _load_zip_of_pickles(path, archive, name)}
    models = {}
    for pattern, load in (
        (_CONFIG, _load_described_state),
        (_PICKLED_WEIGHTS, _load_pickled_state),
    ):
        for name in archive.records:
            if match := pattern.fullmatch(name):
                models[match[1]] = load(path, archive, name)
    if not models:
        compiled = any(name.startswith(_COMPILED) for name in archive.records)
        content = "a package that AOTInductor compiled to machine code" if compiled else "none"
        raise CheckpointError(
            f"{path}: expected the weights of an exported program, found {content}. "
            "Give the checkpoint that it was made from, or save that with torch.export.save or "
            "torch.save."
        )
    return models


def _load_zip_of_pickles(path: Path, archive: Archive, name: str) -> dict[str, object]:
    """Load a state dict of torch 2.1 to 2.6, without the buffers that are not persistent.

    Before torch 2.3 those stood in the state dict, too. The program's signature tells which they
    are.
    """
    state = _load_pickled_state(path, archive, name)
    program = json.loads(archive.read(_PROGRAM)) if _PROGRAM in archive.records else {}
    specs = program.get("graph_module", {}).get("signature", {}).get("input_specs", [])
    buffers = [spec["buffer"] for spec in specs if isinstance(spec, dict) and "buffer" in spec]
    transient = {buffer.get("buffer_name") for buffer in buffers if buffer.get("persistent") is False}
    return {key: value for key, value in state.items() if key not in transient}


def _load_pickled_state(path: Path, archive: Archive, name: str) -> dict[str, object]:
    state = load_stream(io.BytesIO(archive.read(name)), f"{path}: {name}")
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} holds no state dict")
    return {str(key): value for key, value in state.items()}


def _load_described_state(path: Path, archive: Archive, name: str) -> dict[str, object]:
    entries = json.loads(archive.read(name))["config"]
    if not isinstance(entries, dict):
        raise ValueError(f"{name} describes no tensors")
    return {key: _load_tensor(path, archive, key, entry) for key, entry in entries.items()}


def _load_tensor(path: Path, archive: Archive, key: str, entry: Mapping[str, object]) -> object:
    # The name can lead to another record of the archive, but never to a file.
    record = f"{_WEIGHTS}{entry['path_name']}"
    if entry["use_pickle"]:
        return load_stream(io.BytesIO(archive.read(record)), f"{path}: {record}")
    meta = entry["tensor_meta"]
    if not isinstance(meta, Mapping):
        raise ValueError(f"{key} without a description")
    dtype = getattr(torch, _DTYPES[meta["dtype"]])
    size = [_require_size(number) for number in meta["sizes"]]
    stride = [_require_size(number) for number in meta["strides"]]
    offset = _require_size(meta["storage_offset"])
    if meta["layout"] != _STRIDED or len(size) != len(stride):
        raise ValueError(f"{key} is no dense tensor")
    data = _map_record(archive, record, dtype)
    if 0 in size:
        return data.new_empty(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # A stride of 0 could repeat a few numbers without end, so the record must have one for each
    # element.
    needed = max(last + 1, prod(size))
    if needed > data.numel():
        raise ValueError(f"{key} needs {needed:,} numbers, {record} holds {data.numel():,}")
    return torch.as_strided(data, size, stride, offset)


def _map_record(archive: Archive, record: str, dtype: torch.dtype) -> Tensor:
    """Return all numbers of a record as a tensor of one dimension."""
    if "byteorder" in archive.records and archive.read("byteorder").decode() != sys.byteorder:
        raise ValueError("numbers of the other byte order")
    storage = archive.storage(record)
    if storage.nbytes() % dtype.itemsize:
        raise ValueError(f"{record} of {storage.nbytes():,} bytes for numbers of {dtype.itemsize}")
    count = storage.nbytes() // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage, 0, (count,), (1,))


def _require_size(value: object) -> int:
    """Return the number in ``{"as_int": 3}``, as the JSON description writes sizes.

    Raises ValueError for a negative number, for one that no tensor on this machine can have, and
    for symbolic sizes, which no weight has.
    """
    number = value.get("as_int") if isinstance(value, Mapping) else value
    if type(number) is not int or not 0 <= number < 2**48:
        raise ValueError(f"the size {value!r:.80}")
    return number
