"""Which output of the head a sample belongs to: by folder name, by class map, by number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.data.arrays.array_files import StoredArray
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.errors import DataError
from ckpt_tools.location import Location, LocationLike

__all__ = [
    "ClassMap",
    "Labels",
    "array_labels",
    "as_class_numbers",
    "folder_labels",
    "parse_class_number",
    "read_class_map",
]

_MOST = 2**31  # outputs of a head
_WHOLE = re.compile(r"u?int\d+|[IU]\d+")  # as numpy and torch, or as safetensors name them
_HINT = (
    'Say which output each folder is: --class-map FILE, JSON {"folder": 0, …} or one name a line in the head\'s order.'
)


@dataclass(frozen=True)
class ClassMap:
    """The outputs of a head that class names stand for.

    ``outputs`` is how many the head must have, None where the file does not say.
    """

    location: Location
    numbers: Mapping[str, int]
    outputs: int | None


@dataclass(frozen=True)
class Labels:
    """The class of every stored sample, (N,) int64, and how many outputs the head must have, None if any will do.

    ``told_by`` says in words where that number comes from, ``hint`` what to do if the head has another.
    """

    values: Tensor
    outputs: int | None
    told_by: str
    hint: str


def read_class_map(place: LocationLike) -> ClassMap:
    """Reads JSON, ``{"folder name": index, …}`` or a list of names, or a text file with one class name a line.

    Names without numbers stand in the order of the head. Raises DataError.
    """
    location = Location.of(place)
    try:
        text = location.fetch().read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"--class-map {location}: expected a text or JSON file: {error}.") from error
    if location.path.suffix.lower() != ".json" and not text.lstrip().startswith(("{", "[")):
        return _in_order(location, [line.strip() for line in text.rstrip().splitlines()])
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--class-map {location}: expected JSON: {error}.") from error
    if isinstance(found, list):
        return _in_order(location, found)
    return _class_map_from_json(location, found)


def _in_order(location: Location, names: Sequence[object]) -> ClassMap:
    known: dict[str, int] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or name in known:
            raise DataError(f"--class-map {location}: class {number} is {name!r}; expected names, each once.")
        known[name] = number
    if not known:
        raise DataError(f"--class-map {location}: expected class names, found none.")
    return ClassMap(location, known, len(known))


def _class_map_from_json(location: Location, found: object) -> ClassMap:
    if not isinstance(found, dict) or not found:
        raise DataError(f'--class-map {location}: expected {{"folder name": index, …}} or a list of names.')
    for name, number in found.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _MOST:
            raise DataError(
                f"--class-map {location}: {name!r} is {number!r}; expected the number of an output, from 0."
            )
    return ClassMap(location, found, None)


def folder_labels(root: Path | RemoteFolder, names: Sequence[str], class_map: ClassMap | None) -> Labels:
    """Labels of images by the first folder on their way from ``root``.

    Without a map, folders in alphabetical order are the outputs, empty ones too, as with torchvision's ImageFolder.
    Raises DataError for images in no folder, and for folders that the map does not name.
    """
    owners = [Path(name).parts[0] for name in names]
    loose = next((name for name in names if len(Path(name).parts) < 2), None)
    if loose is not None:
        raise DataError(f"{root}: {loose} lies in no class folder. Expected {root}/CLASS/IMAGE.")
    if class_map is None:
        return _alphabetical(root, owners)
    unknown = sorted(set(owners) - set(class_map.numbers))
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise DataError(f"--class-map {class_map.location}: class folders of {root} are not in it: {some}. Add them.")
    values = torch.tensor([class_map.numbers[owner] for owner in owners])
    hint = f"Name every output of the head, in its order, in {class_map.location}."
    return Labels(values, class_map.outputs, f"the names in {class_map.location}", hint)


def _alphabetical(root: Path | RemoteFolder, owners: Sequence[str]) -> Labels:
    if isinstance(root, RemoteFolder):
        folders = sorted({*root.folders(), *owners})  # a store may list files of folders that it does not list
    else:
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbers = {name: number for number, name in enumerate(folders)}
    values = torch.tensor([numbers[owner] for owner in owners])
    return Labels(values, len(folders), f"one for each class folder in {root}", _HINT)


def array_labels(array: StoredArray) -> Labels:
    """The labels that came with an array. Raises DataError if there are none, or no whole numbers (N,)."""
    if array.labels is None:
        raise DataError(
            f"{array.label}: no labels that can be read, which an evaluation needs. Save them beside the images: "
            "numpy.savez(FILE, images=…, labels=…), in a .pt file as a tensor or a list; or give a folder with a "
            "subfolder for every class."
        )
    found = array.labels
    if not _WHOLE.fullmatch(found.dtype):
        raise DataError(f"{found.label}: expected whole numbers, found {found.dtype}. Save class numbers from 0.")
    values = as_class_numbers(found.load(), array.shape[0], found.label)
    return Labels(values, array.classes, f"the classes of {array.label}", "Is this the data that the head is for?")


def parse_class_number(text: bytes | None, image: Callable[[], str]) -> int:
    """The number in the ``.cls`` member beside an ``image`` of a shard. Raises DataError if it is none or missing."""
    if text is None:
        raise DataError(
            f"{image()}: it has no label, which an evaluation needs: expected a member KEY.cls, the class number as "
            f"text, right before or behind the image."
        )
    if not re.fullmatch(rb"\s*-?[0-9]{1,18}\s*", text):
        raise DataError(f"{image()}: expected a class number from 0 in its .cls member, found {text[:20]!r}.")
    return int(text)


def as_class_numbers(labels: object, count: int, name: str) -> Tensor:
    """Class numbers (count,) int64 of a tensor (count,) or (count, 1), or a list. Raises DataError."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{name}: expected class numbers, found {type(labels).__name__}: {error}.") from error
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or found.numel() != count or (found.ndim and found.shape[0] != count):
        raise DataError(
            f"{name}: expected class numbers, one for each of {count} samples, found labels of shape "
            f"{tuple(found.shape)}, {str(found.dtype).removeprefix('torch.')}. Give whole numbers from 0."
        )
    return found.reshape(count).to("cpu", torch.int64)
