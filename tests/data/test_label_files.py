"""A label file labels the images that it names, in whatever usual form it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.label_files import file_labels, read_label_file
from ckpt_tools.data.labelled_stream import labelled_batches
from ckpt_tools.data.labels import ClassMap, read_class_map
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError, UsageError

NAMES = ("a 1.png", "b.jpg", "sub/c.png")  # labels 2, 0, 1
CLASSES = ("owl", "ape", "bee")  # in alphabetical order 2, 0, 1


def numbers(
    tmp_path: Path, text: str, names: tuple[str, ...] = NAMES, class_map: ClassMap | None = None
) -> list[int]:
    file = tmp_path / "labels.txt"
    file.write_text(text, encoding="utf-8")
    labels = file_labels(Path("/data/val"), names, read_label_file(file), class_map)
    return labels.values.tolist()


@pytest.mark.parametrize(
    "text",
    [
        "a 1.png,2\nb.jpg,0\nsub/c.png,1\n",
        "name,label\nsub/c.png,1\nb.jpg,0\na 1.png,2\n",
        "\ufefflabel,filename\n1,sub/c.png\n0,b.jpg\n2,a 1.png\n",
        ",Image_ID,class,Class_Idx,split\n0,a 1,owl,2,val\n1,b,ape,0,val\n2,c,bee,1,val\n",
        "picture;kind\na 1.png;2\nb.jpg;0\nc.png;1\n",
        '"a 1.png"\t"2"\r\n"b.jpg"\t"0"\r\n\r\n"./sub/c.png"\t"1"\r\n',
        "a 1.png 2\nb.jpg   0\nsub\\c.png 1",
        "val/a 1.png 2\nval/b.jpg 0\nval/sub/c.png 1\ntrain/b.jpg 3\n",
        "/old/place/a 1.png 2\n/old/place/b.jpg 0\n/old/place/sub/c.png 1\n",
        "2\n0\n1\n",
        "label\n2.0\n0.0\n1.0\n",
        "a 1.png,owl\nb.jpg,ape\nsub/c.png,bee\nelsewhere.png,ape\n",
        "owl\nape\nbee\n",
        "ImageId,PredictionString\nc,bee 85 1 499 272\na 1,owl 1 2 3 4 owl 5 6 7 8\nb,ape 1 2 3 4\n",
    ],
)
def test_the_usual_forms(tmp_path: Path, text: str) -> None:
    assert numbers(tmp_path, text) == [2, 0, 1]


def test_words_of_headers_may_be_labels(tmp_path: Path) -> None:
    assert numbers(tmp_path, "a 1.png y\nb.jpg n\nc.png y") == [1, 0, 1]
    assert numbers(tmp_path, "y\nn\ny") == [1, 0, 1]


def test_a_class_that_no_image_here_has_keeps_its_output(tmp_path: Path) -> None:
    text = "".join(f"{name},{label}\n" for name, label in zip(NAMES, CLASSES, strict=True)) + "x.png,asp\n"
    assert numbers(tmp_path, text) == [3, 0, 2]


def test_a_class_map_numbers_labels_that_are_words_or_numbers(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"1": 7, "0": 8, "2": 9}')
    class_map = read_class_map(tmp_path / "map.json")
    assert numbers(tmp_path, "2\n0\n1\n", class_map=class_map) == [9, 8, 7]
    with pytest.raises(DataError, match=r"labels of .*labels.txt are not in it: 3"):
        numbers(tmp_path, "2\n0\n3\n", class_map=class_map)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("name,label\n", "it has no rows"),
        ("a 1.png,2\nb.jpg,0\n", r"no label for 1 of 3 images of .*val: sub/c.png"),
        ("a 1.png,2\nb.jpg,\nsub/c.png,1\n", r"no label for 1 of 3 images of .*: b.jpg"),
        ("2\n0\n", r"2 labels for the 3 images"),
        ("a 1.png,2\nb.jpg,0\nb.jpg,1\nc.png,1\n", "two labels for b.jpg, '0' and '1'"),
        ("a.png,0,1\nb.png,0,1\n", "3 columns, and no header"),
        ("a.png 1\nb\n", "row 2 has 1 columns, the first has 2"),
        ("train/a 1.png 2\nother/b.jpg 0\nother/sub/c.png 1", "several folders before them"),
    ],
)
def test_what_cannot_be_labels(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        numbers(tmp_path, text)


def test_a_row_for_another_folder_labels_no_image_of_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label for 2 of 2"):
        numbers(tmp_path, "z/1.png 0\nz/2.png 0", names=("x/1.png", "x/2.png"))
    # Two images share the name 1.png, so that a row without folder could mean either.
    with pytest.raises(DataError, match="no label for 2 of 3"):
        numbers(tmp_path, "1.png 0\n2.png 0", names=("x/1.png", "x/2.png", "y/1.png"))


def test_labels_go_with_their_images_and_only_to_folders(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(30):
        Image.fromarray(np.full((4, 4), 8 * number, np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,{number}\n" for number in range(30)))
    label_file = read_label_file(tmp_path / "labels.csv")
    reading, spec = Reading(7, workers=0), InputSpec((1, 4, 4))
    stream = labelled_batches(open_source(str(folder)), spec, reading, label_file=label_file)
    for images, labels in stream:
        assert images[:, 0, 0, 0].mul(255 / 8).round().int().tolist() == labels.tolist()
    with pytest.raises(DataError, match=r"lies in no class folder.*--labels FILE"):
        labelled_batches(open_source(str(folder)), spec, reading)
    np.savez(tmp_path / "val.npz", images=np.zeros((3, 4, 4), np.uint8), labels=[0, 1, 2])
    with pytest.raises(UsageError, match="--labels is for a folder"):
        labelled_batches(open_source(str(tmp_path / "val.npz")), spec, reading, label_file=label_file)
