"""Array files: which array of a file is meant, its shape and type, and how to read it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from ckpt_tools.errors import CheckpointError, DataError
from ckpt_tools.storage.formats.pickles import OpaqueObject, load_pickle

__all__ = ["ARRAY_SUFFIXES", "Split", "StoredArray", "find_array", "max_decompressed_bytes"]

Split = Literal["train", "test"]

ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".safetensors")

_USUAL_NAMES = ("images", "x", "data", "x_train", "train_images", "inputs", "arr_0")
_TEST_NAMES = ("x_test", "test_images", "x_val", "val_images")  # as Keras and MedMNIST call them
_LABELS_OF = {"x_train": "y_train", "train_images": "train_labels", "arr_0": "arr_1"}
_LABELS_OF |= {"x_test": "y_test", "test_images": "test_labels", "x_val": "y_val", "val_images": "val_labels"}
_LABEL_NAMES = ("labels", "y", "label", "targets", "target")
_HEADER = 1024  # bytes in front of an array; numpy's second look at a longer one can take seconds
_INFLATED, _SLACK = 100, 1 << 26  # a compressed file may hold so many times its size, and some bytes


def max_decompressed_bytes(path: Path) -> int:
    """Bytes that a compressed file may unfold to before it counts as an attack on the memory."""
    return _INFLATED * path.stat().st_size + _SLACK


@dataclass(frozen=True)
class StoredArray:
    """An array (N, …) in a file. ``read`` gives it as a tensor, memory-mapped where the format allows.

    ``labels``, if the file has them, is the class of every sample (N,), and ``classes`` how many there are, if known.
    """

    label: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    labels: StoredArray | None = None
    classes: int | None = None
    name: str = ""  # in a file of several

    @property
    def holds_pixels(self) -> bool:
        """Whether the values are image bytes, not yet preprocessed."""
        return self.dtype == "uint8"

    def load(self) -> Tensor:
        """The values. Raises DataError if the file is damaged."""
        try:
            found = self.read()
        except OSError as error:
            raise DataError(f"{self.label}: the values cannot be read: {error}. Check file and disk.") from error
        except Exception as error:  # readers of damaged files raise whatever the damage leads them to
            raise DataError(f"{self.label}: the values cannot be read: {error}. The file is damaged.") from error
        if tuple(found.shape) != self.shape or (found.dtype == torch.uint8) != self.holds_pixels:
            raise DataError(
                f"{self.label}: expected {self.dtype} {self.shape}, found {found.dtype} {tuple(found.shape)}. "
                "The file is damaged, or has changed meanwhile."
            )
        return found


def find_array(path: Path, split: Split = "train") -> StoredArray:
    """The array of images in an ``.npz``, ``.npy``, ``.pt`` or ``.safetensors`` file.

    With several arrays in the file, one under a usual name (images, x, data, …) is taken, else the only one
    with two dimensions or more; of a file with both splits (x_train, x_test, …) that of ``split``. Nothing in the
    file is executed. Raises DataError, also for empty arrays and types other than float and uint8.
    """
    openers = {".npz": _in_npz, ".npy": _in_npy, ".pt": _in_pt, ".safetensors": _in_safetensors}
    try:
        arrays = openers[path.suffix.lower()](path)
        name = _choose(path, arrays, split)
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(
            f"{path}: expected an array file ({path.suffix}), cannot be read: {error}. "
            f"It may be truncated, or of another format than its name says."
        ) from error
    _check(arrays[name])
    return replace(arrays[name], labels=_labels(name, arrays), name=name)


def _labels(name: str, arrays: Mapping[str, StoredArray]) -> StoredArray | None:
    """The array that by its name holds the labels of the one called ``name``."""
    by_name = {key.lower(): array for key, array in arrays.items() if key != name}
    others = name.lower() in _TEST_NAMES and any(key in _USUAL_NAMES for key in by_name)  # whose the labels may be
    wanted = (_LABELS_OF.get(name.lower(), ""), *(() if others else _LABEL_NAMES))
    return next((by_name[one] for one in wanted if one in by_name), None)


def _choose(path: Path, arrays: Mapping[str, StoredArray], split: Split) -> str:
    usable = {name: array for name, array in arrays.items() if len(array.shape) >= 2}
    labelled = [name for name in _TEST_NAMES if _LABELS_OF[name] in map(str.lower, arrays)]
    for wanted in _USUAL_NAMES if split == "train" else (*labelled, *_USUAL_NAMES, *_TEST_NAMES):
        for name in usable:
            if name.lower() == wanted:
                return name
    if len(usable) == 1:
        return next(iter(usable))
    listed = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in list(arrays.items())[:10])
    more = f" and {len(arrays) - 10} more" if len(arrays) > 10 else ""
    raise DataError(
        f"{path}: expected one array of samples (N, …), found: {listed or 'none'}{more}. "
        f"Save the samples under the name 'images'."
    )


def _check(array: StoredArray) -> None:
    if 0 in array.shape:
        raise DataError(f"{array.label}: the array is empty, shape {array.shape}. Expected samples (N, …).")
    if not (array.holds_pixels or array.dtype.startswith(("float", "bfloat"))):
        raise DataError(
            f"{array.label}: expected floats (preprocessed samples) or uint8 (pixels 0–255), found "
            f"{array.dtype}. Convert the array, to uint8 if it holds pixels."
        )


def _in_npy(path: Path) -> dict[str, StoredArray]:
    with path.open("rb") as stream:
        shape, dtype = _header(stream, max_decompressed_bytes(path))
        start = stream.tell()

    def read() -> Tensor:
        _require_held(shape, dtype, path.stat().st_size - start)
        # copy-on-write: torch warns about arrays that cannot be written to
        return _tensor(np.load(path, mmap_mode="c", allow_pickle=False))

    return {"": StoredArray(str(path), shape, dtype.name, read)}


def _in_npz(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with _entry(archive, entry) as stream:
                shape, dtype = _header(stream, max_decompressed_bytes(path))
            arrays[name] = StoredArray(f"{path}[{name}]", shape, dtype.name, _npz_reader(path, entry))
    return arrays


def _npz_reader(path: Path, entry: zipfile.ZipInfo) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if entry.file_size > max_decompressed_bytes(path):
            raise ValueError(f"it claims to hold {entry.file_size:,} bytes, which is out of all proportion")
        with zipfile.ZipFile(path) as archive:
            with _entry(archive, entry) as stream:
                shape, dtype = _header(stream, entry.file_size)
                _require_held(shape, dtype, entry.file_size - stream.tell())
            with _entry(archive, entry) as stream:
                array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return _tensor(array)

    return read


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # numpy writes no other
        raise ValueError(f"{entry.filename} is compressed by method {entry.compress_type}")
    return archive.open(entry)


def _header(stream: IO[bytes], most: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type as they stand in front of an array. Raises ValueError if it takes more than ``most`` bytes."""
    version = np.lib.format.read_magic(stream)
    # from version 2 on, only the length field is wider; 3 differs in the names of record fields alone
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(stream, max_header_size=_HEADER)
    except (MemoryError, RecursionError):  # what Python's parser says of many brackets
        raise ValueError("a header that is nested without end") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape}")
    _require_held(shape, dtype, most)
    return shape, dtype


def _require_held(shape: tuple[int, ...], dtype: np.dtype[Any], held: int) -> None:
    """Raise ValueError where fewer bytes follow than an array needs, before anything is allocated for it."""
    if math.prod(shape) * dtype.itemsize > held:
        raise ValueError(f"{dtype.name} {shape} takes {math.prod(shape) * dtype.itemsize:,} bytes, {held:,} are there")


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.itemsize > 8:  # long double, unknown to torch
        array = array.astype(np.float32)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _in_pt(path: Path) -> dict[str, StoredArray]:
    try:
        content = load_pickle(path)
    except CheckpointError as error:
        found = str(error).removeprefix(f"{path}: ")
        raise DataError(
            f"{path}: it cannot be read: {found} Save a plain tensor with torch.save(images, path)."
        ) from error
    if isinstance(content, tuple | list) and len(content) == 2:
        content = [content[0], _list_to_tensor(content[1])]
    if isinstance(content, tuple | list) and len(content) == 2 and _is_labels(content[1], content[0]):
        images, labels = content
        return {"": _of_tensor(str(path), images), "labels": _of_tensor(f"{path}[1]", labels)}
    if isinstance(content, tuple | list):
        content = _join_batches(path, content)
    if isinstance(content, Tensor):
        return {"": _of_tensor(str(path), content)}
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a tensor or a dict of tensors, found {_kind(content)}.")
    values = {str(name): _list_to_tensor(value) for name, value in content.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return {name: _of_tensor(f"{path}[{name}]", value) for name, value in tensors.items()}


def _list_to_tensor(value: object) -> object:
    """A list of whole numbers as a tensor, for labels may be one."""
    if isinstance(value, (list, tuple)) and value and all(type(one) is int and abs(one) < 2**31 for one in value):
        return torch.tensor(value)
    return value


def _is_labels(labels: object, images: object) -> bool:
    if not isinstance(labels, Tensor) or not isinstance(images, Tensor):
        return False
    return labels.ndim == 1 and labels.shape == images.shape[:1]


def _join_batches(path: Path, content: Sequence[object]) -> object:
    """(images, labels) is its first part; a list of batches, which all look alike, is all of them."""
    shapes = {part.shape[1:] if isinstance(part, Tensor) and part.ndim > 1 else None for part in content}
    if len(content) > 1 and len(shapes) == 1 and None not in shapes:
        batches = [part for part in content if isinstance(part, Tensor)]
        if sum(batch.nbytes for batch in batches) > max_decompressed_bytes(path):
            raise DataError(f"{path}: expected batches, found the same few over and over again. Do not use this file.")
        return torch.cat(batches)
    return content[0] if content else None


def _kind(value: object) -> str:
    return value.name if type(value) is OpaqueObject else type(value).__name__


def _of_tensor(label: str, tensor: Tensor) -> StoredArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        dtype = f"{tensor.layout} {dtype}"
    return StoredArray(label, tuple(tensor.shape), dtype, tensor.detach)


def _in_safetensors(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # a file handle, not a dict
            part = file.get_slice(name)
            dtype = _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype())
            label = f"{path}[{name}]"
            arrays[name] = StoredArray(label, tuple(part.get_shape()), dtype, _safetensors_reader(path, name))
    return arrays


def _safetensors_reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return read


_SAFETENSORS_TYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
