"""``--dropout NAME=RATE``: dropout that an architecture lacks, from file to file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ported_nets import Original
from safetensors import safe_open
from safetensors.torch import load_file

from ckpt_tools.cli import main

PORT = ["--arch", "ported_nets:Ported", "--input-size", "1,12,12"]
DROPOUT = ["--dropout", "pool*=0.25"]


def fix(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = nets.batches((1, 12, 12))
    np.save(tmp_path / "data.npy", torch.cat(batches).numpy())
    (tmp_path / "runs").mkdir()
    for name in ("one", "two"):
        torch.save(nets.trained(Original(), batches).state_dict(), tmp_path / "runs" / f"{name}.pt")
    return tmp_path


@pytest.mark.parametrize("data", [["--data", "data.npy"], []], ids=["data", "none"])
def test_a_port_is_corrected_as_its_original(root: Path, data: list[str]) -> None:
    result = fix(
        "bn-reestimate", "runs/one.pt", *data, *PORT, *DROPOUT, "-q", "--json", "--estimator", "ratio"
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["rates"]["source"] == "given"
    assert facts["rates"]["declared"] == {"pool*": 0.25}
    assert [layer["name"] for layer in facts["layers"] if layer["rewritten"]] == ["bn2", "bn3"]
    assert "'pool*=0.25'" in facts["command"]
    with safe_open("runs/one.bn.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ckpt_tools"])["rates"]["declared"] == {"pool*": 0.25}
    before, after = torch.load("runs/one.pt"), load_file("runs/one.bn.safetensors")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        "bn2.running_var",
        "bn3.running_var",
    }
    # The command in the report makes the same bytes again.
    again = fix(*shlex.split(facts["command"])[1:], "--overwrite", "-q")
    assert again.exit_code == 0, again.output
    assert all(
        torch.equal(tensor, after[key]) for key, tensor in load_file("runs/one.bn.safetensors").items()
    )


def test_inspect_shows_and_suggests_it(root: Path) -> None:
    facts = json.loads(fix("inspect", "runs/one.pt", *PORT, *DROPOUT, "--json").stdout)
    sites = [(site["name"], site["rate"]) for site in facts["dropout_sites"] if site["rate"]]
    assert sites == [("pool1", 0.25), ("pool2", 0.25)]
    assert facts["rates"] == "given"
    assert facts["plan"]["rewrite"] == ["bn2", "bn3"]
    assert "--dropout 'pool*=0.25'" in facts["plan"]["command"]
    text = fix("inspect", "runs/one.pt", *PORT, *DROPOUT, "--data", "data.npy")
    assert text.exit_code == 0, text.output
    assert "given (--model-kwargs, --dropout)" in text.stdout
    assert fix("inspect", *PORT, *DROPOUT, "--dropout", "pool2=0.5").exit_code == 0


def test_folders_declare_it_for_every_checkpoint(root: Path) -> None:
    command = ["bn-reestimate", "runs", "--data", "data.npy", *PORT, "--output-dir", "fixed", "-q"]
    result = fix(*command, *DROPOUT, "--json")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("fixed").rglob("*.safetensors")) == [
        "one.bn.safetensors",
        "two.bn.safetensors",
    ]
    # What was done with the same dropout is done; with another one it is not.
    assert fix(*command, *DROPOUT).exit_code == 0
    assert fix(*command, "--dropout", "pool*=0.4").exit_code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool*", "expected NAME=RATE"),
        ("=0.2", "expected NAME=RATE"),
        ("pool*=much", "expected NAME=RATE"),
        ("pool*=1.5", "below 1"),
        ("pool*=-0.2", "at least 0"),
        ("pol1=0.2", "Did you mean pool1?"),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["bn-reestimate", "--data", "data.npy"]])
def test_what_it_refuses(root: Path, command: list[str], text: str, message: str) -> None:
    result = fix(*command, "runs/one.pt", *PORT, "--dropout", text)
    assert result.exit_code != 0
    assert message in " ".join((result.stderr + str(result.exception)).split())
    assert not Path("runs/one.bn.safetensors").exists()
