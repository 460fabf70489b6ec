"""Open the training data that ``--data SPEC`` names."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Protocol

from ckpt_tools.contract import InputSpec, Split
from ckpt_tools.data.arrays.array_files import ARRAY_SUFFIXES, find_array
from ckpt_tools.data.arrays.array_source import ArraySource
from ckpt_tools.data.arrays.datasets import DATASETS, find_dataset, recognise_dataset
from ckpt_tools.data.arrays.stored_array import StoredArray
from ckpt_tools.data.callables import CallableSource
from ckpt_tools.data.foreign_data import advise_callable, describe_foreign_file
from ckpt_tools.data.images.image_folder import FolderSource
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.data.shards.disk_shards import ShardSource
from ckpt_tools.data.shards.shard_names import is_pattern, is_shard, is_shard_url, list_shards, local_shards
from ckpt_tools.data.shards.shard_stream import ShardStreamSource
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.import_path import suggest_import_path
from ckpt_tools.location import Location
from ckpt_tools.remote.remote_store import open_remote
from ckpt_tools.urls import check_url, is_url, local_path_of_url, redact_url

__all__ = ["Source", "count_other_files", "describe_source", "open_source"]


class Source(Protocol):
    """Training data that has been found and, where possible, counted, but not read."""

    @property
    def spec(self) -> str:
        """The data as the user named it."""

    @property
    def kind(self) -> Literal["folder", "shards", "array", "dataset", "callable", "synthetic"]:
        """The kind of data that the spec turned out to name."""

    @property
    def count(self) -> int | None:
        """Number of samples in one pass, after the limit; None if only a pass can tell."""

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of a stored sample, with channels first for images.

        None where only decoding can tell.
        """

    @property
    def is_preprocessed(self) -> bool:
        """Whether samples go to the model as they are, so that ``input_spec`` may be None."""

    def batches(self, input_spec: InputSpec | None, reading: Reading) -> BatchStream:
        """A stream of batches ready for the model, to be iterated as often as needed.

        Raises DataError if the samples cannot become what ``input_spec`` says.
        """
        ...


def open_source(spec: str, *, limit: int | None = None, seed: int = 0, split: Split = "train") -> Source:
    """Find and count the data that ``spec`` names, without reading a sample.

    ``spec`` is one of:

    - a folder of images,
    - an ``.npz``, ``.npy``, ``.pt`` or ``.safetensors`` file,
    - WebDataset shards, as a ``.tar``, a folder or a pattern of them,
    - ``cifar10:DIR``, ``cifar100:DIR``, ``svhn:DIR`` or ``mnist:DIR``,
    - a URL (``s3://…``) of such a folder, file or pattern,
    - ``package.module:callable``.

    ``limit`` samples are drawn at random with ``seed``; all, if there are fewer. ``split`` matters
    for data sets, and for array files and Lightning DataModules that have both. Raises DataError,
    which says what is wrong.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}. Give the number of samples to read, at least 1.")
    if spec.startswith("pipe:"):
        raise DataError(
            f"{spec}: commands are not run. Give the shards as paths or URLs, s3://bucket/{{000..146}}.tar."
        )
    if is_url(spec) and local_path_of_url(spec) is None:
        return _behind_url(spec, limit, seed, split)
    path = _path(spec)
    if spec and os.path.lexists(path):
        return _on_disk(spec, path, limit, seed, split)
    prefix, colon, folder = spec.partition(":")
    if colon and prefix in DATASETS:
        root = _path(folder)
        if is_url(folder):
            shown = f"{prefix}:{redact_url(folder)}"
            raise DataError(f"{shown}: expected {prefix}:DIR with a folder of this machine. Fetch it first.")
        if not folder or not root.is_dir():
            raise DataError(f"{spec}: expected {prefix}:DIR with an existing folder.{_near_path(root)}")
        return ArraySource(spec, find_dataset(prefix, root, split), limit, seed, "dataset")
    if prefix.endswith(".py"):
        raise DataError(f"{spec}: expected package.module:callable. {suggest_import_path(spec)}")
    if _IMPORT_PATH.fullmatch(spec):
        return _callable(spec, limit, seed, split)
    if is_pattern(spec):
        return ShardSource.open(spec, local_shards(spec, str(path)), limit=limit, seed=seed)
    raise DataError(_unknown(spec, prefix if colon else None))


_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def describe_source(source: Source) -> str:
    """Return the kind of a source and, for an array file, the name of the array."""
    name = source.array.name if isinstance(source, ArraySource) else ""
    return f"{source.kind} {name}" if name else source.kind


def count_other_files(source: Source) -> dict[str, int]:
    """Return how many files of each extension were found beside the images and are not read.

    Of shards, these are the members of samples without an image.
    """
    if isinstance(source, FolderSource):
        return dict(source.other_files)
    if isinstance(source, ShardSource):
        counts = sum((shard.extensions for shard in source.index.shards), Counter[str]())
        return {f".{extension}": count for extension, count in counts.most_common()}
    return {}


def _on_disk(spec: str, path: Path, limit: int | None, seed: int, split: Split) -> Source:
    if path.is_dir():
        return _folder(spec, path, limit, seed)
    if not path.exists():
        raise DataError(f"{spec}: a link to {path.readlink()}, which is not there. Mount or repair it.")
    return _file(spec, path, limit, seed, split)


def _behind_url(spec: str, limit: int | None, seed: int, split: Split) -> Source:
    shown = check_url(spec)
    if is_shard_url(spec):
        return ShardStreamSource.open(spec, limit=limit, seed=seed)
    if Path(shown).suffix.lower() in ARRAY_SUFFIXES:
        return ArraySource(shown, _fetch_array(Location.of(spec), split), limit, seed)
    remote = open_remote(spec)
    is_page = remote.scheme in ("http", "https")  # there a folder is a page that lists it
    if not remote.is_folder() and (not is_page or describe_foreign_file(Path(shown))):
        return _file(shown, Path(shown), limit, seed, split)
    try:
        return FolderSource.open(shown, RemoteFolder(remote), limit=limit, seed=seed)
    except DataError:
        if not any(map(is_shard, remote.names(is_shard))):
            raise
        return ShardStreamSource.open(spec, limit=limit, seed=seed)


def _fetch_array(location: Location, split: Split) -> StoredArray:
    """Fetch an array file and find the samples in it; messages about them name the URL."""
    with location.urls_in_errors():
        array = find_array(location.fetch(), split)
    labels = array.labels
    if labels is not None:
        labels = replace(labels, label=location.restore_urls(labels.label))
    return replace(array, label=location.restore_urls(array.label), labels=labels)


def _folder(spec: str, path: Path, limit: int | None, seed: int) -> Source:
    try:
        return FolderSource.open(spec, path, limit=limit, seed=seed)
    except DataError as error:
        dataset = recognise_dataset(path)
        if dataset is not None:
            raise DataError(f"{error} It looks like {dataset}: give {dataset}:{spec}.") from error
        shards = list_shards(path)
        if not shards:
            raise
        return ShardSource.open(spec, shards, limit=limit, seed=seed)


def _file(spec: str, path: Path, limit: int | None, seed: int, split: Split) -> Source:
    if is_shard(path.name):
        return ShardSource.open(spec, [path], limit=limit, seed=seed)
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        if path.suffix == ".py":
            raise DataError(f"{spec}: a file of Python code. {suggest_import_path(spec)}")
        foreign = describe_foreign_file(path)
        if foreign is not None:
            raise DataError(f"{spec}: {advise_callable(foreign)}")
        formats = " ".join(ARRAY_SUFFIXES)
        kind = path.suffix or "without extension"
        raise DataError(
            f"{spec}: expected a folder of images or an array file ({formats}), or .tar "
            f"shards, found a file {kind}. Give the folder, save the samples as an array, or let "
            "your own code read it: package.module:callable."
        )
    return ArraySource(spec, find_array(path, split), limit, seed)


def _callable(spec: str, limit: int | None, seed: int, split: Split) -> Source:
    try:
        return CallableSource.open(spec, limit=limit, seed=seed, split=split)
    except DataError as error:
        # A misspelled data set such as cifr10:data reads like an import path, too.
        prefix, _, folder = spec.partition(":")
        near = get_close_matches(prefix.lower(), DATASETS, 1)
        if not near or not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise DataError(f"{error} Did you mean {near[0]}:{folder}?") from error


def _unknown(spec: str, prefix: str | None) -> str:
    if prefix is None or "/" in prefix:
        return f"{spec or 'an empty --data'}: no such file or folder.{_near_path(_path(spec))}"
    near = get_close_matches(prefix.lower(), DATASETS, 1)
    hint = f" Did you mean {near[0]}:?" if near else ""
    datasets = ", ".join(f"{name}:DIR" for name in sorted(DATASETS))
    return (
        f"{spec}: neither a file or folder that exists nor a data set.{hint} "
        f"Expected a path, {datasets}, or package.module:callable."
    )


def _path(text: str) -> Path:
    try:
        return (is_url(text) and local_path_of_url(text)) or Path(text).expanduser()
    except RuntimeError:  # raised for "~name" if no such user exists
        return Path(text)


def _near_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f" {path.parent} does not exist either."
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, 1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
