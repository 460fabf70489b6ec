"""Batches with one value per channel: they count, and are normalised with what is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools import reestimate_bn
from ckpt_tools.contract import Estimator
from ckpt_tools.model.random_inputs import RandomBatches


class Pyramid(nn.Module):
    """A segmentation head like DeepLab's: one branch pools the whole image before its BN layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 6, 3, padding=1), nn.Dropout(0.3)
        self.local = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(x))
        pooled = F.interpolate(self.image(x).relu(), x.shape[2:])
        return self.last(torch.cat([self.local(x), pooled], 1))


class Squeezed(nn.Module):
    """Strides down to maps of 1×1, with a BN layer there and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 8), nn.Dropout(0.4), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(x))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(150):
            model(x[torch.randint(len(x), (32,))])
    return model.eval()


def oracle(model: nn.Module, x: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """Pooled variances of every BN layer, by modules that normalise as they are told here."""
    twin, inputs = copy.deepcopy(model).eval(), {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            inputs[name] = []

            def hook(layer: Any, args: tuple[Tensor], output: Tensor, name: str = name) -> Tensor:
                y = args[0]
                inputs[name].append(y.double().transpose(0, 1).flatten(1))
                variance = layer.running_var
                if y.numel() > y.shape[1]:
                    variance = inputs[name][-1].var(1, correction=0).float()
                return F.batch_norm(y, layer.running_mean, variance, layer.weight, layer.bias, eps=layer.eps)

            module.register_forward_hook(hook)
    with torch.no_grad():
        for part in x.split(sizes):
            twin(part)
    return {name: torch.cat(parts, 1).var(1) for name, parts in inputs.items()}


CASES = {
    "image pooling, one image each": (Pyramid, [1] * 40),
    "image pooling, a last image": (Pyramid, [13, 13, 13, 1]),
    "maps of 1×1, one image each": (Squeezed, [1] * 40),
    "maps of 1×1, a single one in between": (Squeezed, [20, 1, 19]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("statistics", ["variance", "mean+variance"])
def test_they_count_and_are_normalised_with_the_stored_statistics(case: str, statistics: Any) -> None:
    make, sizes = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(40, 3, 8, 8)
    model = settled(make(), x)
    expected = oracle(model, x, sizes)
    result = reestimate_bn(
        model, list(x.split(sizes)), estimator="pooled", statistics=statistics, keep_outliers=True, force=True
    )
    assert result.images == 40
    found = {name: dict(model.named_modules())[name].running_var.double() for name in expected}
    for name, variance in found.items():
        # Layers behind others differ in how these are centred while mean and variance are replaced.
        close = 1e-4 if statistics == "variance" else 0.3
        torch.testing.assert_close(variance, expected[name], rtol=close, atol=1e-3, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("estimator", ["auto", "ratio", "exact", "ema"])
def test_every_estimator_runs_on_them(case: str, estimator: Estimator) -> None:
    make, sizes = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(40, 3, 8, 8)
    model = settled(make(), x)
    before = copy.deepcopy(model.state_dict())
    result = reestimate_bn(
        model, list(x.split(sizes)), estimator=estimator, keep_outliers=True, force=True, layers="all"
    )
    assert result.images == 40
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            assert value.isfinite().all()
            ratio = value / before[name]
            assert 0.2 < ratio.median() < 2, name


def test_the_moving_average_leaves_them_out_as_training_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(49, 6)
    model = nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(6))
    peer = nn.BatchNorm1d(6)
    reestimate_bn(model, list(x.split(16)), estimator="ema", force=True, keep_outliers=True)
    for batch in x.split(16)[:3]:
        peer(batch)
    assert isinstance(model[1], nn.BatchNorm1d)
    torch.testing.assert_close(model[1].running_var, peer.running_var)


def test_statistics_that_were_reset_do_not_normalise_a_last_sample() -> None:
    torch.manual_seed(0)
    x = torch.randn(65, 6) * 1000
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)]
    model = nn.Sequential(*layers)  # the first variance is a million, and 1 is stored
    whole = copy.deepcopy(model)
    options = {"statistics": "mean+variance", "keep_outliers": True}
    reestimate_bn(model, list(x.split(64)), **options)
    reestimate_bn(whole, [x], **options)
    for layer in (1, 3):
        torch.testing.assert_close(model[layer].running_var, whole[layer].running_var, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("count", [129, 257, 512, 2, 1])
def test_made_up_inputs_hold_no_batch_of_one(count: int) -> None:
    sizes = [len(batch) for batch in RandomBatches((5,), count)]
    assert sum(sizes) == count
    assert min(sizes) > 1 or count == 1
