"""Files of other tools, and quantised models: refused with a word for what they are."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import format_files
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.contents.quantized import missing_batch_norm
from ckpt_tools.storage.reading import read_checkpoint

# --- other files --------------------------------------------------------------------------------------------

OTHERS = {
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(40),
    "ONNX": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(99),
    "TensorFlow Lite": b"\x1c\x00\x00\x00TFL3" + bytes(99),
    "ExecuTorch": b"\x1c\x00\x00\x00ET12" + bytes(99),
    "SavedModel": b"\x08\x01\x12\xa0\x03" + bytes(99),
    "Core ML": b"\x08\x05\x12\x84\x01\x0a\x0f\x0a\x05image" + bytes(99),
    "compiled Core ML": b"program(1.3)\n[buildInfo = dict",
    "HDF5 file, as Keras": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "msgpack file, as Flax": b"\x81\xa6params\x81\xa4conv" + b"\xff" * 99,
    "XML": b"<?xml version='1.0'?>",
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(99),
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_others(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.bin").write_bytes(OTHERS[what])
    with pytest.raises(CheckpointError, match=rf"(?s)x\.bin: expected.*({what}).*\. [A-Z]"):
        read_checkpoint(tmp_path / "x.bin")


ARCHIVES = {
    "Keras": ["metadata.json", "config.json", "model.weights.h5"],
    r"\.npz": ["a.npy", "b.npy"],
    r"torch\.package": ["x/.data/extern_modules", "x/model/model.pkl"],
    r"PyTorch 1\.3": ["x/model.json", "x/tensors/0"],
    "torch.save did not write": ["readme.txt"],
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_of_others(tmp_path: Path, what: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ARCHIVES[what]:
            archive.writestr(name, b"x")
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(tmp_path / "x.zip")


def test_real_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match=r"\.npz"):
        read_checkpoint(tmp_path / "x.npz")


# --- quantised models ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
def test_quantised_model_without_any_tensor_in_its_keys(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    torch.save(quantised.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="found a quantised model"):
        read_checkpoint(tmp_path / "x.pt")


def test_quantised_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with format_files.quietly():
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        torch.save(quantised.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="quantised"):
        read_checkpoint(tmp_path / "x.pt")


def test_whole_module_with_quantised_layers(tmp_path: Path) -> None:
    plain = torchvision.models.resnet18()
    with format_files.quietly():
        torch.save(torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}), tmp_path / "x.pt")
        torch.save(torchvision.models.quantization.resnet18(quantize=False), tmp_path / "stubs.pt")
    with pytest.raises(CheckpointError, match=r"fc: torch\.ao\.nn\.quantized"):
        read_checkpoint(tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "stubs.pt").shapes == {
        key: tuple(tensor.shape) for key, tensor in plain.state_dict().items()
    }


def test_recorded_stochastic_depth(tmp_path: Path) -> None:
    torch.save(torchvision.models.efficientnet_b0(stochastic_depth_prob=0.3), tmp_path / "x.pt")
    rates = read_checkpoint(tmp_path / "x.pt").words["module"]["rates"]
    assert rates["features.7.0.stochastic_depth"] == {"p": pytest.approx(0.3 * 15 / 16)}


@pytest.mark.parametrize(
    "keys",
    [
        ["conv1.weight", "conv1.scale", "conv1.zero_point"],
        ["fc._packed_params._packed_params", "fc._packed_params.dtype"],
        ["a.weight", "a.weight.absmax", "a.weight.quant_map"],
        ["a.qweight", "a.qzeros", "a.scales", "a.g_idx"],
        ["a.weight", "a.weight_scale", "b.weight", "b.weight_scale"],
    ],
)
def test_quantised_keys(keys: list[str]) -> None:
    assert re.search("quantis", missing_batch_norm(keys) or "")
    assert missing_batch_norm([*keys, "bn.running_var"]) is None


@pytest.mark.parametrize("keys", [["a.weight", "a.scale"], ["norm.scale", "norm.bias"], ["conv.weight"], []])
def test_plain_keys_are_not_quantised(keys: list[str]) -> None:
    assert missing_batch_norm(keys) is None


@pytest.mark.parametrize("given", [".", "x", "x/data.pkl"])
def test_an_unpacked_archive_of_torch_save(tmp_path: Path, given: str) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        archive.extractall(tmp_path / "unpacked")
    message = r"found the unpacked archive of torch\.save.*zip -0 -r model\.pt x$"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "unpacked" / given)


@pytest.mark.parametrize("name", ["Manifest.json", "coremldata.bin", "model.mil"])
def test_folders_of_core_ml(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="Core ML"):
        read_checkpoint(tmp_path)


def test_the_first_version_of_core_ml_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.mlmodel").write_bytes(b"\x08\x01\x12\x30" + bytes(99))
    with pytest.raises(CheckpointError, match="Core ML"):
        read_checkpoint(tmp_path / "x.mlmodel")
