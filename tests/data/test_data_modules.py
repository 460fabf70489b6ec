"""DataModules give their loaders, whether Lightning is there or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt_tools.data import open_source
from ckpt_tools.data.labelled_stream import labelled_batches
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError

MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def rows(first): return TensorDataset(torch.arange(first, first + 20.0)[:, None], torch.arange(20) % 2)

class Plain:  # no base class
    def __init__(self, size=5): self.size, self.calls = size, []
    def prepare_data(self): self.calls.append("prepare_data")
    def setup(self, stage):
        self.calls.append(stage)
        self.first = {"fit": 0, "validate": 100, "test": 200}[stage]
    def train_dataloader(self): return DataLoader(rows(self.first), self.size, shuffle=True)
    def val_dataloader(self): return [DataLoader(rows(self.first), self.size)]

class Tested(Plain):
    val_dataloader = None
    def test_dataloader(self): return {"only": DataLoader(rows(self.first), self.size)}

class WithoutStage:
    def setup(self): self.first = 40
    def train_dataloader(self): return DataLoader(rows(self.first), 5)

class Bare:
    def train_dataloader(self): return rows(60)  # a Dataset

class Several(Bare):
    def train_dataloader(self): return [rows(0), rows(1)]

class Broken(Bare):
    def train_dataloader(self): raise OSError("not downloaded")

class Needy(Bare):
    def __init__(self, folder): pass

def factory(): return Plain(4)
instance = Plain(10)
"""
LIGHTNING = """
import lightning
from my_modules import rows
from torch.utils.data import DataLoader

class Module(lightning.LightningDataModule):
    def setup(self, stage=None): self.first = {"fit": 0, "test": 200}[stage]
    def train_dataloader(self): return DataLoader(rows(self.first), 5)
    def test_dataloader(self): return DataLoader(rows(self.first), 5)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_modules.py").write_text(MODULE)
    (tmp_path / "my_lightning.py").write_text(LIGHTNING)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_modules", "my_lightning"):
        sys.modules.pop(name, None)


def values(spec: str) -> list[int]:
    """The inputs of a pass, sorted; a second pass has them in the same order."""
    stream = open_source(spec).batches(None, Reading(7, workers=0))
    passes = [torch.cat([_inputs(batch) for batch in stream]) for _ in range(2)]
    assert torch.equal(*passes)
    return sorted(passes[0].flatten().int().tolist())


def _inputs(batch: object) -> torch.Tensor:
    return batch[0] if isinstance(batch, list) else batch  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "first"),
    [("Plain", 0), ("factory", 0), ("instance", 0), ("Tested", 0), ("WithoutStage", 40), ("Bare", 60)],
)
def test_training_data(name: str, first: int) -> None:
    assert values(f"my_modules:{name}") == list(range(first, first + 20))


def test_it_is_prepared_and_set_up_once() -> None:
    assert values("my_modules:instance") == list(range(20))
    assert sys.modules["my_modules"].instance.calls == ["prepare_data", "fit"]


@pytest.mark.parametrize(("name", "first"), [("Plain", 100), ("Tested", 200)])
def test_labelled_data_is_that_for_validation_or_tests(name: str, first: int) -> None:
    source = open_source(f"my_modules:{name}", split="test")
    batches = list(labelled_batches(source, None, Reading(7, workers=0)))
    assert torch.cat([inputs for inputs, _ in batches]).flatten().tolist() == list(range(first, first + 20))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1] * 10


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("Several", "train", r"Several.train_dataloader\(\) returned 2 loaders, expected one"),
        ("Broken", "train", "raised OSError: not downloaded"),
        ("Needy", "train", "raised TypeError"),
        ("Bare", "test", "expected a method val_dataloader or test_dataloader"),
    ],
)
def test_what_cannot_be_read(name: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(f"my_modules:{name}", split=split)  # type: ignore[arg-type]


def test_lightnings_own_class() -> None:
    pytest.importorskip("lightning")
    assert values("my_lightning:Module") == list(range(20))
    # The base class has a val_dataloader, which raises.
    source = open_source("my_lightning:Module", split="test")
    inputs, _ = next(iter(labelled_batches(source, None, Reading(7, workers=0))))
    assert inputs.flatten().tolist() == [200, 201, 202, 203, 204]
