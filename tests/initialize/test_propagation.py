"""The propagated rule against simulation, and what it does to whole networks."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools import rewrite_init
from ckpt_tools.initialize.verify import measure_signals


def simulated(net: nn.Module, x: Tensor) -> float:
    """E[x²] of what reaches the layer ``last`` in training mode, over many draws of all weights before it."""
    found = []
    for seed in range(20):
        rewrite_init(net, x[:2], rule="propagated", seed=seed)
        torch.manual_seed(seed)
        handle = net.last.register_forward_pre_hook(
            lambda _, args: found.append(float(args[0].detach().square().mean()))
        )
        net.train()(x)
        handle.remove()
    return statistics.fmean(found)


class Vectors(nn.Module):
    def __init__(self, f: object, width: int = 400) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(300, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.f, self.last = f, nn.LazyLinear(10)
        self(torch.zeros(2, 300))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self, F.relu(self.first(x))))


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: F.dropout(x, 0.5),
        lambda m, x: x + F.dropout(F.relu(m.second(x)), 0.3),
        lambda m, x: F.relu(x + m.second(x)),
        lambda m, x: torch.tanh(m.second(F.dropout(x, 0.4)) + m.third(x)),
        lambda m, x: torch.cat([x, F.gelu(m.second(x)), m.third(x)], 1),
        lambda m, x: m.second(x) * torch.sigmoid(m.third(x)),
        lambda m, x: F.glu(m.second(x)),
        lambda m, x: F.layer_norm(x, (400,)) + m.second(x),
        lambda m, x: F.normalize(m.second(x)) * 20,
        lambda m, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
        lambda m, x: m.second(x) * torch.linspace(0, 1, 400) + torch.linspace(-1, 1, 400),
        lambda m, x: x - 0.5 * F.elu(m.second(x)),
        lambda m, x: F.alpha_dropout(F.selu(m.second(x)), 0.2, training=True),
        lambda m, x: torch.bmm(m.second(x).view(-1, 20, 20), m.third(x).view(-1, 20, 20)).flatten(1),
    ],
)
def test_second_moments_are_those_of_a_simulation(f: object) -> None:
    torch.manual_seed(0)
    net = Vectors(f)
    x = torch.randn(100, 300)
    result = rewrite_init(net, x, rule="propagated")
    (last,) = [layer for layer in result.layers if layer.name == "last"]
    assert last.factors.second_moment / last.factors.keep == pytest.approx(simulated(net, x), rel=0.1)


class Maps(nn.Module):
    def __init__(self, f: object) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.f, self.last = f, nn.LazyConv2d(4, 1)
        self(torch.zeros(2, 3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self, F.relu(self.first(x))))


@pytest.mark.parametrize(
    ("f", "within"),
    [
        (lambda m, x: F.avg_pool2d(m.second(x), 4), 0.25),  # neighbouring positions are not independent
        (lambda m, x: F.adaptive_avg_pool2d(F.relu(m.second(x)), 1), 0.15),
        (lambda m, x: m.second(x).mean((2, 3), keepdim=True), 0.2),
        (lambda m, x: F.max_pool2d(m.second(x), 2), 0.3),
        (lambda m, x: F.batch_norm(m.second(x), None, None, torch.full((64,), 2.0), training=True), 0.05),
        (lambda m, x: F.group_norm(m.second(x), 4), 0.05),
        (lambda m, x: F.interpolate(m.second(x), scale_factor=2), 0.15),
        (lambda m, x: F.pixel_shuffle(m.second(x), 2), 0.15),
        (lambda m, x: F.conv2d(m.second(x), torch.full((64, 1, 3, 3), 1 / 9), groups=64), 0.3),
        (lambda m, x: x * torch.sigmoid(m.second(x).mean((2, 3), keepdim=True)), 0.15),
        (lambda m, x: F.dropout2d(m.second(x), 0.5), 0.15),
        (lambda m, x: m.second(x)[:, ::2], 0.15),
    ],
)
def test_maps_too(f: object, within: float) -> None:
    torch.manual_seed(0)
    net = Maps(f)
    x = torch.randn(24, 3, 16, 16)
    result = rewrite_init(net, x, rule="propagated")
    (last,) = [layer for layer in result.layers if layer.name == "last"]
    assert last.factors.second_moment / last.factors.keep == pytest.approx(simulated(net, x), rel=within)


def test_attention_averages_tokens() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.last = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(F.layer_norm(x, (64,))).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v)
            return self.last(x.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net, x = Attention(), torch.randn(16, 49, 64)
    found = rewrite_init(net, x, rule="propagated").layers[1].factors
    assert found.second_moment == pytest.approx(simulated(net, x), rel=0.25)


def plain(model: nn.Module) -> nn.Module:
    """The model without its BN layers."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.Identity())
        else:
            plain(child)
    return model


def vgg() -> nn.Module:
    import torchvision

    head = [nn.Linear(2048, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(torchvision.models.vgg16().features, nn.Flatten(), *head, nn.Linear(512, 10))


def library_net(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import timm
    import torchvision
    from timm.models.vision_transformer import Block

    if name == "resnet18 without BN":
        return plain(torchvision.models.resnet18()), (3, 64, 64)
    if name == "vgg16 with dropout":
        return vgg(), (3, 64, 64)
    if name == "densenet with dropout":
        return torchvision.models.densenet121(drop_rate=0.2), (3, 64, 64)
    if name == "mixer":
        return timm.create_model("mixer_s32_224"), (3, 224, 224)
    return Block(192, 3, proj_drop=0.1, attn_drop=0.1), (197, 192)


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["resnet18 without BN", "vgg16 with dropout", "densenet with dropout", "mixer", "vit block"]
)
def test_nine_layers_in_ten_have_a_variance_near_one(name: str) -> None:
    net, shape = library_net(name)
    x = torch.randn(8, *shape)
    rewrite_init(net, x, rule="propagated")
    found = [signal.variance for signal in measure_signals(net, [x])]
    assert sum(0.5 <= variance <= 2 for variance in found) >= 0.9 * len(found), found


@pytest.mark.parametrize("keep", [1.0, 0.8, 0.6, 0.5])
def test_figure_1(keep: float) -> None:
    """15 layers of 500 and 5 of 250, ReLU: Var z₂₀ near one where He's explodes (section 2.1.1)."""
    sizes = [500] * 16 + [250] * 5
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.ReLU(), nn.Dropout(1 - keep)]
    net, x = nn.Sequential(*layers[:-2]), torch.randn(500, 500)

    def last_variance() -> float:
        return measure_signals(net, [x])[-1].variance

    found = []
    for seed in range(5):
        rewrite_init(net, x[:2], backward_term="off", scheme="orthonormal", seed=seed)
        found.append(last_variance())
    assert 0.7 <= math.exp(statistics.fmean(map(math.log, found))) <= 1.35
    if keep == 0.8:
        for module in net:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert last_variance() > 50
