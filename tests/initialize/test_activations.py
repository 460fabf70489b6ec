"""Moments of nonlinearities against scipy's quadrature, closed forms, and the paper's Table 1."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import nn

from ckpt_tools import activation_moments
from ckpt_tools.errors import UsageError

# Table 1 to three digits. The paper prints tanh 0.216, GELU 0.444 and ELU 0.671 for E[f'²]:
# quadrature, here and in scipy below, gives 0.464, 0.456 and 0.668.
TABLE_1 = {
    "identity": (nn.Identity(), 1.0, 1.0),
    "relu": (torch.relu, 0.5, 0.5),
    "gelu": (F.gelu, 0.425, 0.456),
    "tanh": (torch.tanh, 0.394, 0.464),
    "elu": (F.elu, 0.645, 0.668),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name: str) -> None:
    f, forward, backward = TABLE_1[name]
    found = activation_moments(f)
    assert (round(found.forward, 3), round(found.backward, 3)) == (forward, backward)


PLAIN = {
    "tanh": (torch.tanh, np.tanh, lambda z: 1 - np.tanh(z) ** 2, ()),
    "sigmoid": (torch.sigmoid, lambda z: 1 / (1 + np.exp(-z)),
                lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2, ()),
    "elu": (F.elu, lambda z: np.where(z > 0, z, np.expm1(z)), lambda z: np.where(z > 0, 1, np.exp(z)), (0,)),
    "relu6": (F.relu6, lambda z: np.clip(z, 0, 6), lambda z: (z > 0) & (z < 6), (0, 6)),
    "hardtanh": (F.hardtanh, lambda z: np.clip(z, -1, 1), lambda z: (z > -1) & (z < 1), (-1, 1)),
    "square": (torch.square, np.square, lambda z: 2 * z, ()),
    "step": (lambda z: (z > 0.37).double(), lambda z: z > 0.37, lambda z: 0 * z, (0.37,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_against_scipy(name: str) -> None:
    f, value, slope, kinks = PLAIN[name]
    found = activation_moments(f)

    def expect(g: object) -> float:
        points = [-12, *kinks, 12]
        density = [
            integrate.quad(
                lambda z: float(g(z)) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), a, b, epsabs=1e-13
            )[0]
            for a, b in itertools.pairwise(points)
        ]
        return sum(density)

    assert found.forward == pytest.approx(expect(lambda z: value(z) ** 2), abs=1e-9)
    assert found.backward == pytest.approx(expect(lambda z: slope(z) ** 2), abs=1e-9)
    assert found.mean == pytest.approx(expect(value), abs=1e-9)


@settings(max_examples=100)
@given(st.floats(-2, 2), st.floats(-3, 3))
def test_a_kink_anywhere(slope: float, kink: float) -> None:
    """E[f'²] of a leaky ramp with its kink at any place is slope²·P(z < kink) + P(z > kink)."""
    below = 0.5 * (1 + math.erf(kink / math.sqrt(2)))
    found = activation_moments(lambda z: torch.where(z > kink, z - kink, slope * (z - kink)))
    assert found.backward == pytest.approx(slope**2 * below + 1 - below, abs=1e-10)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.SiLU(), lambda z: z * torch.sigmoid(z)),
        (nn.ReLU(inplace=True), torch.relu),
        (nn.PReLU(init=0.3, dtype=torch.float64), nn.LeakyReLU(0.3)),
        (nn.Mish(), lambda z: z * torch.tanh(F.softplus(z))),
        (nn.Hardswish(), lambda z: z * F.relu6(z + 3) / 6),
        (nn.SELU(), lambda z: 1.0507009873554805 * F.elu(z, 1.6732632423543772)),
    ],
    ids=["SiLU", "in place", "PReLU", "Mish", "Hardswish", "SELU"],
)
def test_two_ways_to_write_it(one: object, other: object) -> None:
    a, b = activation_moments(one), activation_moments(other)
    assert (a.forward, a.backward, a.mean) == pytest.approx((b.forward, b.backward, b.mean), abs=1e-9)


def test_selu_keeps_mean_and_variance() -> None:
    """Its defining property (Klambauer et al. 2017): E[f] = 0 and E[f²] = 1."""
    found = activation_moments(F.selu)
    assert (found.mean, found.forward) == pytest.approx((0, 1), abs=1e-6)


def test_under_no_grad_and_without_touching_parameters() -> None:
    prelu = nn.PReLU(dtype=torch.float64)
    with torch.no_grad():
        assert activation_moments(prelu).backward == pytest.approx((1 + 0.25**2) / 2)
    assert prelu.weight.grad is None


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (nn.Softmax(0), "mixes values"),
        (lambda z: z - z.mean(), "mixes values"),
        (nn.Dropout(0.5), "random"),
        (lambda z: z.sum(), "shape"),
        (lambda z: torch.exp(z.square()), "finite"),
        (nn.PReLU(3), "differs between channels"),
        (nn.RReLU(), "evaluation mode"),
        (lambda z: z**1.5, "defined for every z"),
        (torch.log1p, "defined for every z"),
        (torch.acosh, "defined for every z"),
        (lambda z: 1 / (z - 0.7), "not finite"),
        (torch.tan, "not finite"),
        (lambda z: (z + 0.3).abs().log(), "not finite"),  # E[f²] exists, E[f'²] does not
    ],
)
def test_what_is_no_nonlinearity(f: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        activation_moments(f)


def test_inference_mode_changes_nothing() -> None:
    expected = activation_moments(torch.tanh)
    with torch.inference_mode():
        assert activation_moments(torch.tanh) == expected
    with torch.no_grad():
        assert activation_moments(torch.tanh) == expected
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("center", [-1.37, 0.3, 2.0])
@pytest.mark.parametrize("width", [1e-3, 3e-3, 0.1])
def test_narrow_spikes(center: float, width: float) -> None:
    """E[exp(−(z−c)²/w²)²] of a spike of width w at c, in closed form."""
    moments = activation_moments(lambda z: torch.exp(-(((z - center) / width) ** 2)))
    variance = width**2 / 4 + 1
    expected = math.exp(-(center**2) / (2 * variance)) * width / 2 / math.sqrt(variance)
    assert moments.forward == pytest.approx(expected, rel=1e-6)


def test_a_module_of_any_precision() -> None:
    prelu = nn.PReLU(init=0.1)
    assert activation_moments(prelu).forward == pytest.approx((1 + 0.1**2) / 2)
    assert activation_moments(nn.PReLU().bfloat16()).backward == pytest.approx((1 + 0.25**2) / 2)
    assert prelu.weight.dtype == torch.float32
