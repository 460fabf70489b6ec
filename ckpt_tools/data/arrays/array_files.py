"""Find the array of samples in an array file, and the labels that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_tools.contract import Split
from ckpt_tools.data.arrays.array_formats import ARRAY_READERS
from ckpt_tools.data.arrays.stored_array import StoredArray
from ckpt_tools.errors import DataError

__all__ = ["ARRAY_SUFFIXES", "find_array"]


ARRAY_SUFFIXES = tuple(ARRAY_READERS)

_USUAL_NAMES = ("images", "x", "data", "x_train", "train_images", "inputs", "arr_0")
_TEST_NAMES = ("x_test", "test_images", "x_val", "val_images")  # as Keras and MedMNIST call them
# The names of labels by the names of images. numpy.savez calls unnamed arrays arr_0, arr_1, …
_LABELS_OF = {"x_train": "y_train", "train_images": "train_labels", "arr_0": "arr_1"}
_LABELS_OF |= {"x_test": "y_test", "test_images": "test_labels", "x_val": "y_val", "val_images": "val_labels"}
_LABEL_NAMES = ("labels", "y", "label", "targets", "target")


def find_array(path: Path, split: Split = "train") -> StoredArray:
    """Find the array of samples in an ``.npz``, ``.npy``, ``.pt`` or ``.safetensors`` file.

    Of several arrays in the file, the one with a usual name (images, x, data, …) is taken, else the
    only one with two dimensions or more; of a file with both splits (x_train, x_test, …) the one of
    ``split``. Nothing in the file is executed.

    Raises DataError, also for empty arrays and types other than float and uint8.
    """
    try:
        arrays = ARRAY_READERS[path.suffix.lower()](path)
        name = _choose_array(path, arrays, split)
    except DataError:
        raise
    except Exception as error:  # readers of damaged files raise whatever the damage leads them to
        raise DataError(
            f"{path}: expected an array file ({path.suffix}), cannot be read: {error}. "
            f"It may be truncated, or of another format than its name says."
        ) from error
    _require_samples(arrays[name])
    return replace(arrays[name], labels=_find_labels(name, arrays), name=name)


def _find_labels(name: str, arrays: Mapping[str, StoredArray]) -> StoredArray | None:
    """Return the array whose name says that it holds the labels of the array called ``name``."""
    by_name = {key.lower(): array for key, array in arrays.items() if key != name}
    label_names = [_LABELS_OF.get(name.lower(), "")]
    # "labels" beside "x_test" and "images" may be the labels of the training images.
    is_ambiguous = name.lower() in _TEST_NAMES and any(key in _USUAL_NAMES for key in by_name)
    if not is_ambiguous:
        label_names += _LABEL_NAMES
    return next((by_name[label_name] for label_name in label_names if label_name in by_name), None)


def _choose_array(path: Path, arrays: Mapping[str, StoredArray], split: Split) -> str:
    candidates = {name: array for name, array in arrays.items() if len(array.shape) >= 2}
    array_names = {name.lower() for name in arrays}
    preferred: Sequence[str] = _USUAL_NAMES
    if split == "test":
        labelled = [name for name in _TEST_NAMES if _LABELS_OF[name] in array_names]
        preferred = (*labelled, *_USUAL_NAMES, *_TEST_NAMES)
    for usual_name in preferred:
        for name in candidates:
            if name.lower() == usual_name:
                return name
    if len(candidates) == 1:
        return next(iter(candidates))
    listed = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in list(arrays.items())[:10])
    more = f" and {len(arrays) - 10} more" if len(arrays) > 10 else ""
    raise DataError(
        f"{path}: expected one array of samples (N, …), found: {listed or 'none'}{more}. "
        f"Save the samples under the name 'images'."
    )


def _require_samples(array: StoredArray) -> None:
    if 0 in array.shape:
        raise DataError(f"{array.label}: the array is empty, shape {array.shape}. Expected samples (N, …).")
    if not (array.holds_pixels or array.dtype.startswith(("float", "bfloat"))):
        raise DataError(
            f"{array.label}: expected floats (preprocessed samples) or uint8 (pixels 0–255), found "
            f"{array.dtype}. Convert the array, to uint8 if it holds pixels."
        )
