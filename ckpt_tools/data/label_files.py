"""Labels of images from a file: a CSV or text file with names and labels, or one label a line."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.data.labels import CLASS_MAP_HINT, ClassMap, Labels
from ckpt_tools.errors import DataError
from ckpt_tools.location import Location, LocationLike

__all__ = ["LabelFile", "file_labels", "read_label_file"]

# Titles of columns, in lower case without spaces and underscores. The first that is there counts.
_NAME_TITLES = (
    *("filename", "file", "filepath", "path", "image", "img", "imagename", "imagepath", "imgpath"),
    *("imageid", "imagefile", "name", "id"),
)
_LABEL_TITLES = (
    # Numbers stand before names: a table may have both, and the numbers say which output is meant.
    *("labelid", "labelidx", "labelindex", "classid", "classidx", "classindex", "targetid", "categoryid"),
    *("label", "labels", "target", "targets", "class", "category", "classname", "labelname", "y"),
    "predictionstring",
)
_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0+)?")  # pandas writes 3.0 if a column has gaps
_FORMS = 'Expected rows "name,label" or "name label", or one label a line in the order of the sorted names.'


@dataclass(frozen=True)
class LabelFile:
    """The rows of a label file: names of images and their labels, as text.

    ``names`` is None where every line is a label: then they are in the order of the sorted names.
    """

    location: Location
    names: tuple[str, ...] | None
    labels: tuple[str, ...]


def read_label_file(place: LocationLike) -> LabelFile:
    """Read a label file: CSV (commas, tabs or semicolons), ``name label``, or one label a line.

    A header is not needed; with one, the columns may be in any order and among others. Raises
    DataError.
    """
    location = Location.of(place)
    try:
        lines = location.fetch().read_text("utf-8-sig").splitlines()
        rows = _split_rows([line.strip(" ") for line in lines if line.strip()])
        titles = [re.sub(r"[ _]", "", cell.lower()) for cell in rows[0]]
        label_column = _find_label_column(rows, titles)
        if label_column is None and len(titles) > 2:
            raise ValueError(f"{len(titles)} columns, and no header that names one of them label")
        if label_column is not None:
            rows = rows[1:]  # the first row was a header
        if not rows:
            raise ValueError("it has no rows")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"--labels {location}: expected a CSV or text file: {error}. {_FORMS}") from error
    if len(titles) == 1:
        return LabelFile(location, None, tuple(label for (label,) in rows))
    if label_column is None:
        name_column, label_column = 0, 1
    else:
        name_column = _choose_name_column(titles, label_column)
    labels = [row[label_column].strip() for row in rows]
    if titles[label_column] == "predictionstring":  # of ImageNet on Kaggle: a class, then boxes
        labels = [label.partition(" ")[0] for label in labels]
    return LabelFile(location, tuple(row[name_column].strip() for row in rows), tuple(labels))


def _split_rows(lines: Sequence[str]) -> list[list[str]]:
    """Split lines into cells by what separates all of them. Raises ValueError, csv.Error."""
    if not lines:
        raise ValueError("it is empty")
    delimiter = next((mark for mark in "\t,;" if all(mark in line for line in lines)), None)
    if delimiter is not None:
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    else:
        rows = [line.rsplit(None, 1) for line in lines]  # names may hold spaces
    if len(set(map(len, rows))) > 1:
        number = next(number for number, row in enumerate(rows) if len(row) != len(rows[0]))
        raise ValueError(f"row {number + 1} has {len(rows[number])} columns, the first has {len(rows[0])}")
    return rows


def _find_label_column(rows: Sequence[Sequence[str]], titles: Sequence[str]) -> int | None:
    """Return which column a header calls the label; None if the first row is no header."""
    column = _find_column(titles, _LABEL_TITLES)
    if column is None or any(PurePosixPath(cell).suffix.lower() in IMAGE_EXTENSIONS for cell in rows[0]):
        return None
    # "y" and "class" may be labels themselves.
    return None if any(row[column] == rows[0][column] for row in rows[1:]) else column


def _choose_name_column(titles: Sequence[str], label_column: int) -> int:
    known = _find_column(titles, _NAME_TITLES)
    if known is not None:
        return known
    # A table of pandas has an index without a title in front.
    others = [number for number in range(len(titles)) if number != label_column]
    return next((number for number in others if titles[number]), others[0])


def _find_column(titles: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((titles.index(title) for title in wanted if title in titles), None)


def file_labels(
    root: Path | RemoteFolder, names: Sequence[str], label_file: LabelFile, class_map: ClassMap | None
) -> Labels:
    """Label the images ``names`` below ``root``, sorted, with the rows of a label file.

    Rows name images by their path below ``root``, also with folders before it, by their file name
    where no two images share it, and with or without extension. Rows for other images are ignored.

    Labels are class numbers or, where not all are, class names: of these ``class_map`` gives the
    numbers, else their alphabetical order. Raises DataError for an image without a label or with
    two.
    """
    rows: Sequence[str] = label_file.labels
    if label_file.names is None:
        if len(rows) != len(names):
            raise DataError(
                f"--labels {label_file.location}: {len(rows)} labels for the {len(names)} images of {root}. "
                "Expected one a line, in the order of the sorted names; or give the names, too: name,label."
            )
        texts = list(rows)
    else:
        texts, rows = _match_rows(root, names, label_file)
    return _number_labels(texts, rows, label_file.location, class_map)


def _match_rows(
    root: Path | RemoteFolder, names: Sequence[str], label_file: LabelFile
) -> tuple[list[str], Sequence[str]]:
    """Return the label of each image, and those of all rows but a header."""
    assert label_file.names is not None
    images = _ImageNames(names)
    matches = [images.find(name) for name in label_file.names]
    rows = label_file.labels
    if matches[0] is None:  # a header whose titles are not known, or an image that is not here
        rows = rows[1:]
    folder = _folder_before_names(root, {match.folder for match in matches if match is not None}, label_file)
    labels: dict[int, str] = {}
    for match, label in zip(matches, label_file.labels, strict=True):
        if match is None or match.folder != folder or not label:
            continue
        if labels.setdefault(match.number, label) != label:
            raise DataError(
                f"--labels {label_file.location}: two labels for {names[match.number]}, "
                f"{labels[match.number]!r} and {label!r}. Leave one."
            )
    missing = [name for number, name in enumerate(names) if number not in labels]
    if missing:
        raise DataError(
            f"--labels {label_file.location}: no label for {len(missing)} of {len(names)} images of {root}: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. {_FORMS}"
        )
    return [labels[number] for number in range(len(names))], rows


@dataclass(frozen=True)
class _Match:
    """The image that a row names, and the folder that the row has before the image's own path."""

    number: int
    folder: str


class _ImageNames:
    """Finds images by the names that label files give them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._by_path = _unique_numbers(names)
        self._by_file_name = _unique_numbers([PurePosixPath(name).name for name in names])

    def find(self, name: str) -> _Match | None:
        """Return the image that a row names; None for an image that is not here, or several."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            number = self._by_path.get("/".join(parts[start:]))
            if number is not None:
                return _Match(number, "/".join(parts[:start]))
        number = self._by_file_name.get(name)
        return None if number is None else _Match(number, "")


def _unique_numbers(names: Sequence[str]) -> Mapping[str, int | None]:
    """Return the number of each name, with and without its extension; None where two share it."""
    numbers: dict[str, int | None] = {}
    for number, name in enumerate(names):
        for key in {name, str(PurePosixPath(name).with_suffix(""))}:
            numbers[key] = None if key in numbers else number
    return numbers


def _folder_before_names(root: Path | RemoteFolder, folders: set[str], label_file: LabelFile) -> str:
    """Return the one folder that rows have before the paths of images.

    A file for several folders (train/1.png, val/1.png) has several: that one counts which ``root``
    ends with. Raises DataError if there is none.
    """
    if len(folders) <= 1:
        return next(iter(folders), "")
    place = f"/{root if isinstance(root, RemoteFolder) else root.absolute().as_posix()}"
    ends = [folder for folder in folders if f"{place}/".endswith(f"/{folder}/")]
    if "" in folders or not ends:
        shown = ", ".join(sorted(folder or "none" for folder in folders)[:5])
        raise DataError(
            f"--labels {label_file.location}: names of images with several folders before them ({shown}), "
            f"none of which is {root}. Give a file for this folder alone."
        )
    return max(ends, key=len)


def _number_labels(
    texts: Sequence[str], rows: Sequence[str], location: Location, class_map: ClassMap | None
) -> Labels:
    """Turn labels into numbers. ``rows`` are those of all images that the file names."""
    if class_map is not None:
        unknown = sorted(set(texts) - set(class_map.numbers))
        if unknown:
            listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise DataError(
                f"--class-map {class_map.location}: labels of {location} are not in it: {listed}. "
                "Add them, each with the number of its output."
            )
        values = torch.tensor([class_map.numbers[text] for text in texts])
        hint = f"Name every output of the head, in its order, in {class_map.location}."
        return Labels(values, class_map.outputs, f"the names in {class_map.location}", hint)
    numbers = [_NUMBER.fullmatch(text) for text in texts]
    if all(numbers):
        return Labels(torch.tensor([int(number[1]) for number in numbers if number]), None, "", "")
    class_names = sorted({row for row in rows if row})
    order = {name: number for number, name in enumerate(class_names)}
    values = torch.tensor([order[text] for text in texts])
    return Labels(values, len(class_names), f"one for each class name in {location}", CLASS_MAP_HINT)
