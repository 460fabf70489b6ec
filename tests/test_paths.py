"""Names from outside: what becomes a path below a folder, what is refused, and where links may lead."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import format_files
import nets
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_tools.cli import main
from ckpt_tools.errors import CheckpointError, DataError
from ckpt_tools.paths import (
    folds_case,
    matching_paths,
    name_fault,
    path_below,
    require_distinct,
)
from ckpt_tools.storage.reading import read_checkpoint

HOSTILE = (
    *("..", ".", "", "../x.pt", "a/../../x.pt", "a/..", "a//x.pt", "a/", "./x.pt", "a/./x.pt"),
    *("/etc/x.pt", "//host/x"),
    *("..\\x.pt", "a\\..\\..\\x.pt", "\\\\host\\share\\x.pt", "C:x.pt", "c:/x.pt", "C:\\x.pt", "a/C:x.pt"),
    *("x\0.pt", "x\n.pt", "x\r.pt", "x\x1b[2J.pt", "x\x7f.pt", "x\x85.pt"),
    *("x\u2028.pt", "x\u202etp.pt", "x\u2066.pt"),
    *("NUL", "nul.pt", "Con.tar.pt", "aux", "a/PRN/x.pt", "com1.pt", "LPT9", "COM¹.pt", "CONIN$", "nul .pt"),
    *("x.pt.", "x.pt ", "x./y.pt"),
    *("x" * 256, "é" * 128, "a/" * 3000 + "x.pt", "\ud800.pt", "\udcff.pt"),
    *(None, 3, b"x.pt", ["x.pt"], {"x.pt": 1}, Path("x.pt"), True),
)  # fmt: skip
HARMLESS = (
    *("x.pt", ".metadata", "model-00001-of-00002.safetensors", "run 2024-01-01T10:00:00"),
    *("..x", "x..y", "...x", "~"),
    *("null.pt", "console", "com10", "com.pt", "é.pt", "模型.pt", "a'b\"c`d$e", "-rf", "%2e%2e", "x" * 255),
)  # fmt: skip

folders = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names(tmp_path: Path, name: object, nested: bool) -> None:
    with pytest.raises(DataError) as caught:
        path_below(tmp_path, name, origin="the listing", error=DataError, nested=nested)
    said = str(caught.value)
    assert said.startswith("the listing: expected ")
    assert said.isprintable()
    assert len(said) < 2000
    if isinstance(name, str) and len(name) < 100:
        assert repr(name) in said


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_names(tmp_path: Path, name: str) -> None:
    assert path_below(tmp_path, name, origin="x") == tmp_path / name
    assert path_below(tmp_path, f"a/{name}", origin="x", nested=True) == tmp_path / "a" / name
    with pytest.raises(CheckpointError, match="in another folder"):
        path_below(tmp_path, f"a/{name}", origin="x")


pieces = st.one_of(
    st.sampled_from(
        ["..", ".", "/", "\\", "C:", "nul", "x", "a.pt", "\0", "\n", "\u202e", "\ud800", "::", "~", " "]
    ),
    st.text(max_size=4),
)


@settings(max_examples=300)
@given(st.lists(pieces, max_size=8).map("".join))
def test_what_is_taken_is_a_file_below_on_every_system(name: str) -> None:
    if name_fault(name, nested=True) is not None:
        return
    for system in (PurePosixPath, PureWindowsPath):
        root = system("/mirror") if system is PurePosixPath else system("D:\\mirror")
        path = root / name
        assert root in path.parents
        assert path.relative_to(root).parts == tuple(name.split("/"))
        assert not path.relative_to(root).is_reserved()
    assert os.path.normpath(f"/mirror/{name}") == f"/mirror/{name}"
    with tempfile.TemporaryDirectory() as folder:  # and the file system takes it
        path = path_below(Path(folder), name, origin="x", nested=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert [found for found in Path(folder).rglob("*") if found.is_file()] == [path]


def test_names_that_cannot_all_be_files() -> None:
    require_distinct(["a.pt", "A.pt", "b/a.pt", "b/c/a.pt"], origin="x")
    with pytest.raises(CheckpointError, match=r"'a\.pt' to be a file or a folder, found both.*'a\.pt/b\.pt'"):
        require_distinct(["a.pt/b.pt", "a.pt"], origin="x")
    for one, other in (("a.pt", "A.pt"), ("b/STRASSE", "b/straße"), ("é", "e\u0301")):
        require_distinct([one, other], origin="x")
        with pytest.raises(CheckpointError, match="Rename one of them"):
            require_distinct([one, other], origin="x", fold=True)


def test_whether_case_counts(tmp_path: Path) -> None:
    folder = tmp_path / "Folder"
    folder.mkdir()
    assert folds_case(folder) == (tmp_path / "fOLDER").exists()


# Links


@folders
def test_links_out_of_a_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "real").mkdir(parents=True)
    outside.mkdir()
    for file in (folder / "real" / "x.pt", outside / "x.pt"):
        file.write_bytes(b"")
    links = {
        "inside.pt": "real/x.pt", "linked": "real", "absolute.pt": str(outside / "x.pt"),
        "relative.pt": "../outside/x.pt", "twice.pt": "relative.pt", "away": "../outside", "root": "/",
        "self.pt": "self.pt",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (tmp_path / "mine").symlink_to("folder")  # links on the way to the folder are the user's
    for root in (folder, tmp_path / "mine"):
        for name in ("inside.pt", "real/x.pt", "linked/x.pt", "self.pt", "real/nothing.pt"):
            assert path_below(root, name, origin="x", nested=True) == root / name
        for name in (
            "absolute.pt",
            "relative.pt",
            "twice.pt",
            "away/x.pt",
            "away/nothing",
            "root/etc/passwd",
        ):
            with pytest.raises(CheckpointError, match="a link that leads out of it, to /"):
                path_below(root, name, origin="x", nested=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub keeps it: all of its files are links to ../../blobs."""
    snapshot = tmp_path / "hub" / "models--timm--net" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot


def blob(snapshot: Path, name: str, content: bytes) -> None:
    path = snapshot / name
    path.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * (2 + name.count("/"))
    target = snapshot.parent.parent / "blobs" / f"hash-of-{name.replace('/', '-')}"
    target.write_bytes(content)
    path.symlink_to(f"{up}blobs/{target.name}")


def sharded(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    state = {"a.running_var": torch.ones(2), "b.running_var": torch.zeros(2)}
    shard_of = {key: f"model-{number}.safetensors" for number, key in enumerate(state)}
    for key, name in shard_of.items():
        save_file({key: state[key]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@folders
@pytest.mark.parametrize("way", ["snapshot", "index", "linked folder", "relative"])
def test_the_cache_of_the_hub_is_read(
    cache: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in sharded(tmp_path / "source").items():
        blob(cache, name, content)
    (tmp_path / "mine").symlink_to(cache)
    monkeypatch.chdir(cache)
    path = {
        "snapshot": cache,
        "index": cache / "model.safetensors.index.json",
        "linked folder": tmp_path / "mine",
    }
    found = read_checkpoint(path.get(way, Path("model.safetensors.index.json")))
    assert list(found.tensors) == ["a.running_var", "b.running_var"]
    assert found.words["config"] == {"architecture": "resnet18"}


@folders
def test_a_single_file_in_the_cache_of_the_hub(cache: Path, tmp_path: Path) -> None:
    for name, content in sharded(tmp_path / "source").items():
        blob(cache, f"unet/{name}", content)
    for path in (cache / "unet", cache / "unet" / "model-0.safetensors"):
        assert read_checkpoint(path).tensors
    blob(cache, "model.safetensors", (tmp_path / "source" / "model-0.safetensors").read_bytes())
    assert read_checkpoint(cache).tensors


@folders
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model-0.safetensors", "../../../../secret/model-0.safetensors"),
        ("model-0.safetensors", "../../refs/model-0.safetensors"),
        ("model-0.safetensors", "../../../models--other--net/blobs/model-0.safetensors"),
        ("config.json", "../../../../secret/config.json"),
        ("model.safetensors.index.json", "../../../../secret/model.safetensors.index.json"),
    ],
)
def test_other_links_in_the_cache_of_the_hub(cache: Path, tmp_path: Path, name: str, target: str) -> None:
    files = sharded(tmp_path / "source")
    for file, content in files.items():
        blob(cache, file, content)
    (cache / name).unlink()
    (cache / name).symlink_to(target)
    (cache / target).parent.mkdir(parents=True, exist_ok=True)
    (cache / target).write_bytes(files[name])
    with pytest.raises(CheckpointError, match="a link that leads out of it"):
        read_checkpoint(cache)


@folders
def test_a_folder_of_blobs_that_is_a_link(cache: Path, tmp_path: Path) -> None:
    for name, content in sharded(tmp_path / "source").items():
        blob(cache, name, content)
    blobs = cache.parent.parent / "blobs"
    blobs.rename(tmp_path / "secret")
    blobs.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link that leads out of it"):
        read_checkpoint(cache)


# What files say: every road from a name in a file to a path


@folders
@pytest.mark.parametrize("what", ["shard", "config.json", "index", "shard of a rank"])
def test_files_of_a_checkpoint_that_are_links_out_of_it(tmp_path: Path, what: str) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    if what == "shard of a rank":
        format_files.hugging_face_two_ranks(nets.DenseNet(), tmp_path).rename(folder)
        name = next(path.name for path in sorted(folder.iterdir()))
    else:
        sharded(folder)
        name = {"shard": "model-1.safetensors", "index": "model.safetensors.index.json"}.get(what, what)
    assert read_checkpoint(folder).tensors
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that leads out of it, to ") as caught:
        read_checkpoint(folder)
    assert name in str(caught.value)


@folders
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_files_of_a_distributed_checkpoint_that_are_links_out_of_it(tmp_path: Path, name: str) -> None:
    folder = format_files.distributed(nets.DenseNet(), tmp_path)
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link that leads out of it"):
        read_checkpoint(folder)


NAMES = [name for name in HOSTILE if name is None or isinstance(name, (str, int, list))]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_index_with_a_hostile_name(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "folder"
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a.running_var": "model-0.safetensors", "b.running_var": name}})
    )
    before = sorted(tmp_path.rglob("*"))
    for command in (["inspect"], ["convert", "-o", str(tmp_path / "out.safetensors")]):
        result = CliRunner().invoke(main, [command[0], str(folder), *command[1:]])
        assert result.exit_code == 1
        assert f"{index}: expected the name of a file beside it, found" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(name, str)], ids=ascii)
def test_metadata_with_a_hostile_name(tmp_path: Path, name: str) -> None:
    folder = format_files.distributed(nets.DenseNet(), tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    try:
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    except UnicodeEncodeError:
        pytest.skip("pickle does not write it")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert str(folder / ".metadata") in str(caught.value)
    assert len(name) > 100 or repr(name) in str(caught.value)


# Patterns


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("x.pt", "a/x.pt", "a/b/x.pt", "a/.b/x.pt", ".c/x.pt", "a[1]/x.pt", "a/y.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["*", "**", "**/*.pt", "a/**/x.pt", "**/b/*", "*/x.pt", "**/**/x.pt", "a/**", "[ax]*", "no"]
)
def test_patterns_match_what_glob_matches(tree: Path, pattern: str) -> None:
    import glob

    for given_pattern in (pattern, str(tree / pattern)):
        wanted = {Path(match) for match in glob.glob(given_pattern, recursive=True) if match}  # noqa: PTH207
        assert {path for path in matching_paths(given_pattern) if path != Path()} == wanted - {Path()}
