"""The initialisations that `scripts/run bench init` compares with do what their publications say."""

from __future__ import annotations

import math

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from bench import initialisation_rules as rules
from bench import initialisations


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """Of every weight layer, in order of execution."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _given, output: found.append(output.detach()))
        for layer in rules.weight_layers(model)
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


class Parallel(nn.Module):
    """A shared layer, a convolution, and an order of execution that is not that of definition."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.stem = nn.Conv2d(2, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(3 * self.stem(x)).mean((2, 3))
        return self.head(self.head(x) + x)


def test_he_and_xavier_are_torchs_own():
    model = nn.Sequential(nn.Linear(300, 400), nn.Conv2d(30, 40, 3))
    rules.he(model)
    assert [float(layer.weight.detach().var() * layer.weight[0].numel()) for layer in model] == pytest.approx(
        [2, 2], rel=0.05
    )
    rules.xavier(model)
    assert float(model[0].weight.detach().var() * 350) == pytest.approx(1, rel=0.05)
    assert not model[0].bias.any()


def test_lsuv_brings_every_layer_to_unit_variance_on_its_batch_whatever_dropout_does():
    model = initialisations.mlp([40, 40, 20], 30, 5, nn.ReLU)
    batch = noise(64, 30)
    state = torch.get_rng_state()
    for layer in rules.weight_layers(model):
        nn.init.orthogonal_(layer.weight)
    masks = torch.get_rng_state()  # what lsuv's forward will draw its dropout masks from
    torch.set_rng_state(state)
    rules.lsuv(model, batch)
    torch.set_rng_state(masks)
    for z in outputs(model, batch):
        assert abs(float(z.var(correction=0)) - 1) < rules.LSUV_TOLERANCE
    for layer in rules.weight_layers(model):
        gram = layer.weight @ layer.weight.T
        if len(gram) <= layer.in_features:
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_lsuv_goes_by_execution_and_scales_a_shared_layer_once():
    model, batch = Parallel(), noise(32, 2, 8, 8)
    rules.lsuv(model, batch)
    stem, first, _second = outputs(model, batch)
    assert [float(z.var(correction=0)) for z in (stem, first)] == pytest.approx(
        [1, 1], abs=rules.LSUV_TOLERANCE
    )
    assert not any(layer._forward_hooks for layer in rules.weight_layers(model))


def test_autoinits_dropout_rule_leaves_out_the_share_of_the_mean():
    """Behind ReLU and dropout E[x²] = 1/(2p); without the mean's share it is (1/2 − 1/2π)/p + 1/2π."""
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Dropout(0.5), nn.Linear(300, 300))
    assert rules.autoinit_dropout(model, noise(4, 300), 0)
    squared = 1 / (2 * math.pi)
    expected = [1.0, 1 / ((0.5 - squared) / 0.5 + squared)]
    found = [float(z.square().mean()) for z in outputs(model, noise(4_000, 300))]
    assert found == pytest.approx(expected, rel=0.05)


def test_autoinits_dropout_rule_is_exact_behind_a_function_of_mean_zero():
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Dropout(0.5), nn.Linear(300, 300))
    assert rules.autoinit_dropout(model, noise(4, 300), 0)
    found = [float(z.square().mean()) for z in outputs(model, noise(4_000, 300))]
    assert found == pytest.approx([1, 1], rel=0.05)


def test_autoinits_dropout_rule_leaves_nets_alone_that_are_no_chains():
    model = Parallel()
    before = model.head.weight.clone()
    assert not rules.autoinit_dropout(model, noise(4, 2, 8, 8), 0)
    assert torch.equal(model.head.weight, before)


def test_what_is_not_finite_was_not_kept():
    assert initialisations.share([0.5, 2.0, 2.1, math.nan, math.inf, 1.0, 0.4, 0.0]) == "37.5 % (3/8)"


def test_every_contestant_trains_on_the_same_masks_and_order():
    images, labels = initialisations.all_digits()
    keep = [
        initialisations.train(nn.ReLU, lambda *_: None, images[:64], labels[:64], 1e-3, 1, 5)
        for _ in range(2)
    ]
    drawn = initialisations.train(
        nn.ReLU, lambda model, batch, seed: torch.rand(9), images[:64], labels[:64], 1e-3, 1, 5
    )
    assert keep[0] == keep[1] == drawn


def test_a_net_prints_a_row_for_every_contestant(monkeypatch):
    tiny = initialisations.Net("tiny", lambda: initialisations.mlp([16, 16], 16, 0, nn.ReLU), (16,), 4)
    monkeypatch.setitem(initialisations.NETS, "mlp", tiny)
    result = CliRunner().invoke(
        initialisations.main, ["signals", "--only", "mlp", "--seeds", "2", "--samples", "8"]
    )
    assert result.exit_code == 0, result.output
    for title in initialisations.SIGNAL_RULES:
        assert f"| {title}" in result.output
