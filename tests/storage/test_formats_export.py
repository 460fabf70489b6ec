"""TorchScript and torch.export: only parameters and persistent buffers, damage is one clear error."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import format_files
import pytest
import torch
from format_files import Maker, assert_holds, maker_id, trained
from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.reading import read_checkpoint


@pytest.fixture
def model() -> nn.Module:
    return trained()


# --- TorchScript --------------------------------------------------------------------------------------------


class Extras(nn.Module):
    """What is no state: a plain tensor attribute, and a module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.again = self.first
        self.mean = torch.ones(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x - self.mean))


@pytest.mark.parametrize("script", [True, False])
def test_only_parameters_and_buffers_of_a_script(tmp_path: Path, script: bool) -> None:
    model = Extras().eval()
    with format_files.quietly():
        archive = torch.jit.script(model) if script else torch.jit.trace(model, torch.randn(2, 3, 4, 4))
        torch.jit.save(archive, tmp_path / "x.pt", _extra_files={"labels.txt": "a b"})
    assert_holds(read_checkpoint(tmp_path / "x.pt"), model.state_dict())


def test_frozen_script(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"freezing.*folds BatchNorm"):
        read_checkpoint(format_files.frozen(model, tmp_path))


# --- torch.export -------------------------------------------------------------------------------------------


class Passing(nn.Module):
    """A buffer that is not saved, tied weights, an empty one, and one of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("wide", torch.arange(12).reshape(3, 4).t().bfloat16())
        self.register_buffer("empty", torch.ones(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x * self.mask)) + self.wide.sum() + self.empty.sum()


@pytest.mark.parametrize(
    "maker", [format_files.exported, format_files.exported_2_6, format_files.exported_2_8], ids=maker_id
)
def test_persistent_state_of_an_exported_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Maker
) -> None:
    monkeypatch.setattr(format_files, "example", lambda: torch.randn(2, 3))
    model = Passing()
    checkpoint = read_checkpoint(maker(model, tmp_path))
    assert_holds(checkpoint, model.state_dict())
    assert checkpoint.format == "torch.export"


def rewritten(path: Path, name: str, change: object) -> Path:
    """The archive with one record (by the end of its name) changed by a function, or gone."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith(name):
                content = change(content) if callable(change) else None
            if content is not None:
                archive.writestr(info.filename, content)
    return target


CONFIG = "model_weights_config.json"


def edited(**changes: object) -> object:
    def change(content: bytes) -> bytes:
        config = json.loads(content)
        entry = config["config"]["head.weight"]
        (entry if "path_name" in changes else entry["tensor_meta"]).update(changes)
        return json.dumps(config).encode()

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CONFIG, edited(sizes=[{"as_int": 2**40}, {"as_int": 8}])),
        (CONFIG, edited(sizes=[{"as_int": -1}, {"as_int": 8}])),
        (
            CONFIG,
            edited(strides=[{"as_int": 0}, {"as_int": 0}], sizes=[{"as_int": 2**20}, {"as_int": 2**20}]),
        ),
        (CONFIG, edited(storage_offset={"as_int": 10})),
        (CONFIG, edited(storage_offset={"as_expr": "s0"})),
        (CONFIG, edited(dtype=99)),
        (CONFIG, edited(dtype=[])),
        (CONFIG, edited(layout=1)),
        (CONFIG, edited(path_name="../../etc/passwd")),
        (CONFIG, edited(path_name=3)),
        (CONFIG, lambda content: b"{"),
        (CONFIG, lambda content: b"[]"),
        (CONFIG, lambda content: b"[" * 100_000),
        (CONFIG, lambda content: b'{"config": {"a": null}}'),
        (CONFIG, None),
        ("weight_3", None),
        ("weight_3", lambda content: content[:-1]),
        ("byteorder", lambda content: b"big"),
    ],
)
def test_damaged_exported_program(tmp_path: Path, model: nn.Module, name: str, change: object) -> None:
    path = rewritten(format_files.exported(model, tmp_path), name, change)
    with pytest.raises(CheckpointError, match=r"expected the (archive|weights)"):
        read_checkpoint(path)


def test_truncated_archives(tmp_path: Path, model: nn.Module) -> None:
    for maker in (format_files.exported, format_files.scripted, format_files.whole_module):
        path = maker(model, tmp_path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match="cut short"):
            read_checkpoint(path)


def test_compiled_package(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        for name in ("archive_format", "data/aotinductor/model/wrapper.so"):
            archive.writestr(f"x/{name}", b"pt2")
    with pytest.raises(CheckpointError, match="AOTInductor"):
        read_checkpoint(tmp_path / "x.pt2")


def test_compressed_export_is_read_by_copying(tmp_path: Path, model: nn.Module) -> None:
    path = format_files.exported(model, tmp_path)
    target = tmp_path / "packed.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in source.infolist():
            archive.writestr(info.filename, source.read(info))
    assert_holds(read_checkpoint(target), model.state_dict())
