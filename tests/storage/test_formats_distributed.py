"""Distributed checkpoints: what lies beside the model, damage, hostile metadata."""

from __future__ import annotations

import pickle
from pathlib import Path

import format_files
import pytest
import torch
from format_files import trained
from torch import nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.reading import read_checkpoint


@pytest.fixture
def model() -> nn.Module:
    return trained()


def test_distributed_words_and_optimizer(tmp_path: Path, model: nn.Module) -> None:
    checkpoint = read_checkpoint(format_files.distributed(model, tmp_path))
    assert (checkpoint.weights, checkpoint.left_out) == ("model", ("optim",))
    assert checkpoint.words == {"epoch": 3, "args": {"lr": 0.1}}
    assert read_checkpoint(tmp_path / "dcp" / ".metadata").words == checkpoint.words


def test_optimizer_states_stay_on_the_disk(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.storage.dcp import dcp_folder

    read: list[str] = []
    inner = dcp_folder._read_piece
    monkeypatch.setattr(
        dcp_folder,
        "_read_piece",
        lambda folder, name, piece: (read.append(name), inner(folder, name, piece))[1],
    )
    read_checkpoint(format_files.distributed(model, tmp_path))
    assert {name.partition(".")[0] for name in read} == {"model", "epoch", "args"}


def test_lightnings_words_beside_the_shards(tmp_path: Path, model: nn.Module) -> None:
    folder = format_files.distributed_two_ranks(model, tmp_path)
    torch.save({"hyper_parameters": {"arch": "resnet18"}, "epoch": 2}, folder / "meta.pt")
    words = read_checkpoint(folder).words
    assert words == {} or words["hyper_parameters"] == {"arch": "resnet18"}


def test_distributed_damage(tmp_path: Path, model: nn.Module) -> None:
    folder = format_files.distributed_two_ranks(model, tmp_path)
    shard = folder / "__1_0.distcp"
    whole = shard.read_bytes()
    with pytest.raises(CheckpointError, match="Give the folder"):
        read_checkpoint(shard)
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(folder)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        read_checkpoint(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"expected the shard __1_0\.distcp"):
        read_checkpoint(folder)
    for content in (b"", b"junk", pickle.dumps({"a": 1}), (folder / ".metadata").read_bytes()[:-40]):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            read_checkpoint(folder)


def changed_metadata(folder: Path, change: object) -> Path:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    assert callable(change)
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def first_info(metadata: object) -> object:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "model.head.weight")  # type: ignore[attr-defined]


def first_entry(metadata: object) -> object:
    return metadata.state_dict_metadata["model.head.weight"]  # type: ignore[attr-defined]


HOSTILE = {
    "outside": lambda m: setattr(first_info(m), "relative_path", "../secret.distcp"),
    "absolute": lambda m: setattr(first_info(m), "relative_path", "/etc/passwd"),
    "no text": lambda m: setattr(first_info(m), "relative_path", 3),
    "gone": lambda m: setattr(first_info(m), "relative_path", "__7_0.distcp"),
    "beyond": lambda m: setattr(first_info(m), "offset", 2**40),
    "negative": lambda m: setattr(first_info(m), "offset", -1),
    "long": lambda m: setattr(first_info(m), "length", 2**50),
    "claimed twice": lambda m: [
        setattr(x, "offset", 0) or setattr(x, "length", 50_000) for x in m.storage_data.values()
    ],
    "huge": lambda m: setattr(first_entry(m), "size", torch.Size([2**40, 8])),
    "chunk outside": lambda m: setattr(first_entry(m).chunks[0], "offsets", torch.Size([3, 3])),
    "huge chunk": lambda m: [
        setattr(first_entry(m), "size", torch.Size([2**40, 8])),
        setattr(first_entry(m).chunks[0], "sizes", torch.Size([2**40, 8])),
    ],
    "no chunks": lambda m: setattr(first_entry(m), "chunks", []),
    "another dtype": lambda m: setattr(first_entry(m).properties, "dtype", torch.float16),
    "no dtype": lambda m: setattr(first_entry(m), "properties", None),
    "no storage": lambda m: setattr(m, "storage_data", None),
    "no entry": lambda m: m.storage_data.clear(),
    "path of objects": lambda m: m.planner_data.update({"model.head.weight": (("a",), 1.5)}),
    "leaf and container": lambda m: m.planner_data.update({"model.head.weight": ("model",)}),
    "extension": lambda m: setattr(first_info(m), "transform_descriptors", ["zstd"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_metadata(tmp_path: Path, model: nn.Module, what: str) -> None:
    (tmp_path / "secret.distcp").write_bytes(b"secret")
    folder = changed_metadata(format_files.distributed(model, tmp_path), HOSTILE[what])
    with pytest.raises(CheckpointError, match="expected") as caught:
        read_checkpoint(folder)
    assert "secret'" not in str(caught.value)
