"""rewrite_init: which f, which keep probability and which divisor every layer gets, and what stays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools import rewrite_init
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.initialize.activations import activation_moments
from ckpt_tools.initialize.init_results import Factors, InitRewrite

RELU = 0.5


class Between(nn.Module):
    """Two linear layers and a function between them."""

    def __init__(self, f: object, width: int = 12) -> None:
        super().__init__()
        self.first, self.second, self.f = nn.Linear(6, width), nn.LazyLinear(5), f
        self(torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.f(self.first(x)))


def factors(result: InitRewrite, name: str) -> Factors:
    (layer,) = [layer for layer in result.layers if layer.name == name]
    assert layer.factors is not None
    return layer.factors


def between(f: object, shape: tuple[int, ...] = (2, 6), **options: object) -> Factors:
    return factors(rewrite_init(Between(f), torch.zeros(shape), **options), "second")


@pytest.mark.parametrize(
    ("f", "same"),
    [
        (nn.ReLU(inplace=True), torch.relu),
        (lambda z: F.relu_(z), torch.relu),
        (lambda z: z.clamp(min=0), torch.relu),
        (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2)),
        (nn.PReLU(12, init=0.3), nn.LeakyReLU(0.3)),
        (nn.ELU(0.7), nn.ELU(0.7)),
        (nn.GELU(approximate="tanh"), nn.GELU(approximate="tanh")),
        (lambda z: z * torch.sigmoid(z), F.silu),
        (lambda z: F.silu(z, inplace=True), F.silu),
        (nn.Hardswish(), F.hardswish),
        (nn.Mish(), F.mish),
        (nn.ReLU6(), F.relu6),
        (nn.SELU(), F.selu),
        (nn.LogSigmoid(), F.logsigmoid),
        (lambda z: torch.where(z > 0, z, 0.1 * z), nn.LeakyReLU(0.1)),
        (lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), F.gelu),
        (lambda z: torch.tanh(F.relu(z)).view(-1, 12), lambda z: torch.tanh(F.relu(z))),
        (lambda z: z.reshape(-1, 3, 4).transpose(1, 2).flatten(1).sin(), torch.sin),
        (nn.Identity(), lambda z: z),
    ],
)
def test_whatever_stands_between_is_replayed(f: object, same: object) -> None:
    expected = activation_moments(same)
    result = rewrite_init(Between(f), torch.zeros(2, 6))
    before, behind = factors(result, "second"), factors(result, "first")
    assert before.second_moment == pytest.approx(expected.forward, abs=1e-6)
    assert behind.next_slope == pytest.approx(expected.backward, abs=1e-6)
    assert behind.divisor == pytest.approx(math.sqrt(1 + expected.backward), abs=1e-6)
    assert before.divisor == pytest.approx(math.sqrt(expected.forward + 1), abs=1e-6)  # the output is linear


SLOPES = torch.tensor([-0.5, 0.0, 0.1, 0.3, 0.9, 3.0, -2.0, 0.25, 0.25, 0.6, 1.0, -1.0])


class PerChannel(nn.Module):
    """A function with a parameter for each of 12 channels."""

    def __init__(self, f: object) -> None:
        super().__init__()
        self.f, self.p = f, nn.Parameter(SLOPES.clone())

    def forward(self, z: Tensor) -> Tensor:
        return self.f(z, self.p)


@pytest.mark.parametrize("rule", ["paper", "propagated"])
@pytest.mark.parametrize(
    "f",
    [
        F.prelu,
        lambda z, p: torch.maximum(p * z, z),
        lambda z, p: z * torch.sigmoid(p * z),
        lambda z, p: z + torch.sin(p * z).square() / 2,
        lambda z, p: torch.minimum(z, p),
        lambda z, p: F.relu(z + p) * (2 * p),
    ],
)
def test_one_parameter_for_each_channel(f: object, rule: str) -> None:
    """Every channel's f counts, not that of the mean parameter."""
    layer = PerChannel(f)
    z = torch.randn(20_000, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    values = layer(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    net = Between(layer)
    result = rewrite_init(net, torch.zeros(2, 6), backward_term="on", rule=rule)
    before, behind = factors(result, "second"), factors(result, "first")
    if rule == "paper":
        assert before.second_moment == pytest.approx(float(values.detach().square().mean()), rel=0.04)
    assert behind.next_slope == pytest.approx(float(slopes.square().mean()), rel=0.04)


@pytest.mark.parametrize(
    ("f", "label"),
    [
        (nn.GLU(), "glu"),
        (nn.RReLU(0.2, 0.4), "rrelu"),
        (nn.Softmax(1), "softmax"),
        (lambda z: torch.cumsum(F.relu(z), 1), "cumsum"),
        (lambda z: torch.logcumsumexp(z, 1), "logcumsumexp"),
        (lambda z: F.glu(F.dropout(z, 0.3)), "glu"),
    ],
)
def test_what_is_no_pointwise_function_is_simulated(f: object, label: str) -> None:
    torch.manual_seed(0)
    layer = between(f, backward_term="off")
    truth = float(f(torch.randn(20_000, 12)).square().mean())
    assert label in layer.activation
    assert layer.second_moment / layer.keep == pytest.approx(truth, rel=0.06)
    assert layer == between(f, backward_term="off")


def test_what_is_undefined_for_negative_numbers_says_so() -> None:
    for f in (torch.sqrt, torch.log, lambda z: z**0.3):
        layer = between(f)
        assert "undefined on N(0, 1)" in layer.activation
        assert layer.second_moment == 0.5


def noise(x: Tensor) -> Tensor:
    return x * x.new_empty(x.shape[0], 1).bernoulli_(0.8).div_(0.8)


@pytest.mark.parametrize(
    ("drop", "keep"),
    [
        (nn.Dropout(0.3), 0.7),
        (nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.2)), 0.4),
        (lambda x: F.dropout(x, 0.25), 0.75),
        (lambda x: nn.Dropout2d(0.4)(x.view(-1, 12, 1, 1)).flatten(1), 0.6),
        (noise, 0.8),
        (lambda x: x * torch.floor(0.9 + torch.rand_like(x)) / 0.9, 0.9),
        (lambda x: x * (torch.rand_like(x) < 0.7), 0.7),
        (lambda x: x * (1 + 0.5 * torch.randn_like(x)), 0.8),
        (lambda x: x.masked_fill(torch.rand_like(x) < 0.25, 0.0), 0.75),
        (nn.Dropout(0.0), 1.0),
    ],
)
def test_noise_of_any_kind_is_a_keep_probability(drop: object, keep: float) -> None:
    """E[x]² / E[x²] of the factor that is multiplied with."""
    found = between(lambda z: drop(F.relu(z)))
    assert found.keep == pytest.approx(keep, abs=2e-3)
    result = rewrite_init(Between(lambda z: drop(F.relu(z))), torch.zeros(2, 6))
    assert factors(result, "first").next_keep in (pytest.approx(keep, abs=2e-3), 1.0)


def test_dropout_in_front_of_a_rectifier_is_the_same_as_behind() -> None:
    one, other = between(lambda z: F.relu(F.dropout(z, 0.5))), between(lambda z: F.dropout(F.relu(z), 0.5))
    assert (one.second_moment, one.keep) == (other.second_moment, other.keep) == (pytest.approx(RELU), 0.5)


def test_alpha_dropout_keeps_the_second_moment() -> None:
    found = between(lambda z: F.alpha_dropout(F.selu(z), 0.3, training=True))
    assert found.second_moment / found.keep == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("f", "second"),
    [
        (lambda z: F.relu(z[:, :6]) + torch.tanh(z[:, 6:]), RELU + 0.394),
        (lambda z: torch.cat([F.relu(z), z[:, :6]], 1), (12 * RELU + 6) / 18),
        (lambda z: F.layer_norm(z, (12,), torch.full((12,), 2.0), torch.full((12,), 3.0)), 13),
        (lambda z: F.relu(F.layer_norm(z, (12,))), RELU),
        (lambda z: F.max_pool1d(F.relu(z)[:, None], 2).flatten(1), RELU),
        (lambda z: F.avg_pool1d(F.relu(z)[:, None], 3).flatten(1), RELU),
        (lambda z: z[:, :6] * torch.sigmoid(z[:, 6:]), 0.2934),
        (lambda z: z * torch.linspace(1, 2, 12), float(torch.linspace(1, 2, 12).square().mean())),
        (lambda z: torch.where(torch.isnan(z), 0.0, z), 1.0),
        (lambda z: torch.zeros_like(z) + z, 1.0),
        (lambda z: filled(z, "new_empty"), (RELU + 0.3943) / 2),
        (lambda z: filled(z, "new_zeros"), (RELU + 0.3943) / 2),
        (lambda z: torch.cat([torch.tanh(z[:, :4]), 9 * z], 1)[:, :4], 0.3943),
        (lambda z: z * torch.rsqrt(z.square().mean(1, keepdim=True)), 1.0),
        (lambda z: standardised(z) * 2, 4.0),
        (lambda z: torch.tanh(z).unsqueeze_(0), 0.3943),
        (lambda z: F.silu(z[:, :6]) * z[:, 6:], 0.3558),
    ],
)  # fmt: skip
def test_joins_normalisation_and_pooling(f: object, second: float) -> None:
    assert between(f).second_moment == pytest.approx(second, abs=1e-3)


def filled(z: Tensor, maker: str) -> Tensor:
    """A tensor written part by part: what it held before counts nothing."""
    out = getattr(z, maker)(z.shape[0], 24)
    out[:, :12], out[:, 12:] = F.relu(z), torch.tanh(z)
    return out


def standardised(z: Tensor) -> Tensor:
    centred = z - z.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).add(1e-6).sqrt()


def test_averages_beside_what_they_average_are_numbers_backwards_too() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    assert factors(rewrite_init(net, torch.zeros(2, 6)), "0").next_slope == pytest.approx(1, abs=1e-3)


def test_dropout_in_front_of_a_curved_nonlinearity_is_integrated() -> None:
    """E[tanh(m·z)²] for a mask m of 0 and 2."""
    found = between(lambda z: torch.tanh(F.dropout(z, 0.5)))
    expected = 0.5 * activation_moments(lambda z: torch.tanh(2 * z)).forward
    assert found.second_moment / found.keep == pytest.approx(expected, abs=2e-3)
    twin = between(lambda z: z + F.dropout(F.relu(z), 0.5))
    assert twin.second_moment / twin.keep == pytest.approx(3, abs=0.02)


def test_the_input_counts_as_standardised_however_the_model_scales_it() -> None:
    class Scaled(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - 0.5) / 0.25)

    assert factors(rewrite_init(Scaled(F.relu), torch.zeros(2, 6)), "first").second_moment == 1


def test_a_recurrent_state_does_not_grow_with_the_sequence() -> None:
    found = [rewrite_init(nn.GRU(6, 8), torch.zeros(steps, 2, 6)) for steps in (5, 20)]
    one, other = (factors(result, "weight_hh_l0").divisor for result in found)
    assert one == other < 2


def test_a_table_that_is_also_the_head_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inside = nn.Embedding(50, 6), nn.Linear(6, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.inside(self.table(ids))), self.table.weight)

    result = rewrite_init(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert [layer.parameter for layer in result.rewritten] == ["inside.weight"]


def test_a_branch_is_added_with_its_dropout() -> None:
    found = between(lambda z: F.dropout(F.relu(z[:, :6]), 0.5) + z[:, 6:])
    assert found.second_moment / found.keep == pytest.approx(1 + 1)  # 0.5 / 0.5 and the other branch
    assert found.second_moment == pytest.approx(1.5)


def test_convolutions_have_no_backward_term_unless_asked() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 4, 3, groups=2))

    x = torch.zeros(2, 3, 9, 9)
    auto, on = rewrite_init(net(), x), rewrite_init(net(), x, backward_term="on")
    assert factors(auto, "0").divisor == 1
    assert factors(auto, "3").divisor == pytest.approx(math.sqrt(RELU / 0.8))
    assert factors(on, "0").divisor == pytest.approx(math.sqrt(1 + 0.8 * RELU))
    inverted = rewrite_init(net(), x, backward_term="on", backward_factor="inverted")
    assert factors(inverted, "0").divisor == pytest.approx(math.sqrt(1 + RELU / 0.8))
    linear = rewrite_init(Between(F.relu), torch.zeros(2, 6), backward_term="off")
    assert factors(linear, "second").divisor == pytest.approx(math.sqrt(RELU))


def test_the_normalisation_between_a_layer_and_its_nonlinearity_is_looked_through_backwards() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
    found = factors(rewrite_init(net, torch.zeros(4, 6)), "0")
    assert (found.next_slope, found.next_keep) == (pytest.approx(RELU), pytest.approx(0.6))


def test_vectors_have_the_length_that_the_divisor_says() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    for scheme in ("hypersphere", "orthonormal"):
        result = rewrite_init(net, torch.zeros(2, 3, 5, 5), scheme=scheme)
        for layer in result.rewritten:
            weight = net.get_parameter(layer.parameter).detach().flatten(1)
            assert torch.allclose(weight.norm(dim=1), torch.tensor(1 / layer.factors.divisor), atol=1e-5), (
                layer
            )


class Bare(nn.Module):
    """Weights without modules: x @ W, a packed projection, a batch of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 4))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.table = nn.Embedding(5, 4)
        self.positional = nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x @ self.matrix)
        x = torch.bmm(x.expand(3, *x.shape), self.experts).transpose(0, 1)
        x = x + self.positional + self.table(torch.arange(3))
        return self.attention(x, x, x)[0]


def test_weights_that_are_no_modules() -> None:
    net = Bare()
    before = copy.deepcopy(net.state_dict())
    result = rewrite_init(net, torch.zeros(7, 6), backward_term="off")
    rewritten = {layer.parameter for layer in result.rewritten}
    assert rewritten == {"matrix", "experts", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert torch.allclose(net.matrix.norm(dim=0), torch.ones(8), atol=1e-5)
    assert torch.allclose(net.experts.norm(dim=1), torch.full((3, 4), 1 / math.sqrt(RELU)), atol=1e-5)
    reasons = {layer.parameter: layer.reason for layer in result.layers if not layer.rewritten}
    assert reasons.keys() == {"table.weight", "positional", "unused.weight"}
    assert all(reasons.values())
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed - {"attention.in_proj_bias", "attention.out_proj.bias"} == rewritten


def test_a_weight_used_twice_gets_the_average() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(F.relu(self.shared(F.dropout(self.inside(x), 0.5))))

    for rule in ("paper", "propagated"):
        found = factors(rewrite_init(Twice(), torch.zeros(2, 6), rule=rule, backward_term="off"), "shared")
        assert found.divisor > 1
    found = factors(rewrite_init(Twice(), torch.zeros(2, 6), backward_term="off"), "shared")
    assert found.divisor == pytest.approx(math.sqrt((2 + RELU) / 2))


def test_computed_and_frozen_weights_stay() -> None:
    net = nn.Sequential(
        nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6)
    )
    net[0].weight.requires_grad_(False)
    result = rewrite_init(net, torch.zeros(2, 6))
    assert [layer.parameter for layer in result.rewritten] == ["2.weight"]
    reasons = {layer.parameter: layer.reason for layer in result.layers if not layer.rewritten}
    assert reasons["0.weight"] == "is not trained"
    assert "computed from it" in reasons["1.parametrizations.weight.original1"]


def test_only_weights_and_biases_change_and_the_model_comes_back_as_it_was() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    ).train()
    net(torch.randn(2, 3, 6, 6))
    net[0].eval()
    nn.init.uniform_(net[1].weight)
    before, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = rewrite_init(net, torch.zeros(2, 3, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == flags
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert not net[0].bias.any()
    assert not net[4].bias.any()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert {layer.bias for layer in result.rewritten} == {"0.bias", "4.bias"}


def test_the_seed_decides() -> None:
    def weights(seed: int) -> Tensor:
        net = Between(F.relu)
        rewrite_init(net, torch.zeros(2, 6), seed=seed)
        return net.first.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_half_precision_and_tied_weights_keep_their_type_and_their_tie() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).half()
    net[2].weight = net[0].weight
    rewrite_init(net, torch.zeros(2, 6).half())
    assert net[0].weight.dtype == torch.float16
    assert net[2].weight is net[0].weight


@pytest.mark.parametrize(
    ("net", "x", "error", "words"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), (2, 4), ModelError, "linear layers or convolutions"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0), nn.Linear(4, 4)),
            (2, 4),
            ModelError,
            "lets nothing through",
        ),
        (nn.Linear(4, 4), (2, 5), ModelError, "check its shape"),
        (nn.Linear(4, 4, device="meta"), (2, 4), ModelError, "meta device"),
    ],
)
def test_bad_models(net: nn.Module, x: tuple[int, ...], error: type, words: str) -> None:
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(error, match=words):
        rewrite_init(net, torch.zeros(x))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True) if not a.is_meta)


@pytest.mark.parametrize(
    "options",
    [{"scheme": "xavier"}, {"rule": "lsuv"}, {"backward_term": "maybe"}, {"backward_factor": "outverted"}],
)
def test_unknown_methods(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(options.values()))):
        rewrite_init(nn.Linear(4, 4), torch.zeros(2, 4), **options)
