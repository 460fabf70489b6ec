"""The propagated rule: what plain forward passes on N(0, 1) inputs measure behind every layer."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools import rewrite_init
from ckpt_tools.errors import ModelError
from ckpt_tools.initialize.verify import measure_signals

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def variances(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Var(z) of every weight layer at its first use, in training mode."""
    measured: dict[str, float] = {}

    def measure(name: str, z: Tensor) -> None:
        measured.setdefault(name, float(z.var()))

    for name, layer in net.named_modules():
        if isinstance(layer, WEIGHT_LAYERS):
            layer.register_forward_hook(lambda _, __, z, name=name: measure(name, z))
    with torch.no_grad():
        net.train()(x)
    return measured


def assert_variances_near_one(net: nn.Module, example: Tensor, samples: int, **options: object) -> None:
    """The example holds zeros: its values do not matter. The measured inputs are others."""
    rewrite_init(net, torch.zeros_like(example), rule="propagated", **options)
    torch.manual_seed(12)
    measured = variances(net, torch.randn(samples, *example.shape[1:]))
    assert all(0.8 <= variance <= 1.25 for variance in measured.values()), measured


def mlp(f: Callable[[], nn.Module], width: int, depth: int, rate: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), f(), nn.Dropout(rate)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("f", [nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Softplus, nn.ELU, nn.RReLU])
@pytest.mark.parametrize(("width", "depth", "rate"), [(128, 20, 0.0), (160, 12, 0.2)])
def test_unstable_fixed_points(f: type[nn.Module], seed: int, width: int, depth: int, rate: float) -> None:
    """A variance that is off 1 grows at every layer of SiLU and its kin, so scatter adds up."""
    assert_variances_near_one(mlp(f, width, depth, rate), torch.zeros(2, width), 4096, seed=seed)


@pytest.mark.parametrize("scheme", ["hypersphere", "orthonormal", "uniform", "normal"])
def test_fifty_layers(scheme: str) -> None:
    assert_variances_near_one(mlp(nn.GELU, 100, 50, 0.0), torch.zeros(2, 100), 8192, scheme=scheme)


class Vectors(nn.Module):
    def __init__(self, f: object) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(60, 100), nn.Linear(100, 100), nn.Linear(100, 100))
        self.f, self.last = f, nn.LazyLinear(40)
        self(torch.zeros(2, 60))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self, F.relu(self.first(x))))


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: x + F.dropout(F.relu(m.second(x)), 0.3),
        lambda m, x: torch.tanh(m.second(F.dropout(x, 0.4)) + m.third(x)),
        lambda m, x: torch.cat([x, F.gelu(m.second(x)), m.third(x)], 1),
        lambda m, x: F.glu(m.second(x)),
        lambda m, x: F.softmax(m.second(x), 1),
        lambda m, x: F.layer_norm(x, (100,)) + m.second(x),
        lambda m, x: m.second(x) * torch.linspace(0, 1, 100) + torch.linspace(-1, 1, 100),
        lambda m, x: F.alpha_dropout(F.selu(m.second(x)), 0.2, training=True),
        lambda m, x: torch.bmm(m.second(x).view(-1, 10, 10), m.third(x).view(-1, 10, 10)).flatten(1),
        lambda m, x: torch.fft.rfft(m.second(x)).abs(),
        lambda m, x: m.second(F.relu(m.second(x))),
    ],
)
def test_whatever_stands_between(f: object) -> None:
    torch.manual_seed(0)
    assert_variances_near_one(Vectors(f), torch.zeros(2, 60), 2048)


class Maps(nn.Module):
    def __init__(self, f: object) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.up = nn.ConvTranspose2d(24, 24, 3, stride=2)
        self.f, self.last = f, nn.LazyConv2d(16, 1)
        self(torch.zeros(2, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self, F.relu(self.first(x))))


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: F.avg_pool2d(F.dropout2d(F.relu(m.second(x)), 0.5), 4),
        lambda m, x: F.avg_pool2d(F.dropout(F.relu(m.second(x)), 0.5), 4),
        lambda m, x: F.max_pool2d(m.up(x), 2),
        lambda m, x: m.second(F.adaptive_max_pool2d(x, 1)),  # eight of nine taps are on the padding
        lambda m, x: x + F.silu(m.second(F.silu(x))),
        lambda m, x: F.batch_norm(m.second(x), None, None, torch.full((24,), 2.0), training=True),
        lambda m, x: F.conv2d(m.second(x), torch.full((24, 1, 3, 3), 1 / 9), groups=24),
        lambda m, x: x * torch.sigmoid(m.second(x).mean((2, 3), keepdim=True)),
    ],
)
def test_maps_too(f: object) -> None:
    torch.manual_seed(0)
    assert_variances_near_one(Maps(f), torch.zeros(2, 3, 8, 8), 512)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn, self.hidden, self.head = layer, nn.Linear(48, 60), nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.rnn(x)[0][:, -1])))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_behind_recurrent_layers(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = Recurrent(kind(20, 48, batch_first=True))
    assert_variances_near_one(net, torch.zeros(2, 7, 20), 1024)


def test_attention_averages_tokens() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.last = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(F.layer_norm(x, (32,))).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v)
            return self.last(x.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    assert_variances_near_one(Attention(), torch.zeros(2, 20, 32), 256)


def test_a_model_whose_samples_cannot_be_repeated() -> None:
    """Its graph has 300 nodes, as its buffer has; other batches do not fit."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(50, 80), nn.Linear(80, 20)
            self.register_buffer("adjacency", (torch.rand(300, 300) < 0.02).float())

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.adjacency @ F.relu(self.first(x)))

    torch.manual_seed(0)
    assert_variances_near_one(Graph(), torch.zeros(300, 50), 300)


def test_values_are_kept_where_random_ones_are_refused() -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(30, 80), nn.Linear(80, 20)

        def forward(self, x: Tensor) -> Tensor:
            assert bool((x >= 0).all())
            return self.second(F.relu(self.first(x)))

    torch.manual_seed(0)
    net, x = Positive(), torch.rand(500, 30)
    rewrite_init(net, x, rule="propagated")
    assert all(0.8 <= variance <= 1.25 for variance in variances(net, x).values())


def test_equal_seeds_give_equal_weights_and_no_generator_moves() -> None:
    net, example = mlp(nn.SiLU, 30, 3, 0.5), torch.randn(2, 30)
    rewrite_init(net, torch.zeros(2, 30), rule="propagated", seed=3)
    first = [parameter.clone() for parameter in net.parameters()]
    state = torch.get_rng_state()
    rewrite_init(net, example, rule="propagated", seed=3)
    assert all(map(torch.equal, first, net.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_nothing_reaches_yet_gets_the_papers_weights() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(20, 40), nn.Linear(40, 40), nn.Linear(40, 10)
            self.gate = nn.Parameter(torch.zeros(40))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.gate * self.second(self.gate * x))

    net = Late()
    result = rewrite_init(net, torch.zeros(2, 20), rule="propagated")
    (second,) = [layer for layer in result.layers if layer.name == "second"]
    assert second.factors.divisor == pytest.approx(1)
    assert net.second.weight.norm(dim=1).tolist() == pytest.approx([1.0] * 40)
    assert variances(net, torch.randn(2000, 20))["last"] == pytest.approx(1, abs=0.2)


def test_a_head_of_one_unit_is_not_blown_up() -> None:
    """Behind many rectifiers one unit hardly varies. Its weights stay near norm one all the same."""
    layers = [layer for _ in range(20) for layer in (nn.Linear(50, 50), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(50, 1))
    rewrite_init(net, torch.zeros(2, 50), rule="propagated")
    with torch.no_grad():
        square = float(net[:-1](torch.randn(2000, 50)).square().mean())
        norm = float(net[-1].weight.norm())
    assert norm <= 2.2 / math.sqrt(square)


def test_a_model_that_cannot_be_run_is_left_as_it_was() -> None:
    class OnMetaOnly(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not x.is_meta and type(x) is Tensor:
                raise RuntimeError("no kernel")
            return super().forward(x)

    net = OnMetaOnly(4, 4)
    before = net.weight.clone()
    with pytest.raises(ModelError, match="no kernel"):
        rewrite_init(net, torch.zeros(2, 4), rule="propagated")
    assert torch.equal(net.weight, before)


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
    rewrite_init(net, torch.zeros(8, *shape), rule="propagated")
    found = [signal.variance for signal in measure_signals(net, [torch.randn(8, *shape)])]
    assert sum(0.8 <= variance <= 1.25 for variance in found) >= 0.9 * len(found), found


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
