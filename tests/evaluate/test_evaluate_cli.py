"""Evaluation from file to file: the table, the gate, two checkpoints, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckpt_tools.cli import main

ARCH = ("--arch", "nets:DenseNet")
RATE = ("--model-kwargs", "drop_rate=0.2")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with model.pt, its training data, and labelled data that it is better than chance on."""
    inputs = nets.batches((3, 8, 8))
    model = nets.trained(nets.DenseNet(), inputs)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.cat(inputs).numpy())
    unseen = torch.cat(nets.batches((3, 8, 8), seed=1))
    with torch.no_grad():
        labels = model(unseen).argmax(1)
    labels[::3] = torch.arange(128)[::3] % 5
    np.savez(tmp_path / "val.npz", images=unseen.numpy(), labels=labels.numpy())
    return tmp_path


def job(files: Path, *more: object) -> list[object]:
    return ["bn-reestimate", files / "model.pt", "--data", files / "data.npy", *ARCH, *RATE, "-q", *more]


def truth(path: Path, files: Path) -> dict[str, float]:
    """Error in percent and NLL of a file, from the file alone."""
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    model = nets.DenseNet()
    model.load_state_dict(state)
    with np.load(files / "val.npz") as stored, torch.no_grad():
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
        logits = model.eval()(images)
    wrong = float((logits.argmax(1) != labels).float().mean())
    return {"error": 100 * wrong, "nll": float(nn.functional.cross_entropy(logits, labels))}


def test_before_and_after_in_one_run(files: Path) -> None:
    plain = run(*job(files, "-o", files / "plain.safetensors"))
    assert plain.exit_code == 0, plain.output
    gate = "error <= before + 60 and nll <= before.nll + 1"
    result = run(*job(files, "--eval-data", files / "val.npz", "--calibrate", "--gate", gate, "--json"))
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    output = files / "model.bn.safetensors"
    for name, path in (("before", files / "model.pt"), ("after", output)):
        for metric, value in truth(path, files).items():
            assert metrics[name][metric]["value"] == pytest.approx(value, rel=1e-4), (name, metric)
    change = metrics["after"]["nll"]["value"] - metrics["before"]["nll"]["value"]
    assert metrics["change"]["nll"]["value"] == pytest.approx(change)
    assert metrics["change"]["nll"]["standard_error"] < metrics["after"]["nll"]["standard_error"]
    assert (metrics["images"], metrics["classes"], metrics["gate"]["passed"]) == (128, 5, True)
    # the temperature is in the metadata, and nothing but the metadata knows of it
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, _states(output, files)), strict=True))
    with safe_open(output, "pt") as file:
        said = json.loads(file.metadata()["ckpt_tools"])
    assert said["temperature"] == metrics["after"]["calibration"]["temperature"] > 0


def _states(output: Path, files: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return load_file(output), load_file(files / "plain.safetensors")


def test_the_table(files: Path) -> None:
    result = run(*job(files, "--eval-data", files / "val.npz", "--calibrate"))
    assert result.exit_code == 0, result.output
    for words in (
        "top-1 error, %",
        "NLL at T, nats",
        "ECE, %",
        "before",
        "change",
        "128 images, 5 classes",
        "±",
    ):
        assert words in result.stdout
    assert "top-5" not in result.stdout
    assert (
        result.stdout.index("largest changes")
        < result.stdout.index("top-1 error")
        < result.stdout.index("written: ")
    )


def test_a_failed_gate_leaves_no_output(files: Path) -> None:
    result = run(
        *job(files, "--eval-data", files / "val.npz", "--gate", "ece <= 50 and error <= before - 80")
    )
    assert result.exit_code == 4
    assert "error <= before - 80: error is" in result.stderr
    assert "Nothing was written" in result.stderr
    assert "top-1 error" in result.stdout
    assert "gate: ece <= 50 and error <= before - 80: NOT passed" in result.stdout
    assert "written:" not in result.stdout
    assert sorted(path.name for path in files.iterdir()) == ["data.npy", "model.pt", "val.npz"]


def test_programs_are_told_what_a_failed_gate_saw(files: Path) -> None:
    result = run(*job(files, "--eval-data", files / "val.npz", "--gate", "error <= before - 80", "--json"))
    assert result.exit_code == 4
    facts = json.loads(result.stdout)
    assert facts["output"] is None
    assert facts["metrics"]["gate"]["passed"] is False
    for side in ("before", "after", "change"):
        assert facts["metrics"][side]["error"]["standard_error"] >= 0


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--gate", "error <= 5"], 2, "--eval-data"),
        (["--calibrate"], 2, "--eval-data"),
        (["--class-map", "map.json"], 2, "--eval-data"),
        (["--eval-data", "val.npz", "--gate", "accuracy > 5"], 2, "'accuracy'"),
        (["--eval-data", "nowhere", "--gate", "error >"], 2, "the end"),
        (["--eval-data", "nowhere"], 1, "no such file"),
        (["--eval-data", "data.npy"], 1, "no labels"),
        (["--eval-data", "val.npz", "--class-map", "map.json"], 2, "numbers already"),
        (["--eval-data", "val.npz", "--class-map", "none.json"], 1, "none.json"),
        (["--eval-data", "val.npz", "--gate", "error5 <= before"], 2, "six classes or more"),
        (["--eval-data", "seven.npz"], 1, "label 6 is no class of a head with 5 outputs"),
    ],
)
def test_bad_input(
    files: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(files)
    (files / "map.json").write_text('{"a": 0}')
    np.savez("seven.npz", images=np.zeros((14, 3, 8, 8), np.float32), labels=np.arange(14) % 7)
    before = sorted(files.iterdir())
    result = run(*job(files, *more))
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert sorted(files.iterdir()) == before


def test_two_files(files: Path) -> None:
    assert run(*job(files)).exit_code == 0
    after = files / "model.bn.safetensors"
    arguments = (
        "evaluate",
        after,
        "--data",
        files / "val.npz",
        "--before",
        files / "model.pt",
        *ARCH,
        "-q",
        "--json",
    )
    found = json.loads(run(*arguments).stdout)["metrics"]
    assert found["before"]["error"]["value"] == pytest.approx(truth(files / "model.pt", files)["error"])
    assert found["after"]["nll"]["value"] == pytest.approx(truth(after, files)["nll"], rel=1e-4)
    refused = run(*arguments, "--gate", "error < before - 99")
    assert refused.exit_code == 4
    assert json.loads(refused.stdout)["metrics"]["gate"]["passed"] is False


def test_one_file(files: Path) -> None:
    arguments = ("evaluate", files / "model.pt", "--data", files / "val.npz", *ARCH, "-q")
    result = run(*arguments, "--calibrate", "--gate", "error < 100", "--limit", "50")
    assert result.exit_code == 0, result.output
    assert "50 images, 5 classes" in result.stdout
    assert "gate: error < 100: passed" in result.stdout
    refused = run(*arguments, "--gate", "error <= before")
    assert (refused.exit_code, "--before" in refused.stderr) == (2, True)
    assert run(*arguments, "--before", files / "none.pt").exit_code == 1


def test_heads_of_different_sizes_are_not_compared(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "my_heads.py").write_text(
        "import nets\nfrom torch import nn\n"
        "def build(num_classes=5):\n"
        "    return nn.Sequential(nets.DenseNet(), nn.Linear(5, num_classes))\n"
    )
    monkeypatch.syspath_prepend(files)
    import my_heads

    for classes in (5, 9):
        torch.save({"state_dict": my_heads.build(classes).state_dict()}, files / f"{classes}.pt")
    more = ("--data", files / "val.npz", "--arch", "my_heads:build", "-q")
    for before, after in ((5, 9), (9, 5)):
        result = run("evaluate", files / f"{after}.pt", "--before", files / f"{before}.pt", *more)
        assert result.exit_code == 1, result.output
        assert f"a head of {before} outputs before and of {after} after" in result.stderr


def test_three_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_video.py").write_text(
        "import nets\nfrom torch import nn\n"
        "def build(): return nn.Sequential(nets.video(), nn.AdaptiveAvgPool3d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_video

    inputs = nets.batches((2, 6, 6, 6))
    torch.save(nets.trained(my_video.build(), inputs).state_dict(), tmp_path / "model.pt")
    images = torch.cat(inputs).numpy()
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(len(images)) % 3)
    more = ("--data", tmp_path / "data.npz", "--arch", "my_video:build", "-q")
    assert run("evaluate", tmp_path / "model.pt", *more).exit_code == 0
    result = run("bn-reestimate", tmp_path / "model.pt", *more, "--layers", "all")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_files_of_both_splits(files: Path, names: tuple[str, str]) -> None:
    """As Keras and MedMNIST have them: judged on the test split, re-estimated on the training split."""
    with np.load(files / "val.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    arrays = {name.format("test"): value for name, value in zip(names, (images, labels), strict=True)}
    train = {names[0].format("train"): np.load(files / "data.npy"), names[1].format("train"): labels}
    np.savez(files / "both.npz", **train, **arrays)
    np.savez(files / "test.npz", **arrays)
    expected = truth(files / "model.pt", files)["error"]
    for name in ("both.npz", "test.npz"):
        result = run("evaluate", files / "model.pt", "--data", files / name, *ARCH, "-q", "--json")
        metrics = json.loads(result.stdout)["metrics"]
        assert metrics["after"]["error"]["value"] == pytest.approx(expected)
        assert metrics["kind"] == f"array {names[0].format('test')}"
    plain = run(*job(files, "--json"))
    both = run(*job(files, "--json", "--data", files / "both.npz", "--overwrite"))
    assert json.loads(both.stdout)["layers"] == json.loads(plain.stdout)["layers"]


@pytest.mark.parametrize("labels", [list, tuple, torch.as_tensor])
def test_labels_in_a_pt_file(files: Path, labels: Callable[[object], object]) -> None:
    with np.load(files / "val.npz") as stored:
        images, numbers = torch.from_numpy(stored["images"]), stored["labels"].tolist()
    torch.save({"images": images, "labels": labels(numbers)}, files / "dict.pt")
    torch.save((images, labels(numbers)), files / "pair.pt")
    for name in ("dict.pt", "pair.pt"):
        result = run("evaluate", files / "model.pt", "--data", files / name, *ARCH, "-q", "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["metrics"]["after"]["error"]["value"]
        assert found == pytest.approx(truth(files / "model.pt", files)["error"])


def test_a_dict_with_labels_for_a_model_that_takes_none(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "my_dicts.py").write_text(
        "import numpy as np, torch\n"
        "def batches():\n"
        "    stored = np.load('val.npz')\n"
        "    return [{'x': torch.from_numpy(stored['images']), "
        "'label': torch.from_numpy(stored['labels'])}]\n"
    )
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(files)
    result = run("evaluate", "model.pt", "--data", "my_dicts:batches", *ARCH, "-q")
    assert result.exit_code == 0, result.output
    assert "128 images, 5 classes" in result.stdout


def test_a_checkpoint_without_its_head_is_not_judged(files: Path) -> None:
    import timm

    state = timm.create_model("resnet18").state_dict()
    torch.save(
        {key: value for key, value in state.items() if not key.startswith("fc.")}, files / "headless.pt"
    )
    np.savez(files / "big.npz", images=np.zeros((4, 3, 64, 64), np.float32), labels=np.arange(4))
    arguments = ("--data", files / "big.npz", "--arch", "timm:resnet18", "-q")
    own = {key.replace("fc.", "fc.0."): value for key, value in state.items()}
    torch.save(own, files / "own.pt")
    torch.save(state, files / "whole.pt")
    for name, said in (("headless.pt", "found none"), ("own.pt", "none under fc.")):
        result = run("evaluate", files / name, *arguments)
        assert (result.exit_code, said in result.stderr) == (1, True), result.output
    assert "4 images, 1,000 classes" in run("evaluate", files / "whole.pt", *arguments).stdout


def test_a_callable_that_shuffles_anew_is_noticed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "my_restless.py").write_text(
        "import random, nets, torch\n"
        "class Batches:\n"
        "    def __iter__(self):\n"
        "        batches = nets.batches((3, 8, 8))\n"
        "        shift = next(shifts)\n"
        "        return iter([(x, torch.arange(32).add(shift) % 5) for x in batches])\n"
        "shifts = iter(range(9))\n"
        "def made(): return Batches()\n"
    )
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = run(*job(files, "--eval-data", "my_restless:made"))
    sys.modules.pop("my_restless", None)
    assert result.exit_code == 1
    assert "same images in the same order" in result.stderr


def test_before_and_after_see_one_input(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output of an earlier version does not record the input; BEFORE does, or else AFTER."""
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(files)
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    args = {"model": "test_resnet", "num_classes": 10, "input_size": [3, 40, 40], "drop_path": 0.1}
    torch.save({"arch": "test_resnet", "args": args, "state_dict": state}, "in.pth.tar")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 50, 60, 3), np.uint8)
    np.savez("images.npz", images=pixels, labels=np.arange(20) % 10)
    entry = {"version": "0.1.0", "estimator": "pooled"}
    save_file(state, "old.safetensors", {"ckpt_tools": json.dumps(entry)})
    other = timm.create_model("test_efficientnet", num_classes=10).state_dict()
    torch.save({"arch": "test_efficientnet", "state_dict": other}, "other.pt")

    def compare(after: str, before: str, *more: str) -> tuple[str, list[str], str]:
        arguments = ("evaluate", after, "--before", before, "--data", "images.npz", "-q", *more)
        facts = json.loads(run(*arguments, "--json").stdout)
        inputs = [facts[name]["transform"] for name in ("before", "checkpoint")]
        return facts["input_decided_by"], inputs, run(*arguments).stdout

    arch = ("--arch", "timm:test_resnet")
    decision, inputs, text = compare("old.safetensors", "in.pth.tar", *arch)
    assert decision == "before"
    assert inputs[0] == inputs[1]
    assert "40×40" in inputs[0]
    assert "both on RGB" in text
    assert "as BEFORE says" in text
    decision, inputs, text = compare("in.pth.tar", "old.safetensors", *arch)
    assert (decision, "as AFTER says" in text) == ("after", True)
    assert inputs[0] == inputs[1]
    assert "40×40" in inputs[0]
    decision, inputs, text = compare("old.safetensors", "in.pth.tar", *arch, "--input-size", "3,32,32")
    assert "as BEFORE says, but for your options" in text
    assert inputs[0] == inputs[1]
    assert "32×32" in inputs[0]
    decision, inputs, text = compare("other.pt", "in.pth.tar")
    assert (decision, inputs[0] == inputs[1]) == ("each", False)
    assert "each its own" in text


def test_preprocessed_data_decide_for_themselves(files: Path) -> None:
    both = ("--before", files / "model.pt", "--data", files / "val.npz", *ARCH, "-q", "--json")
    facts = json.loads(run("evaluate", files / "model.pt", *both).stdout)
    assert facts["input_decided_by"] == "data"
    assert facts["checkpoint"]["transform"] == facts["before"]["transform"]
