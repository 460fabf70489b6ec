"""A checkpoint without recorded drop rates: bn-reestimate reads them from the statistics."""

from __future__ import annotations

import json
from pathlib import Path

import nets
import numpy as np
import pytest
import timm
import torch
from cli_runs import ok, run
from torch import Tensor, nn

from ckpt_tools import load, walk
from ckpt_tools.identify.loading import load_architecture
from ckpt_tools.jobs.drop_rates import estimate_drop_rates

SHAPE = (3, 8, 8)


def training_images() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(256, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear") + 0.3


def settle_statistics(model: nn.Module) -> nn.Module:
    """Give the BN layers statistics as a long training with the model's rates leaves them."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(6):
            for batch in training_images().split(64):
                model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.num_batches_tracked.fill_(1000)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    np.save(tmp_path / "data.npy", training_images().numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_dense_net(rate: float) -> None:
    torch.manual_seed(0)
    torch.save(settle_statistics(nets.DenseNet(rate)).state_dict(), "model.pt")


def job(*more: str) -> list[str]:
    return ["bn-reestimate", "model.pt", "--data", "data.npy", "--arch", "nets:DenseNet", "-q", *more]


@pytest.mark.usefixtures("folder")
def test_clear_rates_are_used() -> None:
    save_dense_net(0.4)
    facts = json.loads(ok(*job("--json")).stdout)
    rates = facts["rates"]
    assert rates["source"] == "estimated"
    assert abs(rates["values"]["drop_rate"] - 0.4) <= 0.03
    assert 0 < rates["errors"]["drop_rate"] <= 0.03
    assert rates["fit"].startswith("drop rate not recorded; the statistics fit 0.")
    assert abs(facts["model_kwargs"]["drop_rate"] - 0.4) <= 0.03
    # The first BN layer lies behind no dropout, and so it stays as it is.
    assert [layer["name"] for layer in facts["layers"] if not layer["rewritten"]] == ["norms.0"]


@pytest.mark.usefixtures("folder")
def test_the_text_says_what_fits() -> None:
    save_dense_net(0.3)
    command = [part for part in job() if part != "-q"]
    assert "drop rate not recorded; the statistics fit 0." in ok(*command).stdout


@pytest.mark.usefixtures("folder")
def test_zero_rates_leave_nothing_to_do() -> None:
    save_dense_net(0.0)
    result = run(*job())
    assert result.exit_code == 3
    assert "the statistics fit 0.00 ± 0.01" in result.stderr
    assert not Path("model.bn.safetensors").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("choice", [("--layers", "all"), ("--estimator", "pooled")], ids=str)
def test_what_the_user_chose_is_not_overruled(choice: tuple[str, str]) -> None:
    save_dense_net(0.0)
    facts = json.loads(ok(*job("--json", *choice)).stdout)
    assert facts["rates"] == {"source": "unknown", "values": {}, "errors": {}}


@pytest.mark.usefixtures("folder")
def test_given_rates_are_taken_as_they_are() -> None:
    save_dense_net(0.3)
    facts = json.loads(ok(*job("--json", "--model-kwargs", "drop_rate=0.2")).stdout)
    assert facts["rates"] == {"source": "given", "values": {"drop_rate": 0.2}, "errors": {}}


def test_only_rates_before_batch_norm_are_fitted(tmp_path: Path) -> None:
    kwargs = {"num_classes": 5, "layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16), "stem_width": 16}
    torch.manual_seed(1)
    model = timm.create_model("resnet18", drop_path_rate=0.5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # timm begins with branches that are multiplied by zero, before whose noise nothing changes.
            nn.init.ones_(module.weight)
    settle_statistics(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", "timm:resnet18", model_kwargs=kwargs)
    assert loaded.rates == "unknown"
    model_walk = walk(loaded.model, training_images()[:2], probe=loaded.probe)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    fit = estimate_drop_rates(loaded, model_walk, training_images().split(64))
    assert fit is not None
    # `drop_rate` of a ResNet acts behind the last BN layer.
    assert "drop_path_rate" in fit.rates
    assert "drop_rate" not in fit.rates
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())


def test_an_architecture_without_rates_has_none_to_fit() -> None:
    loaded = load_architecture("torchvision:resnet18")
    model_walk = walk(loaded.model, torch.zeros(2, 3, 32, 32))
    assert estimate_drop_rates(loaded, model_walk, [torch.rand(64, 3, 32, 32)]) is None
