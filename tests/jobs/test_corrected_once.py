"""A corrected file is not corrected again, says what it is, and keeps what its source knew of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import ok, run, stored
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_tools

timm = pytest.importorskip("timm")
ESTIMATOR = ("--estimator", "pooled")
ARGUMENTS = {
    "model": "test_resnet",
    "num_classes": 10,
    "drop": 0.0,
    "drop_path": 0.2,
    "input_size": [3, 40, 40],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of timm's train.py, in.pth.tar, and its correction, out.safetensors."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, drop_path_rate=0.2)
    torch.save(
        {"arch": "test_resnet", "args": ARGUMENTS, "state_dict": model.state_dict()}, folder / "in.pth.tar"
    )
    np.save(folder / "data.npy", torch.randn(8, 3, 40, 40).numpy())
    ok(*job(folder, "in.pth.tar", "-o", folder / "out.safetensors"))
    return folder


def job(folder: Path, name: str, *more: object) -> list[object]:
    return ["bn-reestimate", folder / name, "--data", folder / "data.npy", "--force", "-q", *ESTIMATOR, *more]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_second_correction_ends_with_nothing_to_do(made: Path, tmp_path: Path) -> None:
    refused = run(*job(made, "out.safetensors", "-o", tmp_path / "twice.safetensors"))
    assert refused.exit_code == 3, refused.output
    for words in ("in.pth.tar", "pooled", "--again", "layers"):
        assert words in refused.stderr
    assert not any(tmp_path.iterdir())
    again = ok(*job(made, "out.safetensors", "-o", tmp_path / "twice.safetensors", "--again", "--json"))
    assert "--again" in json.loads(again.stdout)["command"]
    assert stored_keys(tmp_path / "twice.safetensors") == stored_keys(made / "out.safetensors")


def stored_keys(path: Path) -> list[str]:
    return list(load_file(path))


def test_a_folder_run_counts_it_as_nothing_to_do(made: Path, tmp_path: Path) -> None:
    names = [made / "out.safetensors", made / "in.pth.tar"]
    rest = [
        "--data",
        made / "data.npy",
        "--force",
        "-q",
        "--output-dir",
        tmp_path / "to",
        "--json",
        *ESTIMATOR,
    ]
    records = json.loads(ok("bn-reestimate", *names, *rest).stdout)["checkpoints"]
    assert [record["status"] for record in records] == ["nothing to do", "done"]


def test_a_conversion_of_a_corrected_file_is_one(made: Path, tmp_path: Path) -> None:
    ok("convert", made / "out.safetensors", "-o", tmp_path / "same.safetensors")
    refused = run(*job(made, tmp_path / "same.safetensors"))
    assert refused.exit_code == 3
    assert "in.pth.tar" in refused.stderr


def test_a_huggingface_folder_with_a_corrected_file_is_one(made: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((made / "out.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    assert run(*job(made, tmp_path)).exit_code == 3


def test_a_new_file_with_copied_metadata_is_none(made: Path, tmp_path: Path) -> None:
    """Somebody who trains on may hand the metadata of an output to a file with other tensors."""
    tensors = {key: value + 1 for key, value in load_file(made / "out.safetensors").items()}
    save_file(tensors, tmp_path / "trained.safetensors", metadata(made / "out.safetensors"))
    assert json.loads(ok("inspect", tmp_path / "trained.safetensors", "--json").stdout)["correction"] is None
    assert run(*job(made, tmp_path / "trained.safetensors")).exit_code != 3


def test_inspect_says_it(made: Path) -> None:
    facts = json.loads(ok("inspect", made / "out.safetensors", "--json").stdout)
    correction = facts["correction"]
    assert (correction["estimator"], correction["statistics"]) == ("pooled", "variance")
    assert correction["source"] == "in.pth.tar"
    assert len(correction["source_sha256"]) == 64
    assert correction["layers"] > 0
    assert facts["plan"]["nothing_to_do"]
    assert "--again" in facts["plan"]["why"]
    text = ok("inspect", made / "out.safetensors").stdout
    assert "corrected" in text
    assert "of in.pth.tar (estimator pooled)" in text
    source = json.loads(ok("inspect", made / "in.pth.tar", "--json").stdout)
    assert source["correction"] is None
    assert "corrected" not in ok("inspect", made / "in.pth.tar").stdout


def test_it_keeps_architecture_rates_and_input(made: Path) -> None:
    before, after = (ckpt_tools.load(made / name) for name in ("in.pth.tar", "out.safetensors"))
    assert after.recipe.architecture == before.recipe.architecture == "timm:test_resnet"
    assert (after.recognised_by, after.rates) == ("checkpoint", "recorded")
    assert after.recipe.kwargs["drop_path_rate"] == 0.2
    assert after.input_spec is not None
    assert before.input_spec is not None
    assert after.input_spec.shape == (3, 40, 40)
    assert after.input_spec.mean == before.input_spec.mean
    assert after.input_spec.crop_pct == before.input_spec.crop_pct
    sites = [ckpt_tools.walk(loaded.model, torch.zeros(2, 3, 40, 40)) for loaded in (before, after)]
    assert sites[0].dropout_sites == sites[1].dropout_sites


def test_what_the_user_said_is_kept_as_well(made: Path, tmp_path: Path) -> None:
    torch.save(stored(made / "in.pth.tar")["state_dict"], tmp_path / "bare.pt")
    options = ("--arch", "timm:test_resnet")
    preprocessing = ("--mean", "0.4,0.4,0.4", "--std", "0.2,0.2,0.2", "--input-size", "3,48,48")
    np.savez(
        tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 255, (8, 60, 60, 3), np.uint8)
    )
    rates = ("--model-kwargs", "drop_path_rate=0.3", "--force", "-q", *ESTIMATOR)
    ok(
        "bn-reestimate",
        tmp_path / "bare.pt",
        "--data",
        tmp_path / "images.npz",
        *options,
        *rates,
        *preprocessing,
    )
    loaded = ckpt_tools.load(tmp_path / "bare.bn.safetensors")
    assert loaded.rates == "recorded"
    assert loaded.recipe.kwargs["drop_path_rate"] == 0.3
    assert loaded.input_spec is not None
    assert (loaded.input_spec.shape, loaded.input_spec.mean[0]) == ((3, 48, 48), 0.4)
    given = ckpt_tools.load(tmp_path / "bare.bn.safetensors", model_kwargs={"drop_path_rate": 0.1})
    assert (given.rates, given.recipe.kwargs["drop_path_rate"]) == ("given", 0.1)
