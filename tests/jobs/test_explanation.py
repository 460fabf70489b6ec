"""``inspect --data``: each reason why eval mode may be worse than training is told from the others."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from ckpt_tools.cli import main

RATE = ("--model-kwargs", "drop_rate=0.3")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def inspect(file: Path, data: Tensor, *more: object) -> dict:
    np.save(file.parent / "data.npy", data.numpy())
    arguments = ("inspect", file, "--arch", "nets:DenseNet", "--data", file.parent / "data.npy", *more)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    explanation = json.loads(result.stdout)["explanation"]
    text = run(*arguments).stdout
    # The same words and the same command for a reader as for a program.
    assert explanation["text"] in text
    assert explanation["command"] is None or explanation["command"] in text
    return explanation


def images() -> Tensor:
    return torch.cat(nets.batches((3, 8, 8), count=16))


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """Trained with dropout 0.3."""
    return saved(tmp_path, nets.DenseNet(0.3))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Trained without dropout."""
    return saved(tmp_path, nets.DenseNet(0.0))


def saved(folder: Path, model: nets.DenseNet) -> Path:
    torch.manual_seed(0)
    model = nets.trained(model, list(images().split(32)), steps=160)
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def test_dropout_alone(dropped: Path) -> None:
    found = inspect(dropped, images(), *RATE)
    assert (found["cause"], found["dropout_shifts"], found["verdict"]["level"]) == ("dropout", True, "agree")
    assert "In eval mode dropout is off" in found["text"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    for layer in layers.values():
        assert layer["mismatch"]["median"] == pytest.approx(1, abs=0.1)
    assert layers["norms.0"]["dropout_shift"]["median"] == pytest.approx(1, abs=1e-3)
    assert layers["norms.1"]["dropout_shift"]["max"] > 1.2
    # The command does what it says, and needs no more than what was given here.
    name, *words = shlex.split(found["command"])[1:]
    assert run(name, *words, "-q").exit_code == 0


def test_a_mismatch_beside_dropout_leads_to_the_ratio(dropped: Path) -> None:
    found = inspect(dropped, 1.12 * images(), *RATE)
    assert (found["cause"], found["dropout_shifts"], found["verdict"]["level"]) == ("mismatch", True, "doubt")
    assert "augmentation" in found["text"]
    name, *words = shlex.split(found["command"])[1:]
    assert words[-2:] == ["--estimator", "ratio"]
    assert run(name, *words, "-q").exit_code == 0


def test_wrong_preprocessing_comes_first(dropped: Path) -> None:
    found = inspect(dropped, 127 * images() + 127, *RATE)
    assert found["cause"] == "preprocessing"
    assert found["preprocessing"] in found["text"]
    assert "Mend that first" in found["text"]
    assert found["command"] is None


def test_nothing_differs(plain: Path) -> None:
    found = inspect(plain, images(), "--model-kwargs", "drop_rate=0.0")
    assert (found["cause"], found["dropout_on"], found["command"]) == ("nothing", False, None)
    assert "BatchNorm is not the reason" in found["text"]
    assert "--model-kwargs" not in found["text"]


def test_a_mismatch_without_dropout(plain: Path) -> None:
    found = inspect(plain, 1.12 * images(), "--model-kwargs", "drop_rate=0.0")
    assert (found["cause"], found["dropout_shifts"]) == ("mismatch", False)
    for reason in ("frozen layers", "momentum", "too few batches"):
        assert reason in found["text"]
    assert shlex.split(found["command"])[-4:] == ["--layers", "all", "--estimator", "pooled"]


def test_statistics_of_layers_that_were_not_trained_are_not_judged(tmp_path: Path) -> None:
    torch.save(nets.DenseNet(0.3).state_dict(), tmp_path / "model.pt")
    found = inspect(tmp_path / "model.pt", images(), *RATE)
    assert (found["cause"], found["verdict"]["level"]) == ("unknown", "none")
    assert found["dropout_shifts"]


def test_nothing_is_written_and_no_more_is_read_than_needed(dropped: Path) -> None:
    before = dropped.read_bytes()
    found = inspect(dropped, torch.cat([images(), images()]), *RATE)
    assert found["images"] == 512
    assert dropped.read_bytes() == before
    assert sorted(path.name for path in dropped.parent.iterdir()) == ["data.npy", "model.pt"]
    assert inspect(dropped, images(), *RATE, "--limit", 64)["images"] == 64


def test_a_corrected_file_is_not_to_be_corrected_again(dropped: Path) -> None:
    arguments = ("--arch", "nets:DenseNet", *RATE, "--data", dropped.parent / "data.npy")
    np.save(dropped.parent / "data.npy", images().numpy())
    assert run("bn-reestimate", dropped, *arguments, "-q").exit_code == 0
    result = run("inspect", dropped.with_name("model.bn.safetensors"), *arguments, "--json")
    explanation = json.loads(result.stdout)["explanation"]
    assert explanation["command"] is None
    assert "output of bn-reestimate" in explanation["text"]


def test_data_needs_a_checkpoint(tmp_path: Path) -> None:
    result = run("inspect", "--arch", "nets:DenseNet", "--input-size", "3,8,8", "--data", tmp_path)
    assert result.exit_code == 2
    assert "Give a checkpoint, too" in result.stderr


def test_data_that_is_not_there_is_named(dropped: Path) -> None:
    result = run("inspect", dropped, "--arch", "nets:DenseNet", "--data", dropped.parent / "missing.npy")
    assert result.exit_code == 1 or result.exit_code == 2
    assert "missing.npy" in result.stderr


def test_rates_that_nobody_recorded_are_shown_and_used(dropped: Path) -> None:
    found = inspect(dropped, images())
    assert found["rate_fit"]["rates"]["drop_rate"] == pytest.approx(0.3, abs=0.03)
    assert found["cause"] == "dropout"
    assert found["rates_known"]
