"""Listings of remote folders: whatever a store lists, nothing happens outside the folder of copies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from stores import Lying

from ckpt_tools.cli import main
from ckpt_tools.data.data_source import open_source
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.data.labels import folder_labels
from ckpt_tools.errors import CkptToolsError, RemoteError, UsageError
from ckpt_tools.location import Location
from ckpt_tools.remote.local_copies import fetch_beginning, fetch_file
from ckpt_tools.remote.mirror import open_mirror
from ckpt_tools.remote.remote_store import open_remote
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.storage.reading import read_checkpoint

URL = f"lying://{Lying.folder}"
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where copies go; at the end of every test nothing is there."""
    fsspec.register_implementation("lying", Lying, clobber=True)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("*ckpt-tools*"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    torch.save(nets.trained(nets.DenseNet(), nets.batches(SHAPE)).state_dict(), folder / "x.pt")
    return (folder / "x.pt").read_bytes()


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files_in(folder: Path, *, but: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_relative_to(but)
    }


# Names that lead away, and names that no file here can have; {0} is the absolute path of the test's folder.
LEADING = (
    *("../x.pt", "{0}/x.pt", "a/../../x.pt", "/etc/x.pt", "./x.pt", "a//x.pt", "..\\x.pt", "\\\\host\\x.pt"),
    *("\0.pt", "x\n.pt", "\x1b[2J.pt", "\u202ex.pt", "\ud800.pt", "\udcff.pt", "a::b.pt", "a::file:///etc/x.pt"),
)  # fmt: skip
FLAT = ("C:x.pt", "nul.pt", "com1.pt", "x" * 300 + ".pt")
NESTED = ("C:/x.pt", "a/C:x.pt", "nul/x.pt", "a./x.pt", "d/" * 70 + "x.pt", "x" * 300 + "/x.pt")


def refused(tmp_path: Path, name: str, *command: object) -> None:
    before = files_in(tmp_path, but=tmp_path / "temporary")
    result = cli(*command)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"ckpt-fix: {URL}: expected ")
    assert repr(name)[:100] in line
    assert line.isprintable()
    assert files_in(tmp_path, but=tmp_path / "temporary") == before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", torch.cat(nets.batches(SHAPE)).numpy())
    (tmp_path / "x.pt").write_bytes(b"my only checkpoint")
    return tmp_path


@pytest.mark.parametrize("name", [*LEADING, *FLAT, *NESTED], ids=ascii)
@pytest.mark.parametrize("others", [[], ["a.pt"]], ids=["alone", "with others"])
def test_a_hostile_name_is_refused_in_one_line(
    here: Path, weights: bytes, name: str, others: list[str]
) -> None:
    name = name.format("../" * 40 + str(here).lstrip("/"))
    Lying.tell([*others, name], weights)
    run = [
        "bn-reestimate",
        URL,
        "--arch",
        "nets:DenseNet",
        "--data",
        "data.npy",
        "-q",
        "--output-dir",
        "fixed",
    ]
    if any(part.startswith(".") for part in name.split("/")[:-1]):  # a search leaves out what is hidden
        result = cli(*run)
        assert result.exit_code == (0 if others else 1)
        assert sorted(path.name for path in here.rglob("*.safetensors")) == ["a.bn.safetensors"] * len(others)
        assert (here / "x.pt").read_bytes() == b"my only checkpoint"
        shutil.rmtree("fixed", ignore_errors=True)
    else:
        refused(here, name, *run)
    if name not in NESTED:  # these commands do not look into folders
        refused(here, name, "inspect", URL)
        refused(here, name, "convert", URL, "-o", "c.safetensors")


@pytest.mark.parametrize("name", ["a::b.txt", "../x.log", "x\n.md", "/x", "..\\y", "", "nul"], ids=ascii)
def test_hostile_names_that_nobody_wants_do_not_matter(weights: bytes, name: str) -> None:
    Lying.tell(["a.pt", name], weights)
    with open_mirror():
        assert read_checkpoint(URL).tensors
        assert [found.place.as_posix() for found in find_checkpoints([Location.of(URL)])] == ["a.pt"]


def test_what_is_listed_outside_of_the_folder_is_not_in_it(weights: bytes) -> None:
    Lying.tell(["a.pt"], weights)
    for name in (
        "vault/runs2/b.pt",
        "vault/b.pt",
        "b.pt",
        "/vault/runs/b.pt",
        "lying://vault/runs/b.pt",
        "vault/runs",
    ):
        Lying.entries.append({"name": name, "size": 1, "type": "file"})
    with open_mirror():
        assert [found.place.as_posix() for found in find_checkpoints([Location.of(URL)])] == ["a.pt"]


def test_a_name_that_is_a_file_and_a_folder(weights: bytes) -> None:
    Lying.tell(["a.pt", "a.pt/b.pt"], weights)
    with open_mirror(), pytest.raises(RemoteError, match=r"'a\.pt' to be a file or a folder, found both"):
        find_checkpoints([Location.of(URL)])
    Lying.tell(["a.pt", "a.pt/notes.txt"], weights)
    with open_mirror():
        assert len(find_checkpoints([Location.of(URL)])) == 1


@pytest.mark.parametrize(
    "size", [None, 0, -1, 1 << 50, 1 << 59, 1 << 70, -(1 << 70), "8", "x", 1.5, [1], True]
)
def test_sizes_that_are_not_true(weights: bytes, size: object) -> None:
    Lying.tell(["a.pt"], weights, size=size)
    with open_mirror():
        places = attempt(lambda: find_checkpoints([Location.of(URL)]))
        assert isinstance(places, RemoteError) or len(places) == 1
        content = attempt(lambda: read_checkpoint(f"{URL}/a.pt").tensors)
        assert isinstance(content, RemoteError) or content


def attempt(use: Callable[[], Any]) -> Any:
    """What a call returns, or the error of ours that it raises."""
    try:
        return use()
    except CkptToolsError as error:
        return error


@pytest.mark.parametrize("kind", ["directory", "link", "other", None, 3, ["file"]])
def test_types_that_are_not_true(weights: bytes, kind: object) -> None:
    Lying.tell(["a.pt"], weights, type=kind)
    with open_mirror(), pytest.raises(CkptToolsError, match=r"lying://|ckpt-tools-"):
        read_checkpoint(URL)


@pytest.mark.parametrize(
    "entry", [{}, {"name": None}, {"name": 3, "type": "file"}, {"type": "file"}, None, "a.pt", [1]]
)
def test_entries_that_are_none(weights: bytes, entry: object) -> None:
    Lying.tell(["a.pt"], weights)
    Lying.entries.append(entry)
    with open_mirror():
        for use in (
            lambda: read_checkpoint(URL),
            lambda: find_checkpoints([Location.of(URL)]),
            lambda: open_source(URL),
        ):
            with pytest.raises(CkptToolsError):
                use()


parts = st.sampled_from(
    ["..", ".", "", "a", "x.pt", "\\", "C:", "nul", "\0", "::", "~", "tmp", "x.safetensors", "%2e%2e"]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["", "/", "../../../../"]), st.lists(parts, max_size=4)), max_size=3)
)
def test_nothing_is_written_elsewhere(tmp_path: Path, names: list[tuple[str, list[str]]]) -> None:
    Lying.tell([start + "/".join([*inner, "x.pt"]) for start, inner in names], b"content")
    outside = tmp_path / "temporary"
    for use in (lambda: find_checkpoints([Location.of(URL)]), lambda: read_checkpoint(URL)):
        with open_mirror() as mirror:
            assert "\n" not in str(attempt(use))
            assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(mirror.folder)} == {
                outside
            }
            for path in mirror.folder.rglob("*"):
                assert not path.is_symlink()
                assert path.stat().st_nlink == 1 or path.is_dir()


# Places and copies


@pytest.mark.parametrize(
    "path", ["b/C:/x.pt", "b/nul", "b/x\n.pt", "b/x\u202e.pt", "b\\x.pt", "b/" + "x" * 300, "d/" * 80 + "x"]
)
def test_urls_that_have_no_place(path: str) -> None:
    with open_mirror(), pytest.raises(UsageError, match="expected the name of a file below it"):
        Location.of(f"lying://{path}")


def test_copies_are_new_files_that_nobody_else_reads(weights: bytes, tmp_path: Path) -> None:
    Lying.tell(["a.pt"], weights)
    precious = tmp_path / "precious.pt"
    precious.write_bytes(b"my only checkpoint")
    with open_mirror() as mirror:
        location = Location.of(f"{URL}/a.pt")
        store, place = location.store, location.path
        mirror.make_folder(place.parent)
        assert mirror.folder.stat().st_mode & 0o077 == 0
        for copy in (lambda: fetch_beginning(store, place, 4), lambda: fetch_file(store, place)):
            place.unlink(missing_ok=True)
            place.symlink_to(precious)  # as nobody can put it there but ourselves
            copy()
            assert not place.is_symlink()
            assert precious.read_bytes() == b"my only checkpoint"
        assert place.read_bytes() == weights


def test_a_file_system_that_refuses_a_name(weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    Lying.tell(["a.pt"], weights)

    def refuse(source: object, target: object) -> None:
        raise OSError(36, "File name too long")

    monkeypatch.setattr(os, "replace", refuse)
    with open_mirror():
        for use in (lambda: read_checkpoint(f"{URL}/a.pt"), lambda: find_checkpoints([Location.of(URL)])):
            with pytest.raises(
                RemoteError, match=r"lying://vault/runs/a\.pt: its copy .* \(File name too long\)"
            ):
                use()


# Data


def png() -> bytes:
    with tempfile.SpooledTemporaryFile() as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")
        file.seek(0)
        return file.read()


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a\\x.png", "x\n.png", "a//x.png", "\0.png"], ids=ascii
)
def test_images_with_hostile_names(name: str) -> None:
    Lying.tell(["cat/1.png", name], png())
    if name.startswith(".."):  # hidden, as all that begins with a dot
        assert open_source(URL).count == 1
    else:
        with pytest.raises(RemoteError) as caught:
            open_source(URL)
        assert f"{URL}: expected " in str(caught.value)
        assert repr(name) in str(caught.value)


def test_images_may_have_names_that_no_file_here_can_have() -> None:
    Lying.tell(["con/1.png", "aux/2.png", "C:/3.png", "x" * 300 + "/4.png"], png())
    assert open_source(URL).count == 4  # they are read from the store, and have no place here


def test_folders_that_a_store_does_not_list() -> None:
    Lying.tell(["cat/1.png", "dog/2.png"], png())
    root = RemoteFolder(open_remote(URL))
    assert folder_labels(root, ["cat/1.png", "dog/2.png"], None).values.tolist() == [0, 1]


@pytest.mark.parametrize(
    "name", ["../x.tar", "a::file:///x.tar", "/x.tar", "x\n.tar", "..\\x.tar"], ids=ascii
)
def test_shards_with_hostile_names(name: str) -> None:
    Lying.tell(["a.tar", name], b"")
    for url in (URL, f"{URL}/*.tar")[: 1 if "/" in name else 2]:  # * matches no slash
        with pytest.raises(RemoteError) as caught:
            open_source(url)
        assert repr(name) in str(caught.value)
