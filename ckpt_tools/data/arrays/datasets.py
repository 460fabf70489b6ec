"""CIFAR-10, CIFAR-100, SVHN and MNIST as torchvision lays them out on disk, either split, no download."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.data.arrays.array_files import Split, StoredArray, max_decompressed_bytes
from ckpt_tools.data.arrays.matlab import matlab_arrays
from ckpt_tools.errors import CheckpointError, DataError
from ckpt_tools.storage.formats.pickles import OpaqueObject, load_pickle

__all__ = ["DATASETS", "find_dataset", "recognise_dataset"]


def find_dataset(name: str, root: Path, split: Split = "train") -> StoredArray:
    """The images (N, C, H, W) or (N, H, W), uint8, of one split of ``name`` under ``root``, with their labels.

    ``root`` is torchvision's ``root`` or the folder inside it that holds the files. Raises DataError if files
    are missing or damaged; checksums are not compared.
    """
    try:
        return DATASETS[name](root, split)
    except DataError:
        raise
    except Exception as error:  # readers of damaged files raise whatever the damage leads them to
        raise DataError(
            f"{name}:{root}: the files cannot be read: {type(error).__name__}: {error}. "
            f"They may be truncated; unpack or fetch them again."
        ) from error


def recognise_dataset(root: Path) -> str | None:
    """The name of the data set that lies in this folder, if it is one of ours."""
    for name, marks in _MARKS.items():
        if any((root / mark).exists() for mark in marks):
            return name
    return None


_MARKS = {
    "cifar10": ("cifar-10-batches-py", "data_batch_1"),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat",),
    "mnist": ("MNIST/raw", "raw/train-images-idx3-ubyte", "train-images-idx3-ubyte"),
}


def _cifar10(root: Path, split: Split) -> StoredArray:
    names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    files = [_locate("cifar10", root, ("cifar-10-batches-py/", ""), (name,)) for name in names]
    return _cifar(root, files, "labels", 10)


def _cifar100(root: Path, split: Split) -> StoredArray:
    return _cifar(root, [_locate("cifar100", root, ("cifar-100-python/", ""), (split,))], "fine_labels", 100)


def _cifar(root: Path, files: list[Path], key: str, classes: int) -> StoredArray:
    # a pickle tells its size only when it is read; 150 MB once
    entries = [_cifar_entry(file) for file in files]
    images = torch.cat([_cifar_images(file, entry) for file, entry in zip(files, entries, strict=True)])
    told = [label for entry in entries for label in _entry_labels(entry, key)]
    labels = StoredArray(f"{root}[{key}]", (len(told),), "int64", lambda: torch.tensor(told))
    return _pixels(str(root), tuple(images.shape), lambda: images, labels, classes)


def _cifar_entry(file: Path) -> dict[Any, Any]:
    try:
        entry = load_pickle(file)
    except CheckpointError as error:
        raise DataError(f"{file}: it cannot be read as a batch of CIFAR: {error}") from error
    return entry if isinstance(entry, dict) else {}


def _cifar_images(file: Path, entry: dict[Any, Any]) -> Tensor:
    data = entry.get("data", entry.get(b"data"))
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"; it holds {data!r:.200}" if isinstance(data, OpaqueObject) else ""
        raise DataError(f"{file}: expected CIFAR's 'data' of shape (N, 3072) uint8; found another pickle{found}.")
    return data.reshape(-1, 3, 32, 32)


def _entry_labels(entry: dict[Any, Any], key: str) -> list[int]:
    told = entry.get(key, entry.get(key.encode())) or []
    if not isinstance(told, list) or not all(type(label) is int and abs(label) < 1 << 31 for label in told):
        raise ValueError(f"{key} that are no numbers of classes")
    return told


def _svhn(root: Path, split: Split) -> StoredArray:
    file = _locate("svhn", root, ("", "svhn/", "SVHN/"), (f"{split}_32x32.mat",))
    found = matlab_arrays(file)
    pixels, digits = found.get("X"), found.get("y")
    if pixels is None or len(pixels.shape) != 4 or pixels.kind != "uint8":
        held = {name: (array.shape, array.kind) for name, array in found.items()}
        raise DataError(f"{file}: expected SVHN's array X of shape (32, 32, 3, N) uint8, found {held!r:.300}.")
    if pixels.nbytes + (digits.nbytes if digits else 0) > max_decompressed_bytes(file):
        raise ValueError(f"it claims to hold an array of shape {pixels.shape}, which is out of all proportion")

    def read() -> Tensor:
        return torch.from_numpy(pixels.read()).permute(3, 2, 0, 1)

    def read_labels() -> Tensor:
        if digits is None:
            raise ValueError("there is no array y")
        return torch.from_numpy(digits.read().astype(np.int64)).flatten() % 10  # the file writes 10 for zero

    height, width, channels, count = pixels.shape
    labels = StoredArray(f"{file}[y]", (count,), "int64", read_labels)
    return _pixels(str(file), (count, channels, height, width), read, labels, 10)


def _mnist(root: Path, split: Split) -> StoredArray:
    name = "t10k" if split == "test" else split
    file, shape = _idx(root, f"{name}-images-idx3-ubyte", 3)

    def read() -> Tensor:
        return _idx_values(file, shape)

    def read_labels() -> Tensor:
        return _idx_values(*_idx(root, f"{name}-labels-idx1-ubyte", 1))

    return _pixels(str(file), shape, read, StoredArray(f"{root}[{name}-labels]", shape[:1], "uint8", read_labels), 10)


def _idx(root: Path, name: str, dimensions: int) -> tuple[Path, tuple[int, ...]]:
    """An idx file of MNIST, plain or gzipped, and the shape of its bytes."""
    file = _locate("mnist", root, ("MNIST/raw/", "raw/", ""), (name, f"{name}.gz"))
    with _open_idx_file(file) as stream:
        magic, *shape = np.frombuffer(stream.read(4 + 4 * dimensions), dtype=">u4").tolist()
    if magic != 0x0800 + dimensions or len(shape) != dimensions:
        raise DataError(f"{file}: expected an idx file (magic number {0x0800 + dimensions}), found {magic}.")
    held = max_decompressed_bytes(file) if file.suffix == ".gz" else file.stat().st_size - 4 - 4 * dimensions
    if math.prod(shape) > held:
        raise ValueError(f"{file.name} announces {tuple(shape)}, which is more than it holds")
    return file, tuple(shape)


def _idx_values(file: Path, shape: tuple[int, ...]) -> Tensor:
    with _open_idx_file(file) as stream:
        stream.read(4 + 4 * len(shape))
        return torch.frombuffer(bytearray(stream.read(math.prod(shape))), dtype=torch.uint8).reshape(shape)


def _open_idx_file(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _pixels(
    label: str, shape: tuple[int, ...], read: Callable[[], Tensor], labels: StoredArray, classes: int
) -> StoredArray:
    if 0 in shape:
        raise DataError(f"{label}: the data set is empty, shape {shape}. Fetch it again.")
    return StoredArray(label, shape, "uint8", read, labels, classes)


def _locate(dataset: str, root: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    tried = [root / f"{folder}{name}" for folder in folders for name in names]
    for path in tried:
        if path.is_file():
            return path
    packed = next((path for path in sorted(root.glob("*.tar*")) if path.is_file()), None)
    hint = f"Unpack {packed} first." if packed else "Nothing is downloaded: torchvision.datasets can do that."
    raise DataError(f"{dataset}:{root}: expected {tried[0]} (or the folder that holds {names[0]}), not found. {hint}")


DATASETS: Mapping[str, Callable[[Path, Split], StoredArray]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "mnist": _mnist,
    "svhn": _svhn,
}
