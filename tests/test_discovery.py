"""Which files and folders are checkpoints, and which are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.discovery import find_checkpoints, is_one_checkpoint
from ckpt_tools.storage.read import read_checkpoint
from ckpt_tools.storage.write import save

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
    save(root / "done.bn.safetensors", read_checkpoint(root / "a b" / "last.pt"), {}, provenance={"settings": "x"})
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
    assert [one.path.name for one in found] == ["model.safetensors", "hub"]


def test_a_file_that_is_named_counts_whatever_it_is(runs: Path) -> None:
    assert places(runs / "done.bn.safetensors") == ["done.bn.safetensors"]
    assert places(runs / "not-there.pt") == ["not-there.pt"]  # the reader says what is wrong with it


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
