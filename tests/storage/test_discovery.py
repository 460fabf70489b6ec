"""Which files and folders are checkpoints, and which are not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.location import Location
from ckpt_tools.storage.discovery import find_checkpoints, is_one_checkpoint
from ckpt_tools.storage.output.checkpoint_writer import save
from ckpt_tools.storage.reading import read_checkpoint

STATE = {"bn.running_var": torch.ones(2)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    (root / "a b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "hub").mkdir()
    torch.save(STATE, root / "a b" / "last.pt")
    torch.save(STATE, root / "a b" / "best.PTH")
    torch.save(STATE, root / ".hidden" / "x.pt")
    torch.save(STATE, root / "optimizer.pt")  # of transformers' Trainer
    save_file(STATE, root / "model.safetensors")
    save_file(STATE, root / "hub" / "model.safetensors")
    (root / "hub" / "config.json").write_text("{}")
    (root / "log.txt").write_text("nothing")
    save(
        root / "done.bn.safetensors",
        read_checkpoint(root / "a b" / "last.pt"),
        {},
        provenance={"settings": "x"},
    )
    return root


def places(*paths: Path, **more: list[str]) -> list[str]:
    return [one.place.as_posix() for one in find_checkpoints(paths, **more)]


def test_a_folder_is_searched_to_the_bottom(runs: Path) -> None:
    assert places(runs) == ["model.safetensors", "a b/best.PTH", "a b/last.pt", "hub"]


def test_names_and_places_are_filtered(runs: Path) -> None:
    assert places(runs, include=["*.pt", "*.PTH"]) == ["a b/best.PTH", "a b/last.pt"]
    assert places(runs, include=["a b/*"], exclude=["last*"]) == ["a b/best.PTH"]


def test_patterns_and_files_come_once_each(runs: Path) -> None:
    assert places(runs / "**" / "*.pt", runs / "a b" / "last.pt", exclude=["opt*"]) == ["a b/last.pt"]


def test_equal_names_keep_places_of_their_own(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    torch.save(STATE, other / "last.pt")
    torch.save(STATE, runs / "last.pt")
    assert places(runs / "**" / "last.pt") == ["a b/last.pt", "last.pt"]
    assert places(runs / "a b" / "last.pt", other / "last.pt") == ["runs/a b/last.pt", "other/last.pt"]
    assert places(runs / ".." / "other", runs, include=["last.pt"]) == [
        "other/last.pt",
        "runs/last.pt",
        "runs/a b/last.pt",
    ]
    assert places(runs / "[ab] b" / "*.pt") == ["a b/last.pt"]


def test_a_folder_of_outputs_inside_is_left_out(runs: Path) -> None:
    torch.save(STATE, runs / "a b" / "other.pt")
    found = find_checkpoints([runs], outside=[runs / "a b"])
    assert [one.location.name for one in found] == ["model.safetensors", "hub"]


def test_a_file_that_is_named_counts_whatever_it_is(runs: Path) -> None:
    assert places(runs / "done.bn.safetensors") == ["done.bn.safetensors"]
    assert places(runs / "not-there.pt") == ["not-there.pt"]  # the reader says what is wrong with it


def test_what_the_shell_made_of_a_pattern_is_filtered(runs: Path) -> None:
    torch.save(STATE, runs / "best.pt")
    torch.save(STATE, runs / "last.pt")
    assert places(runs / "best.pt", runs / "last.pt", exclude=["last*"]) == ["best.pt"]
    with pytest.raises(CheckpointError, match="that --include and --exclude leave"):
        places(runs / "last.pt", exclude=["last*"])


def test_patterns_are_for_paths_below_each_searched_folder(runs: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "old").mkdir(parents=True)
        torch.save(STATE, tmp_path / folder / "old" / "x.pt")
        torch.save(STATE, tmp_path / folder / "x.pt")
    assert places(tmp_path / "one", tmp_path / "two", exclude=["old/*"]) == ["one/x.pt", "two/x.pt"]
    assert places(tmp_path / "one", tmp_path / "two", include=["old/*"]) == ["one/old/x.pt", "two/old/x.pt"]


@pytest.mark.parametrize("path", [".", "", "../hub"])
def test_a_folder_that_is_one_checkpoint_has_its_name_for_a_place(
    runs: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs / "hub")
    assert places(Path(path)) == ["hub"]
    (runs / "hub" / "below").mkdir()
    monkeypatch.chdir(runs / "hub" / "below")
    assert places(Path("..")) == ["hub"]


def test_patterns_do_not_leave_their_folder(runs: Path) -> None:
    with pytest.raises(UsageError, match=r"no \.\. behind the first wildcard"):
        find_checkpoints([runs / "*" / ".." / "model.safetensors"])


def test_a_folder_that_cannot_be_read_fails_for_itself(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: str | os.PathLike[str] = ".") -> object:
        if Path(path).name == "a b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # who runs the tests may be root
    assert not is_one_checkpoint(runs)
    assert places(runs) == ["model.safetensors", "hub", "a b"]
    assert places(runs, exclude=["a b"]) == ["model.safetensors", "hub"]
    with pytest.raises(CheckpointError, match=r"a b: expected a folder to search.*Permission denied"):
        find_checkpoints([runs / "a b"])
    assert is_one_checkpoint(runs / "a b")  # whose reader says what is wrong with it


def test_links_that_lead_nowhere_are_found_like_files(runs: Path) -> None:
    for name, target in {
        "self.pt": "self.pt",
        "one.pt": "two.pt",
        "two.pt": "one.pt",
        "gone.pt": "nothing",
    }.items():
        (runs / "a b" / name).symlink_to(target)
    (runs / "again").symlink_to(".")
    (runs / "nowhere").symlink_to("nowhere")
    broken = ["a b/gone.pt", "a b/one.pt", "a b/self.pt", "a b/two.pt"]
    assert sorted({*places(runs)} & {*broken}) == broken
    assert len(places(runs)) == 8
    assert {*broken} < {*places(runs / "**" / "*.pt")}
    for name in broken:
        assert is_one_checkpoint(runs / name)
        with pytest.raises(CheckpointError, match=r"symbolic links|which is not there"):
            read_checkpoint(runs / name)


def test_a_pattern_does_not_follow_links_in_circles(runs: Path) -> None:
    for name in ("one", "two"):
        (runs / name).symlink_to(".")  # glob.glob would try 2^40 paths
    assert places(runs / "**" / "*.pt") == ["a b/last.pt"]
    assert places(runs / "one" / "**" / "last.pt") == ["a b/last.pt"]


def test_a_file_with_several_names_is_found_once(runs: Path) -> None:
    folder = runs / "timm"
    folder.mkdir()
    torch.save(STATE, folder / "checkpoint-9.pth.tar")
    for name in ("last.pth.tar", "model_best.pth.tar"):
        (folder / name).hardlink_to(folder / "checkpoint-9.pth.tar")
    (folder / "a-link.pth.tar").symlink_to("last.pth.tar")
    torch.save(STATE, folder / "checkpoint-8.pth.tar")  # equal bytes, but another file
    names = [
        (one.location.name, [path.name for path in one.also_named]) for one in find_checkpoints([folder])
    ]
    others = ["a-link.pth.tar", "last.pth.tar", "model_best.pth.tar"]
    assert names == [("checkpoint-9.pth.tar", others), ("checkpoint-8.pth.tar", [])]
    given = [folder / "model_best.pth.tar", folder / "last.pth.tar"]
    (found,) = find_checkpoints(given)
    assert (found.location, found.also_named) == (Location(given[0]), (Location(given[1]),))
    (found,) = find_checkpoints([folder], include=["*t*"], exclude=["checkpoint-*"])
    assert found.location.name == "last.pth.tar"
    (found,) = find_checkpoints([folder / "a-link.pth.tar"])
    assert found.also_named == ()


def test_patterns_name_no_outputs_and_nothing_else(runs: Path) -> None:
    (runs / "one.weights").write_bytes(b"x")
    assert places(runs / "*.safetensors") == ["model.safetensors"]
    assert places(runs / "*.weights") == ["one.weights"]
    assert "log.txt" not in places(runs / "*")
    assert places(runs / "a b" / "*") == ["best.PTH", "last.pt"]


def test_patterns_for_folders_and_any_depth(runs: Path) -> None:
    torch.save(STATE, runs / "top.pt")
    for exclude in ("a b", "a b/", "a b/*"):
        assert places(runs, exclude=[exclude]) == ["model.safetensors", "top.pt", "hub"]
    assert places(runs, include=["**/*.pt"]) == ["top.pt", "a b/last.pt"]
    assert places(runs, include=["*.safetensors"]) == ["model.safetensors", "hub"]


def test_data_beside_the_checkpoints_is_none(runs: Path) -> None:
    assert places(runs, outside=[runs / "a b" / "last.pt", runs / "hub"]) == [
        "model.safetensors",
        "a b/best.PTH",
    ]

    assert places(runs / "*", outside=[runs / "a b", runs]) == ["hub", "model.safetensors"]
    assert places(runs / "**" / "*.pt", include=["last*"], outside=[runs.parent]) == ["a b/last.pt"]
    assert places(runs / "**")[:1] == ["model.safetensors"]
    assert "hub/model.safetensors" not in places(runs / "**")


def test_checkpoints_of_a_trainer_lie_below_its_model(runs: Path) -> None:
    for step in ("checkpoint-100", "checkpoint-200"):
        (runs / "hub" / step).mkdir()
        save_file(STATE, runs / "hub" / step / "model.safetensors")
        (runs / "hub" / step / "config.json").write_text("{}")
    (runs / "hub" / "global_step1").mkdir()
    torch.save(STATE, runs / "hub" / "global_step1" / "x.pt")
    assert places(runs)[-3:] == ["hub", "hub/checkpoint-100", "hub/checkpoint-200"]


def test_an_index_of_nothing_makes_no_checkpoint_of_a_folder(runs: Path) -> None:
    (runs / "a b" / "data.index.json").write_text("{}")
    assert places(runs / "a b") == ["best.PTH", "last.pt"]


@pytest.mark.parametrize("path", ["empty", "*.nothing"])
def test_nothing_found_is_an_error(runs: Path, path: str) -> None:
    (runs / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found none"):
        find_checkpoints([runs / path])


def test_one_or_many(runs: Path, tmp_path: Path) -> None:
    assert is_one_checkpoint(runs / "hub")
    assert is_one_checkpoint(runs / "log.txt")
    assert is_one_checkpoint(tmp_path / "not-there")
    assert not is_one_checkpoint(runs)
    assert not is_one_checkpoint(runs / "*.pt")
    single = tmp_path / "single"
    single.mkdir()
    torch.save(STATE, single / "model.pt")
    assert is_one_checkpoint(single)


def test_folders_within_folders_have_an_end(runs: Path) -> None:
    deep = runs / "a b"
    for number in range(80):
        deep = deep / "d"
        deep.mkdir()
        if number == 40:
            torch.save(STATE, deep / "x.pt")
    found = places(runs)
    assert "a b/" + "d/" * 41 + "x.pt" in found
    assert found[-1] == "a b/" + "/".join("d" * 64)  # where the search ended
    assert len(places(runs / "**" / "x.pt")) == 1
