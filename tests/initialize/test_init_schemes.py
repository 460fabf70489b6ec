"""Schemes, rule and `dropout_corrected_` against real layers, torch's initialisers, and Figures 1 and 5."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from ckpt_tools import activation_moments
from ckpt_tools.contract import BackwardFactor, Scheme
from ckpt_tools.errors import UsageError
from ckpt_tools.init import dropout_corrected_
from ckpt_tools.initialize.rule import UNKNOWN, divisor, fan_ratio
from ckpt_tools.initialize.scheme import fans, fill
from ckpt_tools.results import Geometry

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@dataclass(frozen=True)
class Case:
    """A real layer, its geometry, an input size whose middle no edge reaches, its output phases' period."""

    layer: nn.Module
    geometry: Geometry
    side: int = 0
    period: tuple[int, ...] = ()


def transposed(
    dims: int, inputs: int, units: int, kernel: int, stride: int, dilation: int = 1, groups: int = 1
) -> Case:
    build = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = build(inputs, units, kernel, stride, bias=False, dilation=dilation, groups=groups)
    geometry = Geometry("transposed convolution", groups, (stride,) * dims, (dilation,) * dims)
    return Case(layer, geometry, side=2 * kernel * dilation // stride + 3, period=(stride,) * dims)


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Case:
    dims = len(layer.kernel_size)
    return Case(layer, Geometry("convolution", layer.groups), side=max(layer.kernel_size), period=(1,) * dims)


CASES = {
    "linear": Case(nn.Linear(12, 7, bias=False), Geometry()),
    "linear, more units than inputs": Case(nn.Linear(5, 12, bias=False), Geometry()),
    "conv1d": convolution(nn.Conv1d(4, 6, 5, bias=False)),
    "conv2d": convolution(nn.Conv2d(3, 8, 3, bias=False)),
    "conv2d, 1×1, more units than inputs": convolution(nn.Conv2d(3, 8, 1, bias=False)),
    "conv2d, grouped": convolution(nn.Conv2d(6, 8, 3, groups=2, bias=False)),
    "conv2d, depthwise": convolution(nn.Conv2d(5, 10, 3, groups=5, bias=False)),
    "conv3d": convolution(nn.Conv3d(2, 4, (1, 2, 3), bias=False)),
    "transposed, kernel 3, stride 2": transposed(2, 6, 4, 3, 2),
    "transposed, kernel 4, stride 2": transposed(2, 6, 4, 4, 2),
    "transposed, stride 1": transposed(1, 6, 4, 3, 1),
    "transposed, dilation": transposed(1, 6, 4, 4, 3, dilation=2),
    "transposed, stride and dilation share a factor": transposed(1, 6, 4, 5, 4, dilation=6),
    "transposed, groups": transposed(1, 6, 4, 3, 2, groups=2),
    "transposed, depthwise, more units than inputs": transposed(1, 3, 9, 3, 2, groups=3),
    "transposed, 3-d": transposed(3, 2, 3, 2, 2),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return copy.deepcopy(CASES[request.param])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def an_input(case: Case, batch: int) -> Tensor:
    if isinstance(case.layer, nn.Linear):
        return torch.randn(batch, case.layer.in_features)
    return torch.randn(batch, case.layer.in_channels, *(case.side,) * len(case.period))


def middle(case: Case, z: Tensor) -> Tensor:
    """(batch, units, phases): one whole period of output positions in the middle, away from the edges."""
    window = tuple(
        slice(size // 2, size // 2 + step) for size, step in zip(z.shape[2:], case.period, strict=True)
    )
    return z[(..., *window)].flatten(2) if case.period else z[..., None]


def fan_in_vectors(case: Case) -> Tensor:
    """(phases, units, all inputs): what the real layer does to its input, from autograd."""
    x = an_input(case, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: middle(case, case.layer(x))[0], x)
    return jacobian.flatten(2).transpose(0, 1)


def has_taps(vectors: Tensor) -> Tensor:
    """Output phases that no tap reaches put out zeros, whatever the weight."""
    return vectors.abs().sum((1, 2)) > 0


def test_every_unit_of_every_layer_has_its_fan_in_vector_on_the_sphere(case: Case) -> None:
    fill(case.layer.weight, case.geometry, "hypersphere", generator())
    vectors = fan_in_vectors(case)
    norms = vectors.norm(dim=-1)[has_taps(vectors)]
    assert len(norms)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_units_of_a_group_are_orthonormal_as_far_as_their_inputs_reach(case: Case) -> None:
    fill(case.layer.weight, case.geometry, "orthonormal", generator())
    vectors = fan_in_vectors(case)
    for phase in vectors[has_taps(vectors)]:
        for group in phase.chunk(case.geometry.groups):
            fan_in = int((group != 0).any(0).sum())
            for stack in group.split(fan_in):
                torch.testing.assert_close(stack @ stack.T, torch.eye(len(stack)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_standard_normal_input_gives_variance_one_at_every_output_phase(case: Case, scheme: Scheme) -> None:
    draws, batch = (1, 3000) if scheme in ("hypersphere", "orthonormal") else (150, 30)
    variance = torch.tensor(0.0)
    with torch.no_grad():
        for seed in range(draws):
            fill(case.layer.weight, case.geometry, scheme, generator(seed))
            variance = (
                variance + middle(case, case.layer(an_input(case, batch))).square().mean((0, 1)) / draws
            )
    reached = variance[variance > 0]
    assert len(reached)
    torch.testing.assert_close(reached, torch.ones_like(reached), atol=0.15, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_positions_that_no_tap_reaches_stay_at_zero(scheme: Scheme) -> None:
    case = transposed(1, 6, 4, kernel=2, stride=3)
    fill(case.layer.weight, case.geometry, scheme, generator())
    assert has_taps(fan_in_vectors(case)).sum() == 2


def test_a_batch_of_linear_weights_is_orthonormal_block_by_block() -> None:
    weight = torch.empty(3, 4, 6)
    fill(weight, Geometry(), "orthonormal", generator())
    torch.testing.assert_close(weight @ weight.mT, torch.eye(4).expand(3, 4, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", ["hypersphere", "orthonormal"])
def test_directions_are_uniform(scheme: Scheme) -> None:
    """Archimedes: a coordinate of a uniform point on the sphere in three dimensions is Unif[−1, 1].

    QR without its signs corrected fails here.
    """
    weight = torch.empty(4000, 3, 3)
    fill(weight, Geometry(), scheme, generator())
    for unit in range(3):
        for coordinate in range(3):
            assert stats.kstest(weight[:, unit, coordinate], stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_a_draw_of_zeros_still_lies_on_the_sphere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    for scheme in ("hypersphere", "orthonormal"):
        weight = torch.empty(4, 1)
        fill(weight, Geometry(), scheme, generator())
        assert torch.equal(weight.abs(), torch.ones(4, 1))


def torch_fans(weight: Tensor) -> tuple[int, int]:
    return nn.init._calculate_fan_in_and_fan_out(weight)


@pytest.mark.parametrize("shape", [(7, 5), (8, 3, 3, 3), (6, 4, 5)])
def test_fans_are_those_of_torch_where_torch_is_right(shape: tuple[int, ...]) -> None:
    kind = "linear" if len(shape) == 2 else "convolution"
    assert fans(shape, Geometry(kind)) == torch_fans(torch.empty(shape))


def test_fans_count_what_a_unit_sums_and_what_an_input_feeds(case: Case) -> None:
    with torch.no_grad():
        case.layer.weight.fill_(1.0)
    fan_in, fan_out = fans(case.layer.weight.shape, case.geometry)
    per_phase = (fan_in_vectors(case) != 0).sum(-1).double().mean().item()
    assert fan_in == max(1, round(per_phase))
    x = (
        an_input(case, 1)
        if not case.period
        else torch.zeros(1, case.layer.in_channels, *(9,) * len(case.period))
    )
    (fed,) = torch.autograd.grad(case.layer(x.requires_grad_()).sum(), x)
    assert fan_out == fed[(0, 0, *(size // 2 for size in x.shape[2:]))].item()


# The rule


def test_the_divisor_is_the_formula_of_section_2_2() -> None:
    assert divisor(0.4, 0.8) == pytest.approx(math.sqrt(0.4 / 0.8))
    assert divisor(0.4, 0.8, next_slope=0.3, next_keep=0.5) == pytest.approx(math.sqrt(0.4 / 0.8 + 0.5 * 0.3))
    inverted = divisor(0.4, 0.8, next_slope=0.3, next_keep=0.5, backward_factor="inverted")
    assert inverted == pytest.approx(math.sqrt(0.4 / 0.8 + 0.3 / 0.5))


def test_only_the_schemes_of_single_entries_weigh_the_backward_term_by_the_fans() -> None:
    assert [fan_ratio(scheme, 10, 40) for scheme in SCHEMES] == [1.0, 1.0, 4.0, 4.0]


def test_unknown_activations_without_dropout_divide_by_one() -> None:
    assert divisor(UNKNOWN, 1.0, next_slope=UNKNOWN) == 1.0


# In place, against torch's own initialisers


@pytest.mark.parametrize("shape", [(300, 200), (64, 32, 3, 3)])
def test_normal_for_relu_without_backward_term_is_he(shape: tuple[int, ...]) -> None:
    weight = dropout_corrected_(torch.empty(shape), torch.relu, scheme="normal", backward_term="off")
    he = nn.init.calculate_gain("relu") / math.sqrt(torch_fans(weight)[0])
    assert weight.std().item() == pytest.approx(he, rel=0.02)
    assert stats.kstest(weight.flatten(), stats.norm(0, he).cdf).pvalue > 1e-3
    theirs = nn.init.kaiming_normal_(torch.empty(shape), nonlinearity="relu")
    assert stats.ks_2samp(weight.flatten(), theirs.flatten()).pvalue > 1e-3


def test_defaults_are_exactly_the_unscaled_hypersphere() -> None:
    plain = torch.empty(30, 20)
    fill(plain, Geometry(), "hypersphere", generator(3))
    assert torch.equal(dropout_corrected_(torch.empty(30, 20), generator=generator(3)), plain)


@pytest.mark.parametrize("shape", [(300, 200), (100, 400)])
def test_uniform_with_unknown_activations_is_xavier(shape: tuple[int, int]) -> None:
    weight = dropout_corrected_(torch.empty(shape), scheme="uniform")
    bound = math.sqrt(6 / sum(shape))
    assert 0.999 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)
    assert stats.kstest(weight.flatten(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    theirs = nn.init.xavier_uniform_(torch.empty(shape))
    assert stats.ks_2samp(weight.flatten(), theirs.flatten()).pvalue > 1e-3


def test_uniform_is_the_formula_of_section_4() -> None:
    weight = dropout_corrected_(torch.empty(300, 200), torch.tanh, 0.8, F.elu, 0.6, scheme="uniform")
    before, behind = activation_moments(torch.tanh).forward, activation_moments(F.elu).backward
    bound = math.sqrt(3) / math.sqrt(200 / 0.8 * before + 0.6 * 300 * behind)
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("factor", get_args(BackwardFactor))
def test_the_norms_are_those_of_the_formula(factor: BackwardFactor) -> None:
    weight = dropout_corrected_(torch.empty(6, 50), torch.tanh, 0.8, F.elu, 0.5, backward_factor=factor)
    tanh, elu = activation_moments(torch.tanh), activation_moments(F.elu)
    backward = {"paper": 0.5 * elu.backward, "inverted": elu.backward / 0.5}[factor]
    torch.testing.assert_close(weight.norm(dim=1), torch.full((6,), (tanh.forward / 0.8 + backward) ** -0.5))


def test_auto_adds_the_backward_term_to_linear_weights_only() -> None:
    for shape, auto in (((6, 50), "on"), ((6, 5, 3), "off"), ((6, 5, 3, 3), "off")):
        found = dropout_corrected_(torch.empty(shape), torch.relu, generator=generator())
        expected = dropout_corrected_(
            torch.empty(shape), torch.relu, backward_term=auto, generator=generator()
        )
        assert torch.equal(found, expected)


def test_a_first_layer_has_the_identity_in_front() -> None:
    weight = dropout_corrected_(torch.empty(6, 50), nn.Identity(), backward_term="off")
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(6))


def test_modules_bring_their_own_parameters_and_keep_them() -> None:
    prelu = nn.PReLU(init=0.3)
    weight = dropout_corrected_(torch.empty(6, 50), prelu, backward_term="off")
    torch.testing.assert_close(weight.norm(dim=1), torch.full((6,), ((1 + 0.3**2) / 2) ** -0.5))
    assert prelu.weight.dtype == torch.float32


# Figures 1 and 5


WIDTHS = [500] * 15 + [250] * 5  # Figure 1's net
KEEPS = [1.0, 0.8, 0.6, 0.5]


def last_variance(initialise: Callable[[int, Tensor], Tensor], keep: float, nets: int) -> float:
    """Var z₂₀ in training mode with inverted dropout, mean over nets side by side.

    Called as ``initialise(layer, weight)``.
    """
    x = torch.randn(nets, 100, 500)
    for layer, width in enumerate(WIDTHS):
        z = x @ initialise(layer, torch.empty(nets, width, x.shape[-1])).mT
        x = F.dropout(torch.relu(z), 1 - keep)
    return z.var().item()


@pytest.mark.parametrize("keep", KEEPS)
def test_figure_1_the_forward_term_keeps_the_variance_at_every_keep_probability(keep: float) -> None:
    """The mean over nets: ln Var z₂₀ of a single ReLU net has a standard deviation of 0.4 at these widths."""

    def ours(layer: int, weight: Tensor) -> Tensor:
        f, p = (torch.relu, keep) if layer else (nn.Identity(), 1.0)
        return dropout_corrected_(weight, f, p, backward_term="off", geometry=Geometry())

    assert 0.7 < last_variance(ours, keep, nets=10) < 1.35


def test_figure_1_he_explodes_with_dropout() -> None:
    def he(_: int, weight: Tensor) -> Tensor:
        return weight.normal_(0, math.sqrt(2 / weight.shape[-1]))

    assert last_variance(he, 0.8, nets=4) > 50


def error_growth(keep: float, factor: BackwardFactor, nets: int = 3) -> float:
    """Var δ¹ / Var δ²⁰ of ReLU nets divided by the backward term alone, zeros of dropout included."""
    scale = divisor(0.0, 1.0, next_slope=0.5, next_keep=keep, backward_factor=factor)
    x, signals = torch.randn(nets, 100, 500, requires_grad=True), []
    for _ in range(20):
        weight = torch.empty(nets, 500, 500)
        fill(weight, Geometry(), "hypersphere", torch.default_generator, divisor=scale)
        signals.append(x @ weight.mT)
        x = F.dropout(torch.relu(signals[-1]), 1 - keep)
    error = 0.01 * torch.randn_like(signals[-1])
    (first,) = torch.autograd.grad(signals[-1], signals[0], error)
    return (first.var() / error.var()).item()


@pytest.mark.parametrize("keep", KEEPS)
def test_figure_5_the_inverted_factor_keeps_the_variance_of_the_error_signal(keep: float) -> None:
    assert 0.7 < error_growth(keep, "inverted") < 1.35


def test_figure_5_the_papers_factor_lets_errors_grow_by_the_square_of_the_keep_probability() -> None:
    assert error_growth(0.8, "paper") == pytest.approx(0.8 ** (-2 * 19), rel=0.35)


# What a weight may be


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_generator_makes_it_reproducible_and_the_global_one_is_left_alone(scheme: Scheme) -> None:
    before = torch.get_rng_state()
    first, second = (
        dropout_corrected_(torch.empty(4, 6), scheme=scheme, generator=generator(5)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(
        first, dropout_corrected_(torch.empty(4, 6), scheme=scheme, generator=generator(6))
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_seed_decides() -> None:
    torch.manual_seed(1)
    first = dropout_corrected_(torch.empty(4, 6))
    torch.manual_seed(1)
    assert torch.equal(first, dropout_corrected_(torch.empty(4, 6)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_views_are_written_through(scheme: Scheme) -> None:
    for shape, geometry in (
        ((6, 4), Geometry()),
        ((3, 6, 4), Geometry()),
        ((6, 4, 3, 3), Geometry("convolution", groups=2)),
        ((6, 4, 3, 3), Geometry("transposed convolution", groups=2, stride=(2, 2))),
    ):
        plain, base = torch.empty(shape), torch.full((*reversed(shape), 2), 7.0)
        fill(plain, geometry, scheme, generator())
        fill(base[..., 0].permute(*reversed(range(len(shape)))), geometry, scheme, generator())
        assert torch.equal(base[..., 0].permute(*reversed(range(len(shape)))), plain)
        assert (base[..., 1] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_floating_dtype_gets_the_float32_values_rounded_once(scheme: Scheme, dtype: torch.dtype) -> None:
    single = dropout_corrected_(torch.empty(4, 6), F.gelu, 0.8, scheme=scheme, generator=generator())
    found = dropout_corrected_(
        torch.empty(4, 6, dtype=dtype), F.gelu, 0.8, scheme=scheme, generator=generator()
    )
    assert torch.equal(found, single.to(dtype))


def test_parameters_are_filled_in_place_and_outside_of_autograd() -> None:
    layer = nn.Linear(6, 4)
    assert dropout_corrected_(layer.weight) is layer.weight
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None


def test_torchs_default_dtype_changes_nothing() -> None:
    expected = dropout_corrected_(torch.empty(4, 6), generator=generator())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(dropout_corrected_(torch.empty_like(expected), generator=generator()), expected)
    finally:
        torch.set_default_dtype(torch.float32)


BAD_ARGUMENTS = {
    "keep 0": ({"keep": 0.0}, "keep=0.0"),
    "keep below 0": ({"keep": -0.5}, "keep=-0.5"),
    "keep above 1": ({"keep": 1.5}, r"in \(0, 1\]"),
    "keep NaN": ({"keep": math.nan}, "keep=nan"),
    "next keep": ({"next_keep": 0.0, "backward_term": "off"}, "next_keep=0.0"),
    "scheme": ({"scheme": "sphere"}, "hypersphere, orthonormal, uniform, normal"),
    "backward term": ({"backward_term": "yes"}, "auto, on, off"),
    "backward factor": ({"backward_factor": "theirs", "backward_term": "off"}, "paper, inverted"),
    "no function": ({"activation": "relu"}, "activation='relu': expected a function"),
    "no pointwise function": ({"next_activation": lambda z: z.softmax(-1)}, "pointwise"),
    "a random function": ({"activation": nn.Dropout(0.5)}, "random"),
    "nothing comes through": (
        {"activation": lambda z: 0 * z, "backward_term": "off"},
        "lets nothing through",
    ),
    "groups": ({"geometry": Geometry("convolution", groups=3)}, "groups that divide 4"),
    "stride": (
        {"geometry": Geometry("transposed convolution", stride=(2, 2))},
        "0 numbers above 0 as stride",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_and_the_weight_is_as_it_was(name: str) -> None:
    arguments, message = BAD_ARGUMENTS[name]
    weight = torch.full((4, 6), 7.0)
    with pytest.raises(UsageError, match=message):
        dropout_corrected_(weight, **arguments)
    assert (weight == 7).all()


BAD_WEIGHTS = {
    "one dimension": (torch.empty(4), Geometry(), "at least 2 dimensions"),
    "no dimension": (torch.empty(()), Geometry(), "at least 2 dimensions"),
    "no elements": (torch.empty(4, 0), Geometry(), "no empty one"),
    "integers": (torch.ones(4, 6, dtype=torch.int64), Geometry(), "floating point"),
    "complex": (torch.ones(4, 6, dtype=torch.complex64), Geometry(), "floating point"),
    "linear of four dimensions": (torch.empty(2, 3, 4, 5), Geometry(), "found 4 dimensions"),
    "dilation 0": (torch.empty(2, 3, 4), Geometry("transposed convolution", dilation=(0,)), "as dilation"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name: str) -> None:
    weight, geometry, message = BAD_WEIGHTS[name]
    with pytest.raises(UsageError, match=message):
        fill(weight, geometry, "hypersphere", generator())
    with pytest.raises(UsageError, match=message):
        dropout_corrected_(weight, geometry=geometry)
