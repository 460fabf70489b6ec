"""Find CIFAR-10, CIFAR-100, SVHN and MNIST on disk, in the layout of torchvision."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.contract import Split
from ckpt_tools.data.arrays.matlab import matlab_arrays
from ckpt_tools.data.arrays.stored_array import StoredArray, are_class_numbers, max_decompressed_bytes
from ckpt_tools.errors import CheckpointError, DataError
from ckpt_tools.storage.formats.pickles import OpaqueObject, load_pickle

__all__ = ["DATASETS", "find_dataset", "recognise_dataset"]


def find_dataset(name: str, root: Path, split: Split = "train") -> StoredArray:
    """Find the images of one split of the data set ``name`` under ``root``, with their labels.

    The images are uint8, (N, C, H, W) or (N, H, W). ``root`` is torchvision's ``root`` or the
    folder inside it that holds the files. Checksums are not compared.

    Raises DataError if files are missing or damaged.
    """
    try:
        array = DATASETS[name](root, split)
    except DataError:
        raise
    except Exception as error:  # readers of damaged files raise whatever the damage leads them to
        raise DataError(
            f"{name}:{root}: the files cannot be read: {type(error).__name__}: {error}. "
            f"They may be truncated; unpack or fetch them again."
        ) from error
    if 0 in array.shape:
        raise DataError(f"{array.label}: the data set is empty, shape {array.shape}. Fetch it again.")
    return array


def recognise_dataset(root: Path) -> str | None:
    """Return the name of the data set whose files lie in this folder; None if there is none.

    It serves a hint for users who gave the folder without the name of the data set.
    """
    for name, marks in _TYPICAL_FILES.items():
        if any((root / mark).exists() for mark in marks):
            return name
    return None


_TYPICAL_FILES = {
    "cifar10": ("cifar-10-batches-py", "data_batch_1"),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat",),
    "mnist": ("MNIST/raw", "raw/train-images-idx3-ubyte", "train-images-idx3-ubyte"),
}


def _find_cifar10(root: Path, split: Split) -> StoredArray:
    names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    files = [_locate_file("cifar10", root, ("cifar-10-batches-py/", ""), (name,)) for name in names]
    return _read_cifar(root, files, "labels", 10)


def _find_cifar100(root: Path, split: Split) -> StoredArray:
    file = _locate_file("cifar100", root, ("cifar-100-python/", ""), (split,))
    return _read_cifar(root, [file], "fine_labels", 100)


def _read_cifar(root: Path, files: list[Path], labels_key: str, classes: int) -> StoredArray:
    # The shape is known only when the pickle has been read, so these 150 MB are read here, once.
    batches = [_read_cifar_batch(file) for file in files]
    images = torch.cat([_cifar_images(file, batch) for file, batch in zip(files, batches, strict=True)])
    numbers = [label for batch in batches for label in _cifar_labels(batch, labels_key)]
    labels = StoredArray(f"{root}[{labels_key}]", (len(numbers),), "int64", lambda: torch.tensor(numbers))
    return StoredArray(str(root), tuple(images.shape), "uint8", lambda: images, labels, classes)


def _read_cifar_batch(file: Path) -> dict[Any, Any]:
    try:
        batch = load_pickle(file)
    except CheckpointError as error:
        raise DataError(f"{file}: it cannot be read as a batch of CIFAR: {error}") from error
    return batch if isinstance(batch, dict) else {}


def _cifar_images(file: Path, batch: dict[Any, Any]) -> Tensor:
    # CIFAR's pickles come from Python 2, whose strings load as text or as bytes.
    data = batch.get("data", batch.get(b"data"))
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        content = f"; it holds {data!r:.200}" if isinstance(data, OpaqueObject) else ""
        raise DataError(f"{file}: expected 'data' of shape (N, 3072) uint8; found another pickle{content}.")
    return data.reshape(-1, 3, 32, 32)


def _cifar_labels(batch: dict[Any, Any], key: str) -> list[int]:
    labels = batch.get(key, batch.get(key.encode())) or []
    if not isinstance(labels, list) or not are_class_numbers(labels):
        raise ValueError(f"{key} that are no numbers of classes")
    return labels


def _find_svhn(root: Path, split: Split) -> StoredArray:
    file = _locate_file("svhn", root, ("", "svhn/", "SVHN/"), (f"{split}_32x32.mat",))
    arrays = matlab_arrays(file)
    pixels, digits = arrays.get("X"), arrays.get("y")
    if pixels is None or len(pixels.shape) != 4 or pixels.kind != "uint8":
        listed = {name: (array.shape, array.kind) for name, array in arrays.items()}
        raise DataError(
            f"{file}: expected SVHN's array X of shape (32, 32, 3, N) uint8, found {listed!r:.300}."
        )
    if pixels.nbytes + (digits.nbytes if digits else 0) > max_decompressed_bytes(file):
        raise ValueError(
            f"it claims to hold an array of shape {pixels.shape}, which is out of all proportion"
        )

    # MATLAB stores (height, width, channels, N).
    def read_images() -> Tensor:
        return torch.from_numpy(pixels.read()).permute(3, 2, 0, 1)

    def read_labels() -> Tensor:
        if digits is None:
            raise ValueError("there is no array y")
        # The file writes 10 for the digit zero.
        return torch.from_numpy(digits.read().astype(np.int64)).flatten() % 10

    height, width, channels, count = pixels.shape
    shape = (count, channels, height, width)
    labels = StoredArray(f"{file}[y]", (count,), "int64", read_labels)
    return StoredArray(str(file), shape, "uint8", read_images, labels, 10)


def _find_mnist(root: Path, split: Split) -> StoredArray:
    name = "t10k" if split == "test" else split
    file, shape = _locate_idx_file(root, f"{name}-images-idx3-ubyte", 3)

    # The file of labels is looked for when it is needed: a re-estimation does without it.
    def read_labels() -> Tensor:
        return _read_idx_values(*_locate_idx_file(root, f"{name}-labels-idx1-ubyte", 1))

    labels = StoredArray(f"{root}[{name}-labels]", shape[:1], "uint8", read_labels)
    return StoredArray(str(file), shape, "uint8", partial(_read_idx_values, file, shape), labels, 10)


def _locate_idx_file(root: Path, name: str, dimensions: int) -> tuple[Path, tuple[int, ...]]:
    """Find an idx file of MNIST, plain or gzipped, and read the shape of its values.

    An idx file holds a magic number (0x08 for bytes, then the number of dimensions), the size of
    each dimension, all as big-endian numbers of 32 bits, and the values.
    """
    file = _locate_file("mnist", root, ("MNIST/raw/", "raw/", ""), (name, f"{name}.gz"))
    header_bytes = 4 + 4 * dimensions
    with _open_idx_file(file) as stream:
        magic, *shape = np.frombuffer(stream.read(header_bytes), dtype=">u4").tolist()
    if magic != 0x0800 + dimensions or len(shape) != dimensions:
        raise DataError(f"{file}: expected an idx file (magic number {0x0800 + dimensions}), found {magic}.")
    compressed = file.suffix == ".gz"
    available = max_decompressed_bytes(file) if compressed else file.stat().st_size - header_bytes
    if math.prod(shape) > available:
        raise ValueError(f"{file.name} announces {tuple(shape)}, which is more than it holds")
    return file, tuple(shape)


def _read_idx_values(file: Path, shape: tuple[int, ...]) -> Tensor:
    with _open_idx_file(file) as stream:
        stream.read(4 + 4 * len(shape))
        values = bytearray(stream.read(math.prod(shape)))
    return torch.frombuffer(values, dtype=torch.uint8).reshape(shape)


def _open_idx_file(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _locate_file(dataset: str, root: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    candidates = [root / f"{folder}{name}" for folder in folders for name in names]
    for path in candidates:
        if path.is_file():
            return path
    packed = next((path for path in sorted(root.glob("*.tar*")) if path.is_file()), None)
    hint = f"Unpack {packed} first." if packed else "Nothing is downloaded: torchvision.datasets can do that."
    expected = f"{candidates[0]} (or the folder that holds {names[0]})"
    raise DataError(f"{dataset}:{root}: expected {expected}, not found. {hint}")


DATASETS: Mapping[str, Callable[[Path, Split], StoredArray]] = {
    "cifar10": _find_cifar10,
    "cifar100": _find_cifar100,
    "mnist": _find_mnist,
    "svhn": _find_svhn,
}
