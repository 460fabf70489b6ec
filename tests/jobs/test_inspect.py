"""``inspect_checkpoint``: the page says what the file holds, and what ``bn-reestimate`` then really does."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from ckpt_tools.cli import main
from ckpt_tools.errors import AmbiguousArchitecture
from ckpt_tools.jobs import inspection

ARCH = ("--arch", "nets:DenseNet", "--input-size", "3,8,8")
KEYS = {  # what others read; more may come
    *(
        "architecture",
        "model_kwargs",
        "rates",
        "checkpoint",
        "input",
        "batch_norms",
        "dropout_sites",
        "left_alone",
    ),
    *(
        "containers_trained",
        "recognised_by",
        "twins",
        "candidates",
        "parameters",
        "tensors",
        "dtypes",
        "plan",
        "error",
    ),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def page(*arguments: object, code: int = 0) -> str:
    result = run("inspect", *arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def facts(*arguments: object, code: int = 0) -> dict:
    found = json.loads(page(*arguments, "--json", code=code))
    assert found.keys() >= KEYS
    return found


@pytest.fixture
def model() -> nn.Module:
    return nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))


@pytest.fixture
def file(tmp_path: Path, model: nn.Module) -> Path:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.cat(nets.batches((3, 8, 8))).numpy())
    return tmp_path / "model.pt"


def test_the_file_and_what_is_inside(tmp_path: Path, model: nn.Module) -> None:
    averaged = {
        f"module.{key}": value.half() if value.is_floating_point() else value for key, value in state(model)
    }
    words = {
        "epoch": 7,
        "metric": 70.123456789,
        "args": {"lr": 0.1, "drop": 0.2},
        "run": "x" * 99,
        "\x1b[31m": "\x07",
    }
    torch.save(
        {**words, "model": model.state_dict(), "model_ema": averaged, "optimizer": {}}, tmp_path / "last.pth"
    )
    found = facts(tmp_path / "last.pth", *ARCH)
    assert found["checkpoint"]["weights"] == "model_ema"
    assert found["checkpoint"]["prefix"] == "module."
    assert found["checkpoint"]["bytes"] == (tmp_path / "last.pth").stat().st_size
    assert found["checkpoint"]["words"]["args"] == {"lr": 0.1, "drop": 0.2}
    assert found["tensors"] == len(averaged)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    floats = sum(value.nbytes for value in averaged.values() if value.is_floating_point())
    assert found["dtypes"]["float16"]["bytes"] == floats
    text = page(tmp_path / "last.pth", *ARCH)
    for said in (
        "'model_ema'",
        "'module.'",
        "epoch=7",
        "metric=70.1235",
        "args (2 entries)",
        "left out",
        "optimizer",
    ):
        assert said in text
    assert "x" * 50 not in text
    assert all(character.isprintable() or character == "\n" for character in text)


def state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


def test_counters_tell_what_is_trained(file: Path, model: nn.Module) -> None:
    steps = int(model.norm.num_batches_tracked)
    assert {layer["batches"] for layer in facts(file, *ARCH)["batch_norms"]} == {steps}
    assert f"trained on {steps} batches" in page(file, *ARCH)
    model.norms[1].reset_running_stats()
    torch.save(model.state_dict(), file)
    assert [layer["name"] for layer in facts(file, *ARCH)["batch_norms"] if layer["batches"] == 0] == [
        "norms.1"
    ]
    assert "only 4 of which has seen data" in page(file, *ARCH)
    assert page(file, *ARCH).count("never trained") == 1
    torch.save({key: value for key, value in state(model) if "tracked" not in key}, file)
    layers = facts(file, *ARCH)["batch_norms"]
    assert {layer["name"]: layer["batches"] for layer in layers}.items() >= {
        "norms.1": 0,
        "norm": None,
    }.items()


def test_counters_of_zero_say_nothing_beside_statistics_of_a_training(file: Path, model: nn.Module) -> None:
    weights = model.state_dict()
    for key, value in weights.items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
    torch.save(weights, file)
    assert {layer["batches"] for layer in facts(file, *ARCH)["batch_norms"]} == {None}
    assert "seen data" not in page(file, *ARCH)
    model.norms[1].reset_running_stats()
    torch.save(model.state_dict(), file)
    layers = facts(file, *ARCH)["batch_norms"]
    assert [layer["name"] for layer in layers if layer["batches"] == 0] == ["norms.1"]


def test_sites_say_what_lies_behind_them(file: Path) -> None:
    found = facts(file, *ARCH)
    text = page(file, *ARCH)
    for site in found["dropout_sites"]:
        behind = [layer["name"] for layer in found["batch_norms"] if site["name"] in layer["downstream_of"]]
        row = next(line for line in text.splitlines() if line.startswith(f"{site['name']} "))
        assert f"{site['rate']:g}" in row
        assert f"{len(behind)}: {behind[0]}" in row


@pytest.mark.parametrize("rate", [None, "0.2", "0.0"])
def test_the_plan_is_what_bn_reestimate_does(
    file: Path, monkeypatch: pytest.MonkeyPatch, rate: str | None
) -> None:
    monkeypatch.chdir(file.parent)
    kwargs = () if rate is None else ("--model-kwargs", f"drop_rate={rate}")
    plan = facts("model.pt", *ARCH, *kwargs)["plan"]
    assert plan["nothing_to_do"] == (rate == "0.0")
    if plan["nothing_to_do"]:
        refused = run("bn-reestimate", "model.pt", "--data", "data.npy", *ARCH[:2], *kwargs)
        assert refused.exit_code == 3
        assert plan["why"] in refused.stderr
        assert plan["why"] in page("model.pt", *ARCH, *kwargs)
        return
    command = shlex.split(plan["command"].replace("DATA", "data.npy"))
    assert plan["command"] in page("model.pt", *ARCH, *kwargs)
    assert command.pop(0) == "ckpt-fix"
    done = json.loads(run(*command, "-q", "--json").stdout)
    assert plan["rewrite"] == [layer["name"] for layer in done["layers"] if layer["rewritten"]]
    assert set(plan["controls"]) == set(done["controls"]["names"])
    assert plan["why"] == done["why"]


def test_the_command_repeats_what_had_to_be_said(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "it's a model.pt"
    torch.save({"weird": model.state_dict(), "odd": model.state_dict()}, path)
    said = [*ARCH, "--weights", "odd", "--model-kwargs", "drop_rate=0.3", "--trust"]
    words = shlex.split(facts(path, *said)["plan"]["command"])
    assert words[:5] == ["ckpt-fix", "bn-reestimate", str(path), "--data", "DATA"]
    assert sorted(words[5:]) == sorted(said)


def test_tables_are_cut_unless_all_is_asked_for() -> None:
    deep = ("--arch", "nets:DenseNet", "--model-kwargs", "layers=16", "--input-size", "3,8,8")
    short, whole = page(*deep), page(*deep, "--all")
    assert "… and 5 more (--all shows them)" in short
    assert "… and" not in whole
    assert all(f"norms.{number}" in whole for number in range(16))
    assert len(facts(*deep)["batch_norms"]) == 17


def test_an_architecture_alone() -> None:
    found = facts("--arch", "timm:test_resnet", "--model-kwargs", "drop_path_rate=0.1")
    assert (found["checkpoint"], found["plan"]) == (None, None)
    assert found["architecture"] == "timm:test_resnet"
    assert found["rates"] == "model"
    assert any(layer["downstream_of"] for layer in found["batch_norms"])
    assert "the architecture alone" in page("--arch", "timm:test_resnet")
    assert run("inspect").exit_code == 2
    assert run("inspect", "--arch", "timm:no_such_net").exit_code == 1


def test_a_model_of_a_library(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=7)
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, tmp_path / "model.pt")
    found = facts(tmp_path / "model.pt")
    assert found["architecture"] == "timm:test_resnet"
    assert found["model_kwargs"]["num_classes"] == 7
    assert found["input"]["shape"] == [3, 160, 160]
    text = page(tmp_path / "model.pt")
    assert found["input"]["interpolation"] in text
    for said in (
        "3×160×160",
        "mean 0.5/0.5/0.5",
        "default_cfg",
        "not recorded",
        "none of which has seen data",
    ):
        assert said in text


def unknown(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"strange.{number}.{key}": value for number, (key, value) in enumerate(state(model))}


def test_an_unknown_architecture_ends_with_what_is_known(tmp_path: Path, model: nn.Module) -> None:
    torch.save({"state_dict": unknown(model), "epoch": 3}, tmp_path / "model.pt")
    result = run("inspect", tmp_path / "model.pt")
    assert result.exit_code == 1
    assert "--arch" in result.stderr
    assert "epoch=3" in result.stdout
    assert "not known" in result.stdout
    found = facts(tmp_path / "model.pt", code=1)
    assert (found["architecture"], found["plan"], found["batch_norms"]) == (None, None, [])
    assert found["error"] in result.stderr
    assert found["tensors"] == len(state(model))


def test_candidates_are_listed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*arguments: object) -> None:
        raise AmbiguousArchitecture("several fit; choose with --arch", ("timm:one", "timm:other"))

    monkeypatch.setattr(inspection, "identify_model", torn)
    assert facts(file, code=1)["candidates"] == ["timm:one", "timm:other"]
    text = page(file, code=1)
    for said in ("one of timm:one, timm:other", "running variances of 5 layers", "let the data choose"):
        assert said in text


def language_model() -> dict[str, torch.Tensor]:
    return {
        "wte.weight": torch.randn(50, 8),
        "h.0.ln.weight": torch.ones(8),
        "h.0.mlp.weight": torch.randn(8, 8),
    }


@pytest.mark.parametrize("words", [{}, {"arch": "no_such_net"}])
def test_without_batch_norm_there_is_nothing_to_do(tmp_path: Path, words: dict[str, str]) -> None:
    torch.save({"state_dict": language_model(), **words}, tmp_path / "lm.pt")
    assert "nothing" in page(tmp_path / "lm.pt")
    found = facts(tmp_path / "lm.pt")
    assert found["plan"]["nothing_to_do"]
    assert (found["plan"]["command"], found["error"]) == (None, None)


def test_a_known_model_without_batch_norm(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    torch.save(net.state_dict(), tmp_path / "model.pt")
    (tmp_path / "grouped.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        text = page("model.pt", "--arch", "grouped:make", "--input-size", "3,8,8")
        assert "no BN layer" in text
        assert "nothing to do" in text
        assert facts("model.pt", "--arch", "grouped:make", "--input-size", "3,8,8")["plan"]["nothing_to_do"]


def diverged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "norm.running_var": torch.full_like(state["norm.running_var"], torch.nan)}


@pytest.mark.parametrize(
    ("change", "arguments", "code", "said"),
    [
        (dict, ["--arch", "nets:DenseNet"], 2, "--input-size"),
        (
            dict,
            ["--arch", "nets:DenseNet", "--input-size", "3,8,8", "--model-kwargs", "layers=2"],
            1,
            "does not fit",
        ),
        (dict, ["--arch", "nets:DenseNet", "--input-size", "5,8,8"], 1, "--input-size"),
        (dict, ["--arch", "nets:NoSuchNet"], 1, "NoSuchNet"),
        (diverged, [*ARCH], 1, "diverged"),
    ],
)
def test_what_stops_it_comes_after_the_page(
    file: Path, model: nn.Module, change: Callable[[dict], dict], arguments: list[str], code: int, said: str
) -> None:
    torch.save(change(model.state_dict()), file)
    result = run("inspect", file, *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert f"{file}, " in result.stdout
    assert facts(file, *arguments, code=code)["error"]


def test_what_is_no_checkpoint_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint\n" * 100)
    for path in ("text.pt", "missing.pt"):
        result = run("inspect", tmp_path / path, "--json")
        assert (result.exit_code, result.stdout) == (1, "")
        assert path in result.stderr
