"""Noise that stays on in the evaluation pass: the text and the JSON of the commands name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from ckpt_tools.cli import main


class Jittered(nn.Module):
    """Adds noise whatever the mode, and drops in training; ``--arch test_noise_report:Jittered``."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.jitter, self.norm = nn.Dropout(0.3), Jitter(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.jitter(self.drop(x))).mean((2, 3))


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn_like(x)


def fix(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = nets.batches((3, 8, 8))
    np.save(tmp_path / "data.npy", torch.cat(batches).numpy())
    model = Jittered().train()
    for _ in range(20):
        for batch in batches:
            model(batch)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("data", [["--data", "data.npy"], []], ids=["data", "none"])
def test_bn_reestimate_names_it(checkpoint: Path, data: list[str]) -> None:
    command = ["bn-reestimate", checkpoint, *data, "--arch", "test_noise_report:Jittered"]
    command += ["--dropout", "drop=0.0"]  # it has its own; with this, the rates are known
    command += ["--input-size", "3,8,8", "-q", "--dry-run"]
    text = fix(*command)
    assert text.exit_code == 0, text.output
    assert "WARNING: noise stayed on in evaluation mode: jitter (aten.randn_like)" in text.stdout
    facts = json.loads(fix(*command, "--json").stdout)
    assert facts["noise_left_on"] == [{"name": "jitter", "op": "aten.randn_like", "rate": None}]
    assert any("jitter" in warning for warning in facts["warnings"])
    assert fix(*command, "--strict").exit_code == 4


def test_inspect_names_it(checkpoint: Path) -> None:
    command = ["inspect", checkpoint, "--data", "data.npy", "--arch", "test_noise_report:Jittered"]
    text = fix(*command)
    assert text.exit_code == 0, text.output
    assert "Besides, noise stayed on in evaluation mode: jitter (aten.randn_like)" in text.stdout
    facts = json.loads(fix(*command, "--json").stdout)
    assert facts["explanation"]["noise_left_on"][0]["name"] == "jitter"
