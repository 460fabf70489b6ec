"""Data that only the user's code can read gets advice how to give it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from ckpt_tools.data import open_source
from ckpt_tools.data.foreign_data import describe_foreign_names
from ckpt_tools.errors import DataError


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("train.parquet", b"PAR1", "A Parquet file"),
        ("part-0", b"PAR1\x15\x04", "A Parquet file"),
        ("data.HDF5", b"", "An HDF5 file"),
        ("weights", b"\x89HDF\r\n\x1a\n\0", "An HDF5 file"),
        ("data.mdb", b"", "An LMDB database"),
        ("train.tfrecord", b"", "A TFRecord file"),
        ("train.tfrecord-00003-of-00128", b"", "A TFRecord file"),
        ("validation-00003-of-00128", b"", "A TFRecord file"),
        ("cached", b"ARROW1\0\0", "An Arrow file"),
        ("train.csv", b"path,label\n", "A table"),
        ("train.tsv.gz", b"\x1f\x8b", "A table"),
        ("train.jsonl", b"{}", "A JSON file"),
        ("clip.mp4", b"", "A video"),
        ("train.beton", b"", "An FFCV file"),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{name}: {kind} is read by your own code.*package\.module:callable"
    ):
        open_source(str(path))


def test_a_database_by_its_content(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "images")
    database.execute("create table images (x)")
    database.commit()
    database.close()
    with pytest.raises(DataError, match="A database"):
        open_source(str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("data.mdb", "lock.mdb"), "An LMDB database"),
        (("0.parquet", "more/1.parquet", "labels.csv", "README.md"), "A Parquet file"),
        (("train-00000-of-00002", "train-00001-of-00002"), "A TFRecord file"),
        (("data-00000-of-00001.arrow", "dataset_info.json", "state.json"), "An Arrow file"),
    ],
)
def test_folders(tmp_path: Path, names: tuple[str, ...], kind: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"no image .*{kind} is read by your own code"):
        open_source(str(tmp_path))


def test_a_zip_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "train.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="unpack it, and give the folder"):
        open_source(str(tmp_path / "train.zip"))


def test_other_files_are_of_no_known_kind(tmp_path: Path) -> None:
    assert describe_foreign_names(["a.txt", "LICENSE", "b.xml"]) is None
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"found a file \.txt.*package\.module:callable"):
        open_source(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("train.py:Loader", "train:Loader."),
        ("./train.py:Loader.make", "train:Loader.make."),
        ("train.py", "train:NAME."),
        ("missing.py:Loader", "missing:Loader."),
        ("tools/fit.py:data", "fit:data from the folder tools, or tools.fit:data from here."),
        ("../fit.py:data", r"fit:data from the folder \.\., or with PYTHONPATH=\.\."),
        ("train-v2.py:Loader", r"rename it to train_v2\.py, and write train_v2:Loader"),
    ],
)
def test_a_script_is_named_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, advice: str
) -> None:
    (tmp_path / "train.py").write_text("raise RuntimeError('a script may do anything: it is not imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=advice):
        open_source(spec)
