"""The command line end to end: tiny files in, verified files out, and one clear answer to everything bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import oracle
import pytest
import torch
from cli_runs import names_in, ok, raw_tensors, run, stored
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ckpt_tools.cli import main

ARCH = "nets:DenseNet"
TORCHVISION = ["--arch", "torchvision:resnet18"]


@pytest.fixture
def model() -> nn.Module:
    return nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))


@pytest.fixture
def files(tmp_path: Path, model: nn.Module) -> Path:
    """A folder with model.pt and the training data as an array."""
    torch.save(model.state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.cat(nets.batches((3, 8, 8))).numpy())
    return tmp_path


def job(files: Path, *more: object) -> list[object]:
    return ["bn-reestimate", files / "model.pt", "--data", files / "data.npy", "--arch", ARCH, "-q", *more]


def leftovers(folder: Path) -> list[str]:
    return [
        name
        for name in names_in(folder)
        if name.startswith(".") or name.endswith((".tmp", ".bn.safetensors"))
    ]


def test_the_main_job(files: Path, model: nn.Module) -> None:
    rate = ("--model-kwargs", "drop_rate=0.2")
    before = (files / "model.pt").read_bytes()
    result = json.loads(ok(*job(files, *rate, "--estimator", "exact", "--json")).stdout)
    assert (files / "model.pt").read_bytes() == before
    output = files / "model.bn.safetensors"
    assert result["output"]["path"] == str(output)
    names = {layer["name"] for layer in result["layers"] if layer["rewritten"]}
    truth = oracle.corrected(model, torch.cat(nets.batches((3, 8, 8))), names)
    found = load_file(output)
    assert (
        oracle.relative_difference({name: found[f"{name}.running_var"] for name in names}, truth).max() < 1e-3
    )
    nets.DenseNet().load_state_dict(found)
    assert ok("diff", files / "model.pt", output).exit_code == 0
    assert result["controls"]["verdict"] == "agree"


def test_only_running_variances_differ(files: Path) -> None:
    ok(*job(files))
    after = raw_tensors(files / "model.bn.safetensors")
    before = {key: value.numpy().tobytes() for key, value in stored(files / "model.pt").items()}
    assert list(after) == list(before)
    changed = {key for key in after if after[key][2] != before[key]}
    assert changed == {key for key in before if key.endswith(".running_var")} - {
        "norms.0.running_var"
    }  # a control


@pytest.mark.parametrize(("rate", "rewritten"), [(None, 121), ("0.2", 118)])
def test_torchvision_densenet(tmp_path: Path, rate: str | None, rewritten: int) -> None:
    import torchvision

    torch.save(torchvision.models.densenet121(weights=None).state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.randn(6, 3, 32, 32).numpy())
    kwargs = [] if rate is None else ["--model-kwargs", f"drop_rate={rate}"]
    base = ["bn-reestimate", tmp_path / "model.pt", "--data", tmp_path / "data.npy", "-q", "--json"]
    result = json.loads(ok(*base, "--arch", "torchvision:densenet121", *kwargs).stdout)
    assert sum(layer["rewritten"] for layer in result["layers"]) == rewritten
    assert ("not recorded" in result["why"]) == (rate is None)


def test_timm_and_torchvision_load_the_output(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("resnet18", num_classes=3, drop_path_rate=0.2)
    torch.save({"arch": "resnet18", "state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    np.save(tmp_path / "data.npy", torch.randn(6, 3, 32, 32).numpy())
    output = tmp_path / "out.safetensors"
    base = ["bn-reestimate", tmp_path / "model.pth.tar", "--data", tmp_path / "data.npy", "-q", "-o", output]
    ok(*base, "--arch", "timm:resnet18", "--model-kwargs", "drop_path_rate=0.2")
    loaded = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(output))
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)
    assert not torch.equal(loaded.layer4[1].bn1.running_var, model.layer4[1].bn1.running_var)


def test_a_timm_checkpoint_needs_no_options(tmp_path: Path) -> None:
    import argparse

    import timm

    model = timm.create_model("resnet18", num_classes=3, drop_path_rate=0.2)
    arguments = {"model": "resnet18", "num_classes": 3, "drop": 0.0, "drop_path": 0.2, "drop_block": None}
    arguments |= {
        "img_size": None,
        "input_size": [3, 40, 40],
        "mean": None,
        "std": None,
        "interpolation": "bicubic",
    }
    saved = {"epoch": 1, "arch": "resnet18", "version": 2, "args": argparse.Namespace(**arguments)}
    averaged = {key: value + 1 if "weight" in key else value for key, value in model.state_dict().items()}
    torch.save(
        saved | {"state_dict": model.state_dict(), "state_dict_ema": averaged}, tmp_path / "last.pth.tar"
    )
    folder = photos(tmp_path / "photos", 12)
    out = json.loads(ok("bn-reestimate", tmp_path / "last.pth.tar", "--data", folder, "-q", "--json").stdout)
    assert (out["rates"]["source"], out["checkpoint"]["weights"]) == ("recorded", "state_dict_ema")
    assert out["data"]["input"]["shape"] == [3, 40, 40]
    assert 0 < sum(layer["rewritten"] for layer in out["layers"]) < len(out["layers"])
    zero = saved | {
        "args": argparse.Namespace(**arguments | {"drop_path": None}),
        "state_dict": model.state_dict(),
    }
    torch.save(zero, tmp_path / "zero.pth.tar")
    refused = run("bn-reestimate", tmp_path / "zero.pth.tar", "--data", folder, "-q")
    assert refused.exit_code == 3
    assert "--layers all" in refused.stderr


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for index in range(count):
        pixels = numbers.integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_text_and_progress(files: Path) -> None:
    result = ok(*[argument for argument in job(files) if argument != "-q"])
    for word in (
        "architecture",
        "control layer",
        "stored/new variance",
        "standard error",
        "written:",
        "sha256",
    ):
        assert word in result.stdout
    assert "img/s" in result.stderr


def test_half_precision_and_mean(files: Path, model: nn.Module) -> None:
    torch.save(model.half().state_dict(), files / "model.pt")
    ok(*job(files, "--statistics", "mean+variance"))
    out = load_file(files / "model.bn.safetensors")
    assert {value.dtype for key, value in out.items() if "tracked" not in key} == {torch.float16}
    assert ok("diff", files / "model.pt", files / "model.bn.safetensors").exit_code == 0
    strict = run("diff", files / "model.pt", files / "model.bn.safetensors", "--expect", "variance")
    assert strict.exit_code == 4


def test_inspect(files: Path) -> None:
    arguments = ["inspect", files / "model.pt", "--arch", ARCH, "--input-size", "3,8,8"]
    found = json.loads(ok(*arguments, "--json").stdout)
    assert found["checkpoint"]["tensors"] == len(stored(files / "model.pt"))
    assert [layer["name"] for layer in found["batch_norms"]][-1] == "norm"
    assert found["dropout_sites"][0]["op"] == "dropout"
    assert found["batch_norms"][-1]["downstream_of"]
    assert found["batch_norms"][-1]["reached"]
    assert "norms.1" in ok(*arguments).stdout
    alone = json.loads(ok("inspect", "--arch", "timm:resnet18", "--json").stdout)
    assert alone["checkpoint"] is None
    assert any(layer["potentially_downstream_of"] for layer in alone["batch_norms"])


def test_diff_names_what_should_not_differ(files: Path) -> None:
    state = stored(files / "model.pt")
    state["head.bias"] += 1
    torch.save(state, files / "other.pt")
    result = run("diff", files / "model.pt", files / "other.pt")
    assert result.exit_code == 4
    assert "head.bias" in result.stdout
    assert run("diff", files / "model.pt", files / "other.pt", "--expect", "any").exit_code == 0
    assert json.loads(run("diff", files / "model.pt", files / "model.pt", "--json").stdout)["ok"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch canary",)


def _truncate(files: Path) -> None:
    path = files / "model.pt"
    path.write_bytes(path.read_bytes()[:3000])


def _nan(files: Path) -> None:
    state = stored(files / "model.pt")
    state["convs.0.weight"][0] = float("nan")
    torch.save(state, files / "model.pt")


def _nan_data(files: Path) -> None:
    data = np.load(files / "data.npy")
    data[3:6] = np.nan  # more than one in a hundred
    np.save(files / "data.npy", data)


def _no_images(files: Path) -> None:
    (files / "empty").mkdir()
    (files / "empty" / "notes.txt").write_text("none")


def _broken_images(files: Path) -> None:
    photos(files / "photos", 60)
    for number in (3, 4):  # one alone would be skipped with a warning
        (files / "photos" / f"{number}.png").write_bytes(b"")


BAD = {
    "missing checkpoint": (lambda f: (f / "model.pt").unlink(), [], 1, "found nothing there"),
    "empty checkpoint": (lambda f: (f / "model.pt").write_bytes(b""), [], 1, "empty"),
    "truncated checkpoint": (_truncate, [], 1, "model.pt"),
    "needs code": (
        lambda f: torch.save({"state_dict": {}, "x": Evil()}, f / "model.pt"),
        [],
        1,
        "found none",
    ),
    "not a checkpoint": (lambda f: (f / "model.pt").write_text("hello"), [], 1, "model.pt"),
    "NaN in weights": (_nan, [], 1, r"convs.0.weight"),
    "NaN in the data": (_nan_data, [], 1, "NaN"),
    "missing data": (lambda f: (f / "data.npy").unlink(), [], 1, "no such file"),
    "no images": (_no_images, ["--data", "empty", "--input-size", "3,8,8"], 1, "no image"),
    "broken images": (_broken_images, ["--data", "photos", "--input-size", "3,8,8"], 1, "3.png"),
    "wrong architecture": (lambda f: None, ["--arch", "torchvision:resnet18"], 1, "does not fit"),
    "unknown architecture": (lambda f: None, ["--arch", "timm:resnt18"], 1, "resnet18"),
    "unknown keyword": (lambda f: None, ["--model-kwargs", "dropp=1"], 1, "dropp"),
    "malformed keyword": (lambda f: None, ["--model-kwargs", "drop"], 2, "drop"),
    "rates of zero": (lambda f: None, ["--model-kwargs", "drop_rate=0"], 3, "--layers all"),
    "no CUDA": (lambda f: None, ["--device", "cuda"], 1, "CUDA"),
    "unknown device": (lambda f: None, ["--device", "gpu"], 2, "gpu"),
    "output exists": (lambda f: (f / "model.bn.safetensors").write_text("mine"), [], 1, "--overwrite"),
    "momentum without ema": (lambda f: None, ["--momentum", "0.5"], 2, "ema"),
    "output folder missing": (lambda f: None, ["-o", "nowhere/out.safetensors"], 1, "nowhere"),
    "output named like a pickle": (lambda f: None, ["-o", "new.pt"], 1, "Name it new.safetensors"),
    "output is the source": (lambda f: None, ["-o", "model.pt", "--overwrite"], 1, "source"),
    "other data": (lambda f: np.save(f / "data.npy", np.load(f / "data.npy") * 9), [], 4, "--force"),
    "the data as output": (lambda f: None, ["-o", "data.npy", "--overwrite"], 1, "training data"),
    "a device as output": (
        lambda f: os.mkfifo(f / "pipe"),
        ["-o", "pipe", "--overwrite"],
        1,
        "device or pipe",
    ),
    "mean of floats": (lambda f: None, ["--mean", "0.5"], 2, "--mean"),
    "infinite mean": (lambda f: None, ["--mean", "inf"], 2, "--mean"),
    "bad number": (lambda f: None, ["--input-size", "3,x"], 2, "--input-size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, options, code, words = BAD[case]
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(files)
    spoil(files)
    mine = names_in(files)
    result = run(*job(files), *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "This is a bug" not in result.output
    assert names_in(files) == mine, "nothing may be left behind"


def test_one_value_per_channel(tmp_path: Path) -> None:
    torch.save(nets.trained(nets.mlp(), nets.batches((10,))).state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.cat(nets.batches((10,))).numpy()[:1])
    base = ["bn-reestimate", tmp_path / "model.pt", "--data", tmp_path / "data.npy", "--arch", "nets:mlp"]
    result = run(*base, "--estimator", "pooled", "--force")
    assert result.exit_code == 1
    assert "one value per channel" in result.stderr
    assert not leftovers(tmp_path)


def test_no_batch_norm_is_nothing_to_do(tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.randn(4, 3, 64, 64).numpy())
    base = ["bn-reestimate", tmp_path / "model.pt", "--data", tmp_path / "data.npy"]
    result = run(*base, "--arch", "torchvision:squeezenet1_1")
    assert result.exit_code == 3
    assert "no BatchNorm" in result.stderr


def test_a_read_only_folder_is_refused_before_the_pass(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "os.access", lambda path, mode, **_: mode != os.W_OK
    )  # root, who runs many a CI, may write anywhere
    monkeypatch.setattr(
        "ckpt_tools.jobs.plan.read_checkpoint", lambda *_, **__: pytest.fail("nothing may be loaded")
    )
    result = run(*job(files))
    assert result.exit_code == 1
    assert "read-only" in result.stderr


def test_a_write_that_the_system_refuses(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ckpt_tools.storage.output.safetensors_writer.save_file", refuse)
    result = run(*job(files))
    assert result.exit_code == 1
    assert "Permission denied" in result.stderr
    assert not leftovers(files)


def test_a_few_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 120)
    (folder / "7.png").write_bytes(b"no image")
    torch.save(nets.trained(nets.DenseNet(), nets.batches((3, 8, 8))).state_dict(), tmp_path / "model.pt")
    base = ["bn-reestimate", tmp_path / "model.pt", "--data", folder, "--arch", ARCH, "--force"]
    result = ok(*base, "--input-size", "3,8,8", "--workers", 2)
    assert "7.png" in result.stdout
    assert "from 119 samples" in result.stdout


def test_help_imports_no_torch_and_the_package_no_library() -> None:
    script = (
        "import sys, runpy; sys.argv = ['ckpt-fix', '--help']\n"
        "try: runpy.run_module('ckpt_tools', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    script = (
        "import sys, ckpt_tools\n"
        "for name in ckpt_tools.__all__: getattr(ckpt_tools, name)\n"
        "import ckpt_tools.jobs.reestimation\n"
        "import ckpt_tools.report.records.reestimation_json, ckpt_tools.report.records.init_json\n"
        "assert not {'timm', 'torchvision', 'ckpt_adapters', 'click'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_every_command_explains_itself() -> None:
    for name in main.commands:
        assert "Usage:" in ok(name, "--help").stdout
    assert run("bn-reestimate").exit_code == 2
    assert run("bn-restimate").exit_code == 2
    assert run("inspect").exit_code == 2


def test_weights_beside_an_average(files: Path) -> None:
    """A state dict at top level with an EMA entry beside it, and the raw weights asked for."""
    state = stored(files / "model.pt")
    torch.save({**state, "ema": {key: value + 1 for key, value in state.items()}}, files / "model.pt")
    ok(*job(files, "--weights", "model"))
    assert ok("diff", files / "model.pt", files / "model.bn.safetensors").exit_code == 0
    assert torch.equal(load_file(files / "model.bn.safetensors")["head.bias"], state["head.bias"])


def test_json_is_alone_on_stdout(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "chatty.py").write_text(
        "import nets\ndef build(drop_rate=0.2):\n    print('building')\n    return nets.DenseNet(drop_rate)\n"
        "def data():\n    print('loading')\n    return nets.batches((3, 8, 8))\n"
    )
    monkeypatch.syspath_prepend(files)
    base = [
        "bn-reestimate",
        files / "model.pt",
        "--data",
        "chatty:data",
        "--arch",
        "chatty:build",
        "-q",
        "--json",
    ]
    result = ok(*base, "--input-size", "3,8,8")
    assert json.loads(result.stdout)["data"]["images"] == 128
    assert "building" in result.stderr


def test_demo() -> None:
    """The bar: test error falls by at least 2 points in the mean of 3 seeds."""
    seeds = json.loads(ok("demo", "--json").stdout)["seeds"]
    falls = [seed["before"]["error"] - seed["after"]["error"] for seed in seeds]
    assert len(falls) == 3
    assert sum(falls) / 3 >= 2


def test_same_command_same_bytes(files: Path) -> None:
    outputs = set()
    for number in range(4):
        ok(*job(files, "-o", files / f"{number}.safetensors", "--limit", 100, "--seed", 3))
        outputs.add((files / f"{number}.safetensors").read_bytes())
    assert len(outputs) == 1
    assert (files / "0.safetensors").stat().st_mode & 0o044, "readable like any file made here"


def test_a_list_of_batches_is_read_whole(files: Path) -> None:
    torch.save(nets.batches((3, 8, 8)), files / "list.pt")
    assert "from 128 samples" in ok(*job(files, "--data", files / "list.pt")).stdout


def test_versioned_modules_load(tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.mnasnet0_5(weights=None).state_dict(), tmp_path / "model.pt")
    ok(
        "inspect",
        tmp_path / "model.pt",
        "--arch",
        "torchvision:mnasnet0_5",
        "--input-size",
        "3,64,64",
        "--json",
    )


def test_layers_are_chosen_by_name(files: Path) -> None:
    chosen = ("--only", "norms", "--keep", "norms.1", "--keep", "*.3")
    out = json.loads(ok(*job(files, *chosen, "--json")).stdout)
    assert [layer["name"] for layer in out["layers"] if layer["rewritten"]] == ["norms.2"]
    assert "--keep" in next(layer["reason"] for layer in out["layers"] if layer["name"] == "norms.1")
    assert all(
        f"{name} {value}" in out["command"] for name, value in (("--only", "norms"), ("--keep", "'*.3'"))
    )
    before, after = stored(files / "model.pt"), load_file(files / "model.bn.safetensors")
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["norms.2.running_var"]
    mistyped = run(*job(files, "--overwrite", "--keep", "norm.2"))
    assert (mistyped.exit_code, "Did you mean norms.2?" in mistyped.stderr) == (2, True)
    nothing = run(*job(files, "--overwrite", "--keep", "*"))
    assert (nothing.exit_code, "--keep" in nothing.stderr) == (3, True)
