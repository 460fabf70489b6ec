"""The provenance of a corrected file is worth no more than other words of a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_tools
from ckpt_tools.contract import Checkpoint, InputSpec
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.admission import ArgumentRefused
from ckpt_tools.identify.loading import identify_model
from ckpt_tools.identify.recorded_provenance import corrected_recipe, describe_input, recorded_input_spec
from ckpt_tools.identify.recorded_rates import recorded_rates

timm = pytest.importorskip("timm")
ESTIMATOR = ("--estimator", "pooled", "--force", "-q")
SPEC = InputSpec((3, 40, 40), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic", 0.9, "squash")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=10)


def checkpoint(entry: Mapping[str, Any], model: nn.Module | None = None) -> Checkpoint:
    """A file whose metadata have this entry of ours, as any program may write it."""
    metadata = {"ckpt_tools": json.dumps({"estimator": "pooled", "version": "1", **entry})}
    tensors = {} if model is None else model.state_dict()
    return Checkpoint(Path("x.safetensors"), "safetensors", tensors, metadata=metadata)


def test_the_input_comes_back() -> None:
    loaded = recorded_input_spec(checkpoint(json.loads(json.dumps(describe_input(SPEC)))))
    assert loaded is not None
    assert describe_input(loaded) == describe_input(SPEC)
    assert describe_input(None) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": None},
        {"shape": []},
        {"shape": "3,4,4"},
        {"shape": [3, 0, 4]},
        {"shape": [3, 4.0, 4]},
        {"shape": [True, 4, 4]},
        {"shape": [3, 10**6, 4]},
        {"shape": [3, 2048, 2048]},
        {"shape": [10**400, 4, 4]},
        {"shape": [1] * 9},
        {"mean": [0.5]},
        {"mean": [0.5, 0.5, "0.5"]},
        {"mean": [0.5, 0.5, None]},
        {"mean": [10**400] * 3},
        {"std": [0.2, 0.2, 0]},
        {"std": [float("nan")] * 3},
        {"std": [float("inf")] * 3},
        {"std": []},
        {"crop_pct": 0},
        {"crop_pct": 1e-9},
        {"crop_pct": "1"},
        {"crop_pct": True},
        {"crop_pct": None},
        {"interpolation": "random"},
        {"interpolation": ["bilinear"]},
        {"crop_mode": {"a": 1}},
        {"crop_mode": "/etc/passwd"},
    ],
)
def test_an_input_that_is_not_admitted(changes: dict[str, object], model: nn.Module) -> None:
    entry = {"architecture": "timm:test_resnet", "input": {**describe_input(SPEC)["input"], **changes}}  # type: ignore[dict-item]
    assert recorded_input_spec(checkpoint(entry)) is None
    # Then the model's own input stands, as without provenance.
    assert (
        identify_model(checkpoint(entry, model)).input_spec
        == identify_model(Checkpoint(Path("x"), "", model.state_dict()), "timm:test_resnet").input_spec
    )


@pytest.mark.parametrize("entry", [{"input": None}, {"input": [1]}, {"input": {}}, {"input": 3}])
def test_an_input_that_is_none(entry: dict[str, object]) -> None:
    assert recorded_input_spec(checkpoint(entry)) is None


@pytest.mark.parametrize(
    "architecture",
    [
        *(None, 3, ["timm:test_resnet"], "", "test_resnet", "timm", "timm:", "timm:no_such_net"),
        *("timm:hf-hub:a/b", "timm:local-dir:/tmp", "factory:os:system", "os:system"),
        *("nets:DenseNet", "nets:Adapter:x", "transformers:os.system", "torchvision:os.system"),
    ],
)
def test_a_file_chooses_only_what_an_adapter_lists(architecture: object) -> None:
    assert corrected_recipe(checkpoint({"architecture": architecture, "model_kwargs": {}})) is None


def test_nothing_of_the_users_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lethal_module.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ArchitectureError):
        identify_model(checkpoint({"architecture": "lethal_module:Net"}, model))


@pytest.mark.parametrize(
    "arguments",
    [{"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"block": "x.y"}, {"drop_path_rate": 7}],
)
def test_arguments_pass_the_gate(model: nn.Module, arguments: dict[str, object]) -> None:
    file = checkpoint({"architecture": "timm:test_resnet", "model_kwargs": arguments}, model)
    (name,) = arguments
    with pytest.raises(ArchitectureError, match=name):
        identify_model(file, "timm:test_resnet")
    # Without the user's word either the gate refuses the file, or its tensors show what it is.
    with contextlib.suppress(ArgumentRefused):
        assert name not in identify_model(file).recipe.kwargs


def test_arguments_of_another_architecture_do_not_count(model: nn.Module) -> None:
    entry = {"architecture": "timm:resnet34", "model_kwargs": {"drop_path_rate": 0.2}}
    loaded = identify_model(checkpoint(entry, model), "timm:test_resnet")
    assert "drop_path_rate" not in loaded.recipe.kwargs
    entry["architecture"] = "timm:test_resnet.r160_in1k"  # a tag names weights
    assert identify_model(checkpoint(entry, model), "timm:test_resnet").rates == "recorded"


def test_an_architecture_that_does_not_fit_is_not_believed(model: nn.Module) -> None:
    loaded = identify_model(checkpoint({"architecture": "timm:resnet34", "model_kwargs": {}}, model))
    assert loaded.recognised_by != "checkpoint"


def test_rates_of_a_factory(model: nn.Module) -> None:
    import nets

    entry = {"architecture": "nets:DenseNet", "model_kwargs": {"drop_rate": 0.4}}
    loaded = identify_model(checkpoint(entry, nets.DenseNet()), "nets:DenseNet")
    assert (loaded.rates, loaded.model.drop_rate) == ("recorded", 0.4)
    entry["model_kwargs"] = {"drop_rate": 0.4, "layers": "os.system"}
    with pytest.raises(ArchitectureError, match="--model-kwargs layers"):
        identify_model(checkpoint(entry, nets.DenseNet()), "nets:DenseNet")
    given = identify_model(checkpoint(entry, nets.DenseNet()), "nets:DenseNet", {"layers": 4})
    assert given.model.drop_rate == 0.4


def test_rates_of_modules(tmp_path: Path) -> None:
    """The rates of a pickled module tree stand in the provenance by path."""
    entry = {"module_rates": {"layer1.0": {"p": 0.3, "x": "y"}, "a": 3, "b": {"p": 7}}}
    assert recorded_rates(checkpoint(entry)) == {"layer1.0": {"p": 0.3}}
    assert recorded_rates(checkpoint({"module_rates": 3})) == {}
    assert recorded_rates(checkpoint({})) == {}


def test_a_pickled_module_keeps_its_rates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pickled = timm.create_model("test_resnet", num_classes=10, drop_path_rate=0.2)
    torch.save(pickled, tmp_path / "module.pt")
    torch.save(torch.randn(16, 3, 64, 64), tmp_path / "data.pt")
    from cli_runs import ok

    ok("bn-reestimate", tmp_path / "module.pt", "--data", tmp_path / "data.pt", *ESTIMATOR)
    before, after = (ckpt_tools.load(tmp_path / name) for name in ("module.pt", "module.bn.safetensors"))
    assert before.rates == after.rates == "recorded"
    walks = [ckpt_tools.walk(loaded.model, torch.zeros(2, 3, 64, 64)) for loaded in (before, after)]
    assert walks[0].dropout_sites == walks[1].dropout_sites  # to the last bit
    assert any(site.active for site in walks[0].dropout_sites)
