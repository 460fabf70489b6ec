"""init-rewrite end to end: new weights in a new file, all else bit for bit, nothing written on any error."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest
import timm
import torch
from cli_runs import names_in, ok, raw_tensors, run, stored
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ckpt_tools.errors import CheckFailed
from ckpt_tools.jobs.initialization import refuse_trained_checkpoint, seed_constructors
from ckpt_tools.storage.output.checkpoint_writer import write_safetensors

DENSE = ("--arch", "nets:DenseNet", "--input-size", "3,8,8")


class Mixed(nn.Module):
    """What an initialisation must keep: a positional table, an embedding, norms; and tied weights."""

    def __init__(self, drop_rate: float = 0.2) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6))
        self.table = nn.Embedding(4, 6)
        self.norm = nn.LayerNorm(6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.position + self.table(torch.zeros(len(x), dtype=torch.long, device=x.device)))
        return self.head(self.drop(torch.relu(self.second(torch.relu(self.first(x))))))


MIXED = ("--arch", "test_init_cli:Mixed", "--input-size", "6")


def no_weights() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A fresh checkpoint whose norms are nevertheless nobody's default."""
    model = nets.DenseNet()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter)
    torch.save({"state_dict": model.state_dict(), "epoch": 0}, tmp_path / "fresh.pt")
    return tmp_path / "fresh.pt"


def weights_of(path: Path) -> dict[str, bytes]:
    return {
        key: value.numpy().tobytes()
        for key, value in torch.load(path, weights_only=True)["state_dict"].items()
    }


def written(path: Path) -> dict[str, bytes]:
    return {key: content for key, (_, _, content) in raw_tensors(path).items()}


def tampered(path: Path, target: Path, change: dict[str, Tensor], **said: object) -> Path:
    """The same file with other tensors, or with other words in its provenance."""
    with safe_open(path, framework="pt") as file:
        words = json.loads(file.metadata()["ckpt_tools"])
    metadata = {"format": "pt", "ckpt_tools": json.dumps({**words, **said})}
    tensors = load_file(path) | change
    write_safetensors(
        target, {key: tensors[key] for key in raw_tensors(path)}, metadata=metadata
    )  # in their order
    return target


# --- what is written ----------------------------------------------------------------------------------------


def test_only_weights_and_their_biases_differ_from_the_checkpoint(fresh: Path) -> None:
    before, source = weights_of(fresh), fresh.read_bytes()
    found = json.loads(ok("init-rewrite", fresh, *DENSE, "--json").stdout)
    output = fresh.with_name("fresh.init.safetensors")
    assert found["output"]["path"] == str(output)
    assert fresh.read_bytes() == source
    after = written(output)
    assert list(after) == list(before)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {key for key in before if key.startswith(("stem", "convs", "head"))}
    assert all(not any(after[key]) for key in changed if key.endswith(".bias"))
    nets.DenseNet().load_state_dict(load_file(output), strict=True)


def test_half_precision_stays(fresh: Path) -> None:
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in nets.DenseNet().state_dict().items()
    }
    torch.save(state, fresh)
    ok("init-rewrite", fresh, *DENSE)
    after = load_file(fresh.with_name("fresh.init.safetensors"))
    assert {key: value.dtype for key, value in after.items()} == {
        key: value.dtype for key, value in state.items()
    }
    assert not torch.equal(after["head.weight"], state["head.weight"])
    assert ok("diff", fresh, fresh.with_name("fresh.init.safetensors"), "--expect", "init").exit_code == 0


def test_an_architecture_alone_keeps_the_library_s_other_values(tmp_path: Path) -> None:
    torch.manual_seed(7)
    built = Mixed().state_dict()
    torch.manual_seed(99)
    found = json.loads(
        ok("init-rewrite", *MIXED, "--seed", 7, "-o", tmp_path / "init.safetensors", "--json").stdout
    )
    after = load_file(tmp_path / "init.safetensors")
    assert list(raw_tensors(tmp_path / "init.safetensors")) == list(built)
    for key in ("position", "table.weight", "norm.weight", "norm.bias"):
        assert torch.equal(after[key], built[key]), key
    assert {layer["parameter"] for layer in found["layers"]} == {"first.weight", "head.weight"}
    assert not torch.equal(after["first.weight"], built["first.weight"])
    assert found["checkpoint"] is None
    Mixed().load_state_dict(after, strict=True)


def test_tied_weights_are_new_under_every_name(tmp_path: Path) -> None:
    torch.save(Mixed().state_dict(), tmp_path / "fresh.pt")
    ok("init-rewrite", tmp_path / "fresh.pt", *MIXED)
    after = load_file(tmp_path / "fresh.init.safetensors")
    assert torch.equal(after["first.weight"], after["second.weight"])
    assert not torch.equal(after["first.weight"], stored(tmp_path / "fresh.pt")["first.weight"])
    assert ok("diff", tmp_path / "fresh.pt", tmp_path / "fresh.init.safetensors").exit_code == 0


@pytest.mark.parametrize("source", ["checkpoint", "architecture"])
def test_a_seed_fixes_every_byte_and_another_seed_none_of_the_weights(fresh: Path, source: str) -> None:
    given = (*((fresh,) if source == "checkpoint" else ()), *DENSE)
    made = []
    for number, options in enumerate(
        [("--seed", 3), ("--seed", 3, "--verify", "--samples", 8), ("--seed", 4)]
    ):
        torch.manual_seed(number)
        ok("init-rewrite", *given, *options, "-o", fresh.with_name(f"{number}.safetensors"))
        made.append(fresh.with_name(f"{number}.safetensors"))
    assert made[0].read_bytes() == made[1].read_bytes()
    first, other = (written(path) for path in made[1:])
    assert all(first[key] != other[key] for key in first if key.startswith(("stem.w", "convs.0.w", "head.w")))


def test_seeding_a_build_leaves_every_generator_as_it_was() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def restart() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    restart()
    undisturbed = draws()
    restart()
    with seed_constructors(2**40):
        inside = draws()
    assert draws() == undisturbed
    with seed_constructors(2**40):
        assert draws() == inside != undisturbed


# --- what is said -------------------------------------------------------------------------------------------


def test_json_tells_everything(fresh: Path) -> None:
    rate = ("--model-kwargs", "drop_rate=0.3")
    result = ok(
        "init-rewrite", fresh, *DENSE, *rate, "--scheme", "normal", "--backward-term", "off", "--json"
    )
    found = json.loads(result.stdout)
    settings = ("scheme", "rule", "backward_term", "backward_factor", "seed")
    assert [found[name] for name in settings] == ["normal", "paper", "off", "paper", 0]
    assert (found["architecture"], found["model_kwargs"]) == ("nets:DenseNet", {"drop_rate": 0.3})
    assert found["checkpoint"]["sha256"]
    assert found["output"]["sha256"]
    assert found["tool"]["version"]
    assert found["libraries"].keys() >= {"torch", "safetensors"}
    assert found["verification"] is None
    names = [layer["name"] for layer in found["layers"]]
    assert names == ["stem", "convs.0", "convs.1", "convs.2", "convs.3", "head"]
    assert {"activation", "second_moment", "keep", "next_slope", "divisor"} <= found["layers"][-1][
        "factors"
    ].keys()
    assert all(layer["reason"] and not layer["rewritten"] for layer in found["left"])


def test_the_table_lists_layers_in_order_and_groups_what_is_left(tmp_path: Path) -> None:
    text = ok("init-rewrite", *MIXED, "-o", tmp_path / "init.safetensors").stdout
    assert text.index("\nfirst ") < text.index("\nhead ")
    for words in (
        "divided by",
        "left as they are: ",
        "table.weight",
        "written: ",
        "sha256",
        "hypersphere, seed 0",
    ):
        assert words in text
    assert not text.endswith("\n\n")


def test_a_long_table_is_cut_with_a_hint(tmp_path: Path) -> None:
    deep = ("--arch", "nets:DenseNet", "--input-size", "3,8,8", "--model-kwargs", "layers=45")
    text = ok("init-rewrite", *deep, "-o", tmp_path / "init.safetensors").stdout
    assert "and 7 more (--json lists all)" in text
    found = json.loads(
        ok("init-rewrite", *deep, "-o", tmp_path / "init.safetensors", "--overwrite", "--json").stdout
    )
    assert len(found["layers"]) == 47


@pytest.mark.parametrize("data", [False, True])
def test_verification_measures_every_layer_before_and_after(fresh: Path, data: bool) -> None:
    np.save(fresh.with_name("data.npy"), torch.cat(nets.batches((3, 8, 8))).numpy())
    how = ("--data", fresh.with_name("data.npy")) if data else ("--verify",)
    found = json.loads(
        ok("init-rewrite", fresh, *DENSE, *how, "--samples", 20, "--device", "cpu", "--json").stdout
    )
    tried = found["verification"]
    assert (tried["samples"], tried["device"]) == (20, "cpu")
    assert ("data.npy" if data else "N(0, 1)") in tried["inputs"]
    assert [row["parameter"] for row in tried["layers"]] == [layer["parameter"] for layer in found["layers"]]
    for row in tried["layers"]:
        assert row["before"]["variance"] > 0
        assert row["after"]["variance"] > 0
        assert row["after"] != row["before"]
        assert row["after"].keys() == {"variance", "error_variance"}
    assert tried["within_range"]["after"] == sum(
        0.5 <= row["after"]["variance"] <= 2 for row in tried["layers"]
    )


def test_a_report_is_a_picture_beside_the_output(fresh: Path) -> None:
    picture = fresh.with_name("signals.png")
    text = ok("init-rewrite", fresh, *DENSE, "--report", picture, "--samples", 8).stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Var(δ) before" in text
    assert "Var(z) within 0.5–2" in text
    assert names_in(fresh.parent) == ["fresh.init.safetensors", "fresh.pt", "signals.png"]


# --- diff ---------------------------------------------------------------------------------------------------


@pytest.fixture
def output(fresh: Path) -> Path:
    ok("init-rewrite", fresh, *DENSE)
    return fresh.with_name("fresh.init.safetensors")


@pytest.mark.parametrize("expect", ["auto", "init"])
def test_diff_passes_and_names_whatever_else_changed(fresh: Path, output: Path, expect: str) -> None:
    assert json.loads(ok("diff", fresh, output, "--expect", expect, "--json").stdout)["expect"] == "init"
    after = load_file(output)
    for key in (
        "norms.1.weight",
        "norms.1.bias",
        "norm.running_var",
        "norm.num_batches_tracked",
        "stem.bias",
    ):
        other = tampered(output, output.with_name(f"{key}.safetensors"), {key: after[key] + 1})
        result = run("diff", fresh, other, "--expect", expect)
        assert result.exit_code == 4
        assert f"unexpected: {key}: " in result.stdout
        assert result.stdout.count("unexpected:") == 1


def test_a_list_that_claims_too_much_is_not_believed(fresh: Path, output: Path) -> None:
    after = load_file(output)
    claims = {"rewritten": ["norm.weight"], "zeroed": []}
    other = tampered(
        output, output.with_name("claims.safetensors"), {"norm.weight": after["norm.weight"] + 1}, **claims
    )
    result = run("diff", fresh, other)
    assert result.exit_code == 4
    assert "norm.weight: listed as a rewritten weight, but has fewer than two dimensions" in result.stdout
    assert "stem.weight: values differ" in result.stdout


def test_expect_init_needs_a_file_that_says_so(fresh: Path, output: Path) -> None:
    result = run("diff", output, fresh, "--expect", "init")
    assert result.exit_code == 1
    assert "init-rewrite" in result.stderr
    assert run("diff", fresh, output, "--expect", "variance").exit_code == 4


def test_an_output_without_a_source_compares_with_any_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"model": Mixed().state_dict()}, tmp_path / "fresh.pt")
    ok("init-rewrite", *MIXED, "-o", tmp_path / "init.safetensors")
    assert json.loads(ok("diff", tmp_path / "fresh.pt", tmp_path / "init.safetensors", "--json").stdout)["ok"]
    torch.save(Mixed().state_dict(), tmp_path / "other.pt")
    result = run("diff", tmp_path / "other.pt", tmp_path / "init.safetensors")
    assert result.exit_code == 4
    assert "position" in result.stdout


def test_an_output_can_be_the_source_of_the_next(fresh: Path, output: Path) -> None:
    again = fresh.with_name("again.safetensors")
    ok("init-rewrite", output, *DENSE, "--seed", 5, "-o", again)
    assert ok("diff", output, again).exit_code == 0
    assert ok("diff", fresh, again).exit_code == 0


# --- bad input ----------------------------------------------------------------------------------------------


def _train(path: Path) -> None:
    torch.save(nets.trained(nets.DenseNet(), nets.batches((3, 8, 8))).state_dict(), path)


def _train_without_counters(path: Path) -> None:
    _train(path)
    torch.save({key: value for key, value in stored(path).items() if "tracked" not in key}, path)


ALONE = ("-o", "new.safetensors")
BAD = {
    "nothing given": (["-o", "new.safetensors"], 2, "--arch"),
    "no output": ([*DENSE], 2, "-o"),
    "no weight layers": (
        ["--arch", "test_init_cli:no_weights", "--input-size", "3,8,8", *ALONE],
        1,
        "convolution",
    ),
    "no input size": (["--arch", "nets:DenseNet", *ALONE], 2, "--input-size"),
    "wrong input size": (["--arch", "nets:DenseNet", "--input-size", "4,8,8", *ALONE], 1, "--input-size"),
    "unknown architecture": (["--arch", "timm:resnt18", *ALONE], 1, "resnet18"),
    "impossible rate": ([*DENSE, "--model-kwargs", "drop_rate=1.5", *ALONE], None, "1.5"),
    "nothing kept": ([*DENSE, "--model-kwargs", "drop_rate=1.0", *ALONE], None, "drop rate"),
    "unknown scheme": ([*DENSE, "--scheme", "cube", *ALONE], 2, "hypersphere"),
    "existing output": ([*DENSE, "-o", "fresh.pt"], 1, "--overwrite"),
    "output is the source": (["fresh.pt", *DENSE, "-o", "fresh.pt", "--overwrite"], 1, "source"),
    "output folder missing": ([*DENSE, "-o", "nowhere/new.safetensors"], 1, "nowhere"),
    "output is the data": (
        ["fresh.pt", *DENSE, "--data", "data.npy", "-o", "data.npy", "--overwrite"],
        1,
        "training data",
    ),
    "report of no format": ([*DENSE, *ALONE, "--report", "signals.xyz"], 2, "signals.xyz"),
    "report is the output": ([*DENSE, "-o", "new.png", "--report", "new.png"], 2, "--report"),
    "missing data": ([*DENSE, *ALONE, "--data", "nowhere.npy"], 1, "nowhere.npy"),
    "unknown device": ([*DENSE, *ALONE, "--verify", "--device", "gpu"], 2, "gpu"),
    "mean without data": ([*DENSE, *ALONE, "--mean", "0.5"], 2, "--data"),
    "one sample": ([*DENSE, *ALONE, "--samples", "1"], 2, "--samples"),
    "other architecture": (["fresh.pt", "--arch", "nets:mlp", "--input-size", "10"], 1, "does not fit"),
    "missing checkpoint": (["none.pt", *DENSE], 1, "none.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, code, words = BAD[case]
    monkeypatch.chdir(fresh.parent)
    np.save("data.npy", np.zeros((4, 3, 8, 8), np.float32))
    mine = {name: Path(name).read_bytes() for name in names_in(fresh.parent)}
    result = run("init-rewrite", *arguments)
    assert result.exit_code == code or (code is None and result.exit_code in (1, 2)), result.output
    assert words in result.stderr
    assert "This is a bug" not in result.output
    assert {name: Path(name).read_bytes() for name in names_in(fresh.parent)} == mine, (
        "nothing may be written"
    )


@pytest.mark.parametrize(
    ("train", "words"), [(_train, "num_batches_tracked: "), (_train_without_counters, "running_mean: ")]
)
def test_a_trained_checkpoint_is_refused_without_force(
    train: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(train)
    train(tmp_path / "model.pt")
    result = run("init-rewrite", tmp_path / "model.pt", *DENSE)
    assert result.exit_code == 4
    assert words in result.stderr
    assert "--force" in result.stderr
    assert names_in(tmp_path) == ["model.pt"]
    ok("init-rewrite", tmp_path / "model.pt", *DENSE, "--force")
    assert ok("diff", tmp_path / "model.pt", tmp_path / "model.init.safetensors").exit_code == 0


def test_statistics_tell_of_a_training_that_no_counter_tells_of() -> None:
    mean, counter = torch.tensor([0.0, -0.5]), torch.tensor(0)
    refuse_trained_checkpoint({"bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": counter})
    # Frozen layers of torchvision start with a variance of 1 - eps.
    refuse_trained_checkpoint({"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2) - 1e-5})
    for more in ({}, {"bn.num_batches_tracked": counter}):
        with pytest.raises(CheckFailed, match=r"bn\.running_mean.*found -0\.5"):
            refuse_trained_checkpoint({"bn.running_mean": mean, **more})
        with pytest.raises(CheckFailed, match=r"bn\.running_var: expected 1 in.*found 0\.25"):
            refuse_trained_checkpoint({"bn.running_var": torch.tensor([1.0, 0.25]), **more})
    with pytest.raises(CheckFailed, match="found nan"):
        refuse_trained_checkpoint({"bn.running_var": torch.tensor([1.0, math.nan])})
    with pytest.raises(CheckFailed, match=r"bn\.num_batches_tracked.*found 12"):
        refuse_trained_checkpoint({"bn.running_mean": mean, "bn.num_batches_tracked": torch.tensor(12)})


def test_a_failing_write_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ckpt_tools.storage.output.safetensors_writer.save_file", refuse)
    assert run("init-rewrite", fresh, *DENSE).exit_code == 1
    assert names_in(fresh.parent) == ["fresh.pt"]


def test_help_imports_no_torch() -> None:
    script = (
        "import sys, runpy; sys.argv = ['ckpt-fix', 'init-rewrite', '--help']\n"
        "try: runpy.run_module('ckpt_tools', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'timm', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=dict(os.environ))


def test_a_head_of_ones_own_cannot_be_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("resnet10t")
    model.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(512, 3))
    torch.save(model.state_dict(), "own.pt")
    result = run("init-rewrite", "own.pt", "--arch", "timm:resnet10t")
    assert result.exit_code == 1
    assert "another head under fc." in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.pt"]
