"""Labels stay with their images, whatever the data, and classes that are not the head's are told."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.arrays.array_files import find_array
from ckpt_tools.data.images.image_folder import find_images
from ckpt_tools.data.labelled_stream import LabelledStream, labelled_batches
from ckpt_tools.data.labels import folder_labels, read_class_map
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError, UsageError

GREY = InputSpec((1, 4, 4))


def picture(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two hundred images whose grey value is ten times their class; "b" is empty, one class is nested."""
    root = tmp_path / "val"
    for number in range(200):
        name, grey = [("a", 0), ("c", 20), ("d/deeper", 30)][number % 3]
        picture(root / name / f"{number}.png", grey)
    (root / "b").mkdir()
    (root / ".cache").mkdir()
    return root


def stream(spec: object, class_map: Path | None = None, **reading: object) -> LabelledStream:
    source = open_source(str(spec), split="test")
    known = None if class_map is None else read_class_map(class_map)
    reading = {"batch_size": 7, "workers": 0, **reading}
    return labelled_batches(source, GREY, Reading(**reading), class_map=known)


def read(labelled: LabelledStream) -> tuple[list[int], list[int]]:
    """Grey values and labels, in the order of the pass."""
    batches = [
        (inputs[:, 0, 0, 0].mul(255).round().int().tolist(), labels.tolist()) for inputs, labels in labelled
    ]
    return [x for xs, _ in batches for x in xs], [y for _, ys in batches for y in ys]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_folders_in_alphabetical_order_are_the_classes(folder: Path, workers: int, cached: bool) -> None:
    (folder / "c" / "1.png").write_bytes(b"torn")
    labelled = stream(folder, workers=workers, cached=cached)
    for _ in range(2):
        greys, labels = read(labelled)
        assert greys == [10 * label for label in labels]
        assert (len(labels), len(labelled.skipped_samples), labelled.count) == (199, 1, 200)
    assert sorted(set(labels)) == [0, 2, 3]
    labelled.check(torch.tensor(labels), 4)
    with pytest.raises(DataError, match=r"head with 4 outputs .* this one has 1000.*--class-map"):
        labelled.check(torch.tensor(labels), 1000)


def test_they_are_torchvisions(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    (folder / ".cache").rmdir()
    theirs = ImageFolder(str(folder), allow_empty=True)
    wanted = {Path(path).relative_to(folder).as_posix(): label for path, label in theirs.samples}
    names = find_images(folder)
    assert dict(zip(names, folder_labels(folder, names, None).values.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "numbers", "outputs"),
    [
        ("map.json", '{"a": 7, "c": 1, "d": 1}', {"a": 7, "c": 1, "d": 1}, [8, 1000]),
        ("map.json", '["d", "x", "c", "a"]', {"a": 3, "c": 2, "d": 0}, [4]),
        ("names.txt", "\ufeffd\r\nx\r\nc\r\na\r\n\n", {"a": 3, "c": 2, "d": 0}, [4]),
    ],
)
def test_a_class_map(
    folder: Path, tmp_path: Path, name: str, content: str, numbers: dict[str, int], outputs: list[int]
) -> None:
    (tmp_path / name).write_text(content, "utf-8", newline="")
    labelled = stream(folder, tmp_path / name)
    greys, labels = read(labelled)
    assert labels == [numbers[{0: "a", 20: "c", 30: "d"}[grey]] for grey in greys]
    for count in outputs:
        labelled.check(torch.tensor(labels), count)
    with pytest.raises(DataError, match="head with"):
        labelled.check(torch.tensor(labels), 3)


@pytest.mark.parametrize(
    "content",
    [
        *("", "a\n\nc", "a\nc\na", "a\nc", "{", "{}", "[1, 2]", "[]"),
        *(
            '{"a": "0"}',
            '{"a": 100000000000000000000, "c": 1, "d": 2}',
            '{"a": -1}',
            '{"a": true}',
            '{"a": 0, "c": 1}',
        ),
    ],
)
def test_a_bad_class_map(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "map").write_text(content)
    with pytest.raises(DataError, match="--class-map"):
        stream(folder, tmp_path / "map")


def test_an_unreadable_class_map(tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "none", tmp_path / "map"):
        with pytest.raises(DataError, match="--class-map"):
            read_class_map(path)


def test_loose_images_have_no_class(folder: Path) -> None:
    picture(folder / "loose.png", 0)
    with pytest.raises(DataError, match=r"loose\.png lies in no class folder"):
        stream(folder)


IMAGES = np.repeat(np.arange(50, dtype=np.uint8) * 5, 16).reshape(50, 1, 4, 4)
LABELS = np.arange(50) // 5


def saved(path: Path, kind: str) -> Path:
    x, y = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    if kind == "npz labels":
        np.savez(path / "a.npz", images=IMAGES, labels=LABELS.astype(np.uint8))
    elif kind == "npz x_train":
        np.savez(path / "a.npz", x_train=IMAGES, y_train=LABELS[:, None], y_test=LABELS[::-1])
    elif kind == "npz unnamed":
        np.savez(path / "a.npz", IMAGES, LABELS)
    elif kind == "pt dict":
        torch.save({"data": x, "targets": y}, path / "a.pt")
    elif kind == "pt pair":
        torch.save((x, y), path / "a.pt")
    else:
        save_file({"x": x, "y": y.to(torch.int32)}, path / "a.safetensors")
    return next(path.iterdir())


@pytest.mark.parametrize(
    "kind", ["npz labels", "npz x_train", "npz unnamed", "pt dict", "pt pair", "safetensors"]
)
def test_arrays(tmp_path: Path, kind: str) -> None:
    labelled = stream(saved(tmp_path, kind))
    greys, labels = read(labelled)
    assert sorted(greys) == sorted(IMAGES[:, 0, 0, 0].tolist())
    assert labels == [grey // 25 for grey in greys]
    labelled.check(torch.tensor(labels), 10)
    labelled.check(torch.tensor(labels), 1000)
    with pytest.raises(DataError, match="the label 9 is no class of a head with 9 outputs"):
        labelled.check(torch.tensor(labels), 9)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS.astype(np.float32), "whole numbers, found float32"),
        (LABELS.astype(str), "whole numbers"),
        (np.eye(50, dtype=np.int64), r"shape \(50, 50\)"),
        (LABELS[:49], "50 samples"),
        (LABELS > 3, "whole numbers, found bool"),
        (None, "no labels"),
    ],
)
def test_bad_labels_of_arrays(tmp_path: Path, labels: np.ndarray | None, said: str) -> None:
    more = {} if labels is None else {"labels": labels}
    np.savez(tmp_path / "a.npz", images=IMAGES, **more)
    with pytest.raises(DataError, match=said):
        stream(tmp_path / "a.npz")


def test_negative_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS - 1)
    labelled = stream(tmp_path / "a.npz")
    with pytest.raises(DataError, match="the label -1"):
        labelled.check(torch.tensor(LABELS - 1), 10)


def test_data_sets_give_their_test_split(tmp_path: Path) -> None:
    pixels = np.zeros((4, 3072), np.uint8) + np.arange(4, dtype=np.uint8)[:, None] * 40
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar/test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [0, 4, 8, 2]}))
    (tmp_path / "cifar/test").write_bytes(pickle.dumps({b"data": pixels, b"fine_labels": [0, 4, 8, 2]}))
    for name, outputs in (("cifar10", 10), ("cifar100", 100)):
        labelled = stream(f"{name}:{tmp_path}/cifar")
        greys, labels = read(labelled)
        assert dict(zip(greys, labels, strict=True)) == {0: 0, 40: 4, 80: 8, 120: 2}
        labelled.check(torch.tensor(labels), outputs)
        with pytest.raises(DataError, match=f"head with {outputs} outputs"):
            labelled.check(torch.tensor(labels), 1000)
    with pytest.raises(DataError, match="data_batch_1"):
        open_source(f"cifar10:{tmp_path}/cifar")


def test_mnist_and_svhn_give_their_test_split(tmp_path: Path) -> None:
    from scipy import io as matlab

    images = np.zeros((3, 28, 28), np.uint8) + np.array([10, 20, 30], np.uint8)[:, None, None]
    header = b"".join(n.to_bytes(4, "big") for n in (0x803, 3, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        stream(f"mnist:{tmp_path}")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(
        b"".join(n.to_bytes(4, "big") for n in (0x801, 3)) + bytes([1, 2, 3])
    )
    greys, labels = read(stream(f"mnist:{tmp_path}"))
    assert labels == [grey // 10 for grey in greys]
    cube = np.zeros((32, 32, 3, 3), np.uint8) + np.array([100, 20, 30], np.uint8)
    matlab.savemat(tmp_path / "test_32x32.mat", {"X": cube, "y": np.array([[10], [2], [3]])})
    greys, labels = read(stream(f"svhn:{tmp_path}"))
    assert labels == [grey // 10 % 10 for grey in greys]


MODULE = """
import torch
from torch.utils.data import TensorDataset
x = torch.arange(30.0)[:, None, None, None].div(255).repeat(1, 1, 4, 4)
y = torch.arange(30) // 3
def pairs(): return [(x[:20], y[:20]), (x[20:], y[20:].tolist())]
def dataset(): return TensorDataset(x, y, y + 100)
def dicts(): return [{"pixel_values": x, "labels": y}]
def bare(): return [x]
def alone(): return [(x,)]
def words(): return [(x, ["cat"] * 30)]
def soft(): return [(x, torch.eye(30))]
def short(): return [(x, y[:5])]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_labelled.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_labelled", None)


@pytest.mark.usefixtures("module")
def test_callables() -> None:
    for name in ("pairs", "dataset", "dicts"):
        greys, labels = [], []
        for inputs, wanted in stream(f"my_labelled:{name}"):
            if isinstance(inputs, dict):
                assert list(inputs) == ["pixel_values"]
                inputs = inputs["pixel_values"]
            assert isinstance(inputs, Tensor)
            greys += inputs[:, 0, 0, 0].mul(255).round().int().tolist()
            labels += wanted.tolist()
        assert sorted(greys) == list(range(30))
        assert labels == [grey // 3 for grey in greys]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["bare", "alone", "words", "soft", "short"])
def test_callables_without_usable_labels(name: str) -> None:
    with pytest.raises(DataError, match=r"no labels|class numbers"):
        list(stream(f"my_labelled:{name}"))


@pytest.mark.usefixtures("module")
def test_a_class_map_is_for_folders(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(UsageError, match="names folders"):
        stream("my_labelled:pairs", tmp_path / "map.json")


def test_labels_are_those_of_their_split(tmp_path: Path) -> None:
    x = torch.zeros(4, 3, 8, 8)
    torch.save({"x_train": x, "labels": [0, 1, 2, 3], "x_test": x, "seed": [2**70, 1]}, tmp_path / "train.pt")
    assert find_array(tmp_path / "train.pt", "test").name == "x_train"
    torch.save({"x_test": x, "labels": [0, 1, 2, 3]}, tmp_path / "test.pt")
    found = find_array(tmp_path / "test.pt", "test")
    assert (found.name, found.labels is not None) == ("x_test", True)
    torch.save(
        {"x_train": x, "y_train": [0, 1, 2, 3], "x_test": x, "y_test": [3, 2, 1, 0]}, tmp_path / "both.pt"
    )
    for split, name in (("train", "x_train"), ("test", "x_test")):
        assert find_array(tmp_path / "both.pt", split).name == name  # type: ignore[arg-type]
