"""Rates that were used to make the stored statistics are found again, without any training."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from nets import DenseNet, ResNet
from torch import Tensor, nn

from ckpt_tools import walk
from ckpt_tools.diagnosis.rate_fit import RateFit, fit_rates
from ckpt_tools.results import Walk


class TwoRates(nn.Module):
    """One rate before the second BN layer, another one before the third."""

    def __init__(self, first: float = 0.0, second: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for rate in (first, second, 0.0):
            self.layers.extend([nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1)])
            self.layers.append(nn.Dropout(rate))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def images(count: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=(10, 10), mode="bilinear") + 0.3


def settle_statistics(model: nn.Module, inputs: Tensor, passes: int = 6) -> dict[str, Tensor]:
    """Run the model in training mode, as training does in its last batches, and return its state."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(passes):
            for batch in inputs.split(64):
                model(batch)
    state = {key: value.clone() for key, value in model.eval().state_dict().items()}
    # So many batches that nothing is left of the initial variance of 1.
    return {k: torch.tensor(1000) if k.endswith("num_batches_tracked") else v for k, v in state.items()}


def fit(make: type[nn.Module], true: Mapping[str, float], seen: Tensor, given: Tensor) -> RateFit | None:
    """Fit the rates of statistics that were made from ``seen`` at the ``true`` rates."""
    torch.manual_seed(0)
    state = settle_statistics(make(**true), seen)

    def make_model(rates: Mapping[str, float]) -> nn.Module:
        model = make(**rates)
        model.load_state_dict(state)
        return model.eval()

    layers = walk(make(**dict.fromkeys(true, 0.2)), given[:4])
    return fit_rates(make_model, list(true), list(given.split(64)), layers)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_rate_of_the_statistics_is_found(rate: float) -> None:
    found = fit(DenseNet, {"drop_rate": rate}, images(), images())
    assert found is not None
    assert found.is_clear
    assert abs(found.rates["drop_rate"] - rate) <= 0.03
    assert found.score < found.score_at_zero
    assert f"fit {found.rates['drop_rate']:.2f} ± {found.errors['drop_rate']:.2f}" in found.sentence


def test_statistics_without_dropout_show_zero() -> None:
    found = fit(DenseNet, {"drop_rate": 0.0}, images(), images())
    assert found is not None
    assert (found.is_clear, found.is_zero, found.rates) == (True, True, {"drop_rate": 0.0})


def test_inputs_that_differ_from_those_of_training_shift_little() -> None:
    found = fit(DenseNet, {"drop_rate": 0.3}, images(), images() * 0.8 + 0.1)
    assert found is not None
    assert abs(found.rates["drop_rate"] - 0.3) <= 0.07


def test_two_rates_are_told_apart() -> None:
    found = fit(TwoRates, {"first": 0.1, "second": 0.4}, images(), images())
    assert found is not None
    assert found.rates == pytest.approx({"first": 0.1, "second": 0.4}, abs=0.05)


def test_statistics_of_another_kind_of_data_show_nothing_clear() -> None:
    torch.manual_seed(1)
    model = DenseNet(0.2)
    state = settle_statistics(model, images())
    for key, value in state.items():
        if key.endswith("running_var"):
            value.mul_(torch.exp(2 * torch.randn_like(value)))

    def make_model(rates: Mapping[str, float]) -> nn.Module:
        copied = DenseNet(**rates)
        copied.load_state_dict(state)
        return copied.eval()

    found = fit_rates(make_model, ["drop_rate"], list(images().split(64)), walk(model, images()[:4]))
    assert found is not None
    assert not found.is_clear
    assert "no clear rate" in found.sentence


def test_nothing_to_compare_is_none() -> None:
    few = fit(DenseNet, {"drop_rate": 0.2}, images(), images(16))
    model = ResNet(0.0)  # behind whose dropout the walk has found no layer
    layers = Walk(batch_norms=(), dropout_sites=())
    unreached = fit_rates(lambda _: model, ["rate"], list(images().split(64)), layers)
    untrained = fit_rates(
        lambda _: DenseNet(0.2), ["drop_rate"], [images(64)], walk(DenseNet(0.2), images(4))
    )
    assert (few, unreached, untrained) == (None, None, None)


def test_random_generators_come_back_as_they_were() -> None:
    torch.manual_seed(3)
    model = DenseNet(0.2)
    settle_statistics(model, images(), 1)
    layers, before = walk(model, images(4)), torch.random.get_rng_state()
    fit_rates(lambda _: model, ["drop_rate"], list(images(64).split(32)), layers)
    assert torch.equal(before, torch.random.get_rng_state())
