"""Folders that are one checkpoint: weights with their config, the files of trainers, damage."""

from __future__ import annotations

from pathlib import Path

import format_files
import pytest
import torch
from format_files import assert_holds
from safetensors.torch import save_file

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.reading import read_checkpoint


def test_transformers_folder(tmp_path: Path) -> None:
    with format_files.quietly():
        from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = ResNetForImageClassification(config)
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
        ConvNextImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "one")
    for path in (tmp_path / "one", tmp_path / "one" / "model.safetensors", tmp_path / "shards"):
        checkpoint = read_checkpoint(path)
        assert_holds(checkpoint, model.state_dict())
        assert checkpoint.words["config"]["architectures"] == ["ResNetForImageClassification"]
        assert checkpoint.words.get("preprocessor", {}).get("image_mean") == (
            [0.1, 0.2, 0.3] if "one" in str(path) else None
        )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_timm_hub_folder(tmp_path: Path, safe: object) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_byobnet", num_classes=7)
    with format_files.quietly():
        save_for_hf(model, str(tmp_path), model_args={"drop_rate": 0.2}, safe_serialization=safe)
    checkpoint = read_checkpoint(tmp_path)
    assert_holds(checkpoint, model.state_dict())
    assert checkpoint.format == ("torch.save" if safe is False else "safetensors")
    config = checkpoint.words["config"]
    assert (config["architecture"], config["num_classes"]) == ("test_byobnet", 7)
    assert config["model_args"]["drop_rate"] == 0.2
    file = tmp_path / ("pytorch_model.bin" if safe is False else "model.safetensors")
    assert read_checkpoint(file).words == checkpoint.words


def test_trainer_files_beside_the_weights(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        torch.save({"state": {}}, tmp_path / name)
    assert list(read_checkpoint(tmp_path).tensors) == ["a.weight"]


def test_unrelated_settings_do_not_mislead(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "best.pt")
    (tmp_path / "config.json").write_text('{"learning_rate": 3}')
    assert read_checkpoint(tmp_path / "model.safetensors").words == {}
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    assert read_checkpoint(tmp_path / "best.pt").words == {}
    assert read_checkpoint(tmp_path / "model.safetensors").words == {"config": {"architecture": "resnet50"}}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udce4", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json.*--arch"):
        read_checkpoint(tmp_path)


FOLDERS = {
    "SavedModel": ["saved_model.pb"],
    "TensorFlow checkpoint": ["checkpoint", "model.ckpt-5.index", "model.ckpt-5.data-00000-of-00001"],
    "Orbax": ["_METADATA", "manifest.ocdbt"],
    "without PyTorch weights": ["config.json", "flax_model.msgpack"],
    "mp_rank_00_model_states": ["latest", "zero_to_fp32.py"],
    r"without their \.metadata": ["__0_0.distcp"],
    "no checkpoint in it": ["notes.txt"],
    "2 candidates": ["a.pt", "b.pt"],
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_of_others(tmp_path: Path, what: str) -> None:
    for name in FOLDERS[what]:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(tmp_path)
