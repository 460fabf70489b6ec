"""``bn-reestimate`` without ``--data``: what is corrected, and what must be known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from ckpt_tools.cli import main


class Tokens(nn.Module):
    """A model of text; ``--arch test_without_data:Tokens``."""

    def __init__(self, drop_rate: float = 0.2) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(20, 8), nn.Dropout(drop_rate)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.drop(self.table(x).mean(1))))


def fix(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bn-reestimate", *map(str, arguments)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_checkpoint_is_corrected_with_its_rates_alone(checkpoint: Path) -> None:
    known = ["--arch", "nets:DenseNet", "--model-kwargs", "drop_rate=0.2", "--input-size", "3,8,8", "-q"]
    result = fix(checkpoint, *known, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["estimator"], facts["data"]["kind"], facts["verdict"]) == ("ratio", "synthetic", None)
    assert "no data" in facts["estimator_reason"]
    before = torch.load(checkpoint)
    after = load_file(checkpoint.with_suffix(".bn.safetensors"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    rewritten = {f"{layer['name']}.running_var" for layer in facts["layers"] if layer["rewritten"]}
    assert changed == rewritten
    assert changed
    assert fix(checkpoint, *known, "--overwrite").exit_code == 0
    again = load_file(checkpoint.with_suffix(".bn.safetensors"))
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--model-kwargs"),
        (["--model-kwargs", "drop_rate=0.2", "--estimator", "exact"], "--data"),
        (["--model-kwargs", "drop_rate=0.2", "--statistics", "mean+variance"], "--data"),
    ],
    ids=["rates", "estimator", "statistics"],
)
def test_what_is_missing_is_named(checkpoint: Path, more: list[str], words: str) -> None:
    result = fix(checkpoint, "--arch", "nets:DenseNet", "--input-size", "3,8,8", "-q", *more)
    assert result.exit_code == 2
    assert words in result.stderr
    assert [file.name for file in checkpoint.parent.iterdir()] == ["net.pt"]


class Codes(Tokens):
    """Takes integers, too, but holds no table of embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.drop(nn.functional.one_hot(x, 8).float().mean(1))))


class Pair(Tokens):
    """Takes two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.norm(self.drop(x + y)))


class Plain(nn.Module):
    """Has no dropout at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("kind", "words"), [(Tokens, "token ids"), (Codes, "token ids"), (Pair, "one tensor of random numbers")]
)
def test_a_model_that_cannot_take_random_numbers_needs_data(
    tmp_path: Path, kind: type[nn.Module], words: str
) -> None:
    torch.save(kind().state_dict(), tmp_path / "net.pt")
    known = ["--arch", f"test_without_data:{kind.__name__}", "--model-kwargs", "drop_rate=0.2"]
    result = fix(tmp_path / "net.pt", *known, "--input-size", "16", "-q")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "--data" in result.stderr


def test_without_any_dropout_site_no_rate_is_asked_for(tmp_path: Path) -> None:
    torch.save(Plain().state_dict(), tmp_path / "net.pt")
    result = fix(tmp_path / "net.pt", "--arch", "test_without_data:Plain", "--input-size", "4", "-q")
    assert result.exit_code == 3
    assert "no dropout site" in result.stderr
