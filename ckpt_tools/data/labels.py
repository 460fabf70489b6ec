"""Find the class of every sample: by folder name, by class map, or by number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.data.arrays.stored_array import StoredArray
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.errors import DataError
from ckpt_tools.location import Location, LocationLike

__all__ = [
    "CLASS_MAP_HINT",
    "ClassMap",
    "Labels",
    "array_labels",
    "as_class_numbers",
    "folder_labels",
    "parse_class_number",
    "read_class_map",
]

_MAX_OUTPUTS = 2**31
# Types of whole numbers, as numpy and torch, or as safetensors name them.
_INTEGER_TYPE = re.compile(r"u?int\d+|[IU]\d+")
CLASS_MAP_HINT = (
    'Say which output each class is: --class-map FILE, JSON {"class": 0, …} or one name a line, '
    "in the order of the outputs."
)


@dataclass(frozen=True)
class ClassMap:
    """The number of the model's output for each class name.

    ``outputs`` is how many outputs the model must have; None where the file does not say.
    """

    location: Location
    numbers: Mapping[str, int]
    outputs: int | None


@dataclass(frozen=True)
class Labels:
    """The class of every stored sample, (N,) int64.

    ``outputs`` is how many outputs the model must have; None if any number will do.
    ``outputs_origin`` says where that number comes from, and ``hint`` what to do if it is another.
    """

    values: Tensor
    outputs: int | None
    outputs_origin: str
    hint: str


def read_class_map(place: LocationLike) -> ClassMap:
    """Read a class map: JSON, or a text file with one class name a line.

    JSON is ``{"folder name": index, …}`` or a list of names. Names without numbers stand in the
    order of the model's outputs. Raises DataError.
    """
    location = Location.of(place)
    try:
        text = location.fetch().read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"--class-map {location}: expected a text or JSON file: {error}.") from error
    if location.path.suffix.lower() != ".json" and not text.lstrip().startswith(("{", "[")):
        return _class_map_from_names(location, [line.strip() for line in text.rstrip().splitlines()])
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--class-map {location}: expected JSON: {error}.") from error
    if isinstance(content, list):
        return _class_map_from_names(location, content)
    return _class_map_from_dict(location, content)


def _class_map_from_names(location: Location, names: Sequence[object]) -> ClassMap:
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or name in numbers:
            raise DataError(f"--class-map {location}: class {number} is {name!r}; expected names, each once.")
        numbers[name] = number
    if not numbers:
        raise DataError(f"--class-map {location}: expected class names, found none.")
    return ClassMap(location, numbers, len(numbers))


def _class_map_from_dict(location: Location, content: object) -> ClassMap:
    if not isinstance(content, dict) or not content:
        raise DataError(f'--class-map {location}: expected {{"folder name": index, …}} or a list of names.')
    for name, number in content.items():
        if type(number) is not int or not 0 <= number < _MAX_OUTPUTS:  # true and false are no numbers
            expected = "the number of an output, from 0"
            raise DataError(f"--class-map {location}: {name!r} is {number!r}; expected {expected}.")
    return ClassMap(location, content, None)


def folder_labels(root: Path | RemoteFolder, names: Sequence[str], class_map: ClassMap | None) -> Labels:
    """Label images by the topmost folder below ``root`` that they lie in.

    Without a map, folders in alphabetical order are the outputs, empty ones too, as with
    torchvision's ImageFolder. Raises DataError for images in no folder, and for folders that the
    map does not name.
    """
    for name in names:
        if len(Path(name).parts) < 2:  # the image lies in ``root`` itself
            raise DataError(
                f"{root}: {name} lies in no class folder. Expected {root}/CLASS/IMAGE, or a "
                "file with the labels: --labels FILE."
            )
    class_names = [Path(name).parts[0] for name in names]
    if class_map is None:
        return _alphabetical_labels(root, class_names)
    unknown = sorted(set(class_names) - set(class_map.numbers))
    if unknown:
        listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise DataError(
            f"--class-map {class_map.location}: class folders of {root} are not in it: "
            f"{listed}. Add these folders to that file, each with the number of its output."
        )
    values = torch.tensor([class_map.numbers[name] for name in class_names])
    hint = f"Name every output of the head, in its order, in {class_map.location}."
    return Labels(values, class_map.outputs, f"the names in {class_map.location}", hint)


def _alphabetical_labels(root: Path | RemoteFolder, class_names: Sequence[str]) -> Labels:
    if isinstance(root, RemoteFolder):
        # A store may list files of folders that it does not list.
        folders = sorted({*root.folders(), *class_names})
    else:
        # Empty folders count, because torchvision numbers them, too.
        folders = sorted(
            entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    numbers = {name: number for number, name in enumerate(folders)}
    values = torch.tensor([numbers[name] for name in class_names])
    return Labels(values, len(folders), f"one for each class folder in {root}", CLASS_MAP_HINT)


def array_labels(array: StoredArray) -> Labels:
    """Read the labels that lie beside an array in its file.

    Raises DataError if there are none, and if they are no whole numbers (N,).
    """
    labels = array.labels
    if labels is None:
        raise DataError(
            f"{array.label}: no labels that can be read, which an evaluation needs. Save them "
            "beside the images: numpy.savez(FILE, images=…, labels=…), in a .pt file as a tensor "
            "or a list; or give a folder with a subfolder for every class."
        )
    if not _INTEGER_TYPE.fullmatch(labels.dtype):
        advice = "Save class numbers from 0."
        raise DataError(f"{labels.label}: expected whole numbers, found {labels.dtype}. {advice}")
    values = as_class_numbers(labels.load(), array.shape[0], labels.label)
    hint = "Is this the data that the head is for?"
    return Labels(values, array.classes, f"the classes of {array.label}", hint)


def parse_class_number(text: bytes | None, image_name: Callable[[], str]) -> int:
    """Parse the content of the ``.cls`` member beside an image of a shard.

    Raises DataError if there is no such member (None), or if it holds no number.
    """
    # The name is a function, because making the names of millions of images takes long.
    if text is None:
        raise DataError(
            f"{image_name()}: it has no label, which an evaluation needs: expected a member "
            f"KEY.cls, the class number as text, right before or behind the image."
        )
    # 18 digits fit into int64. int() alone would also accept underscores.
    if not re.fullmatch(rb"\s*-?[0-9]{1,18}\s*", text):
        shown = f"{text[:20]!r}"
        raise DataError(f"{image_name()}: expected a class number from 0 in its .cls member, found {shown}.")
    return int(text)


def as_class_numbers(labels: object, count: int, name: str) -> Tensor:
    """Convert a tensor (count,) or (count, 1), or a list, to int64 (count,) on the CPU.

    Raises DataError if it holds anything but one whole number for each sample.
    """
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{name}: expected class numbers, found {type(labels).__name__}: {error}.") from error
    is_integer = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if not is_integer or values.numel() != count or (values.ndim and values.shape[0] != count):
        dtype = str(values.dtype).removeprefix("torch.")
        raise DataError(
            f"{name}: expected class numbers, one for each of {count} samples, found labels of "
            f"shape {tuple(values.shape)}, {dtype}. Give whole numbers from 0."
        )
    return values.reshape(count).to("cpu", torch.int64)
