"""Recognise files of training data that only the user's own code can read, to say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

__all__ = ["advise_callable", "describe_foreign_file", "describe_foreign_names"]

# The first kind that is found in a folder is named, so that containers of samples stand before
# tables, which often lie beside the samples.
_KINDS_BY_EXTENSION = {
    extension: kind
    for kind, extensions in {
        "a Parquet file": ".parquet .pq",
        "an HDF5 file": ".h5 .hdf5 .hdf .he5",
        "an LMDB database": ".mdb .lmdb",
        "a TFRecord file": ".tfrecord .tfrecords .tfrec .tfr",
        "an Arrow file": ".arrow .feather .ipc",
        "a RecordIO file": ".rec",
        "an FFCV file": ".beton",
        "an MDS shard": ".mds",
        "a Zarr store": ".zarr .zarray .zgroup",
        "a database": ".sqlite .sqlite3 .db",
        "an Avro file": ".avro",
        "an ORC file": ".orc",
        "a MATLAB file": ".mat",
        "a pickle": ".pkl .pickle",
        "a ZIP archive": ".zip",
        "a video": ".mp4 .avi .mov .mkv .webm .mpg .mpeg",
        "a table": ".csv .tsv .xls .xlsx",
        "a JSON file": ".json .jsonl .ndjson",
    }.items()
    for extension in extensions.split()
}
_KINDS = tuple(dict.fromkeys(_KINDS_BY_EXTENSION.values()))

# How files begin that often have no extension, or another one.
_KINDS_BY_CONTENT = {
    b"PAR1": "a Parquet file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3\0": "a database",
}
_COMPRESSION = (".gz", ".bz2", ".xz", ".zst")
# TensorFlow data sets number their shards in the name: train-00000-of-01024, often without extension.
_TFRECORD_NAME = re.compile(r"tfrec(ord)?s?\b|-\d{5}-of-\d{5}$", re.IGNORECASE)


def describe_foreign_file(path: Path) -> str | None:
    """Return what kind of data a file holds, judged by name and content: "a Parquet file".

    Returns None for a kind that is not known. The file need not exist: then the name decides.
    """
    kind = _kind_of_name(path.name)
    if kind is not None:
        return kind
    try:
        with path.open("rb") as file:
            beginning = file.read(max(map(len, _KINDS_BY_CONTENT)))
    except OSError:
        return None
    return next((kind for magic, kind in _KINDS_BY_CONTENT.items() if beginning.startswith(magic)), None)


def describe_foreign_names(names: Iterable[str]) -> str | None:
    """Return the kind of data that files with these names hold; None if no kind is known."""
    kinds = {_kind_of_name(PurePath(name).name) for name in names}
    return next((kind for kind in _KINDS if kind in kinds), None)


def advise_callable(kind: str) -> str:
    """Return what to do with data of this kind, as the sentences that end a message."""
    if kind == "a ZIP archive":
        return f"{_capitalize(kind)} is not unpacked here: unpack it, and give the folder."
    return (
        f"{_capitalize(kind)} is read by your own code: write a function that returns batches, a torch "
        "Dataset or a DataLoader, and name it with --data package.module:callable (my_data:load for the "
        "function load in my_data.py of this folder)."
    )


def _kind_of_name(name: str) -> str | None:
    path = PurePath(name.lower())
    if path.suffix in _COMPRESSION:
        path = path.with_suffix("")
    # .zgroup and its like are all extension.
    kind = _KINDS_BY_EXTENSION.get(path.suffix or path.name)
    if kind is None and _TFRECORD_NAME.search(name):
        return "a TFRecord file"
    return kind


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
