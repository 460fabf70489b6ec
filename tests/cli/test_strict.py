"""``--strict`` ends with exit code 4 where a run would go on with a doubt, ``--dry-run`` writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ckpt_tools.cli import main

ARCH = ("--arch", "nets:DenseNet", "--model-kwargs", "drop_rate=0.2", "-q")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    data = nets.batches((3, 8, 8), count=16)
    torch.save(nets.trained(nets.DenseNet(), data, steps=160).state_dict(), tmp_path / "model.pt")
    images = torch.cat(data).numpy()
    np.save(tmp_path / "data.npy", images)
    np.save(tmp_path / "brighter.npy", 1.15 * images)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(len(images)) % 5)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def job(files: Path, data: str, *more: object) -> Result:
    return run("bn-reestimate", files / "model.pt", "--data", files / data, *ARCH, *more)


def test_a_doubt_goes_on_without_strict_and_stops_with_it(files: Path) -> None:
    result = job(files, "brighter.npy", "--strict")
    assert result.exit_code == 4, result.output
    assert "strict: the data is in doubt" in result.stderr
    assert not (files / "model.bn.safetensors").exists()
    result = job(files, "brighter.npy")
    assert result.exit_code == 0, result.output
    assert "data: differs from what the BN layers remember" in result.stdout
    assert "augmentation" in result.stdout
    assert "estimator: ratio (" in result.stdout


def test_data_that_agrees_passes_strict_and_nothing_is_said_of_augmentation(files: Path) -> None:
    result = job(files, "data.npy", "--strict")
    assert result.exit_code == 0, result.output
    assert "data: agrees with what the BN layers remember" in result.stdout
    assert "mismatch" in result.stdout
    assert "dropout shift" in result.stdout
    assert "augment" not in result.stdout
    facts = json.loads(job(files, "data.npy", "--strict", "--overwrite", "--json").stdout)
    assert "augment" not in json.dumps(facts)
    assert facts["verdict"]["level"] == facts["controls"]["verdict"] == "agree"
    assert facts["warnings"] == []
    assert facts["effect"]["images"] == 256
    assert 0 <= facts["effect"]["changed"] <= 1
    for layer in facts["layers"]:
        assert layer["mismatch"].keys() == {"median", "min", "max", "standard_error"}
        assert layer["dropout_shift"].keys() == {"median", "min", "max", "standard_error"}


def test_strict_changes_no_result(files: Path) -> None:
    job(files, "data.npy", "-o", files / "a.safetensors")
    job(files, "data.npy", "--strict", "-o", files / "b.safetensors")
    assert (files / "a.safetensors").read_bytes() == (files / "b.safetensors").read_bytes()


def test_a_dry_run_measures_all_and_writes_nothing(files: Path) -> None:
    more = ("--eval-data", files / "labelled.npz", "--gate", "error <= before + 100")
    before = sorted(files.iterdir())
    result = job(files, "data.npy", "--dry-run", *more)
    assert result.exit_code == 0, result.output
    assert "not written" in result.stdout
    assert "--dry-run" in result.stdout
    assert sorted(files.iterdir()) == before
    dry = json.loads(job(files, "data.npy", "--dry-run", "--json", *more).stdout)
    real = json.loads(job(files, "data.npy", "--json", *more).stdout)
    assert dry["output"] is None
    assert real["output"]["path"].endswith("model.bn.safetensors")
    for key in ("layers", "verdict", "effect", "metrics", "controls"):
        assert dry[key] == real[key]
    # An output that is there already is no obstacle.
    assert job(files, "data.npy", "--dry-run").exit_code == 0


def test_a_dry_run_is_of_one_checkpoint(files: Path) -> None:
    (files / "copy.pt").write_bytes((files / "model.pt").read_bytes())
    checkpoints = (files / "model.pt", files / "copy.pt")
    result = run("bn-reestimate", *checkpoints, "--data", files / "data.npy", *ARCH, "--dry-run")
    assert result.exit_code == 2
    assert "--dry-run looks at one checkpoint" in result.stderr


def test_made_up_inputs_are_shown_as_such(files: Path) -> None:
    result = run("bn-reestimate", files / "model.pt", "--input-size", "3,8,8", *ARCH, "--strict")
    assert result.exit_code == 0, result.output
    assert "controls: none (the inputs are synthetic)" in result.stdout
    assert "effect:" not in result.stdout
    assert "mismatch" not in result.stdout
    assert "dropout shift" in result.stdout
