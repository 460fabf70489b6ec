"""The divisor of a weight: √(E[f(z^{l−1})²]/p_{l−1} + B), where p are keep probabilities.

Hendrycks & Gimpel 2016, section 2.2. The first term keeps Var(z) at 1 on the way forward. B keeps
the variance of the error signal on the way back, and there are two versions of it. The paper has
B = p·E[f'(z^l)²], which holds where the backward pass of dropout only masks: a share p of the
errors survives unchanged. Inverted dropout (PyTorch's) also divides the survivors by p in the
backward pass, so their second moment is p/p² = 1/p times the incoming one, and the measured factor
is B = E[f'(z^l)²]/p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from ckpt_tools.contract import BackwardFactor, Scheme
from ckpt_tools.errors import UsageError

UNKNOWN = 0.5
"""E[f²] and E[f'²] where f is not known: the paper's default (section 4)."""


def divisor(
    second_moment: float,
    keep: float,
    *,
    next_slope: float | None = None,
    next_keep: float = 1.0,
    backward_factor: BackwardFactor = "paper",
    fan_ratio: float = 1.0,
) -> float:
    """√(second_moment / keep + fan_ratio · B).

    Args:
        second_moment: E[f(z^{l−1})²] of the layer's input before dropout; 1 if standardised.
        keep: keep probability of the dropout between.
        next_slope: E[f'(z^l)²] of what follows; None leaves the backward term out.
        next_keep: keep probability of the dropout behind what follows.
        backward_factor: "paper": B = next_slope · next_keep; "inverted": next_slope / next_keep.
        fan_ratio: see `fan_ratio`.

    Raises:
        UsageError: a keep probability outside (0, 1], an unknown factor, moments whose sum is not
            positive and finite.
    """
    check_keep(keep, "keep")
    check_keep(next_keep, "next_keep")
    check_choice(backward_factor, "backward_factor", get_args(BackwardFactor))
    backward = 0.0
    if next_slope is not None:
        backward = backward_term(next_slope, next_keep, backward_factor)
    square = second_moment / keep + fan_ratio * backward
    if not 0 < square < math.inf:
        raise UsageError(
            f"E[f²] = {second_moment}, E[f'²] = {next_slope}: expected moments that give a "
            f"positive finite divisor, found its square to be {square}. Check the activations: one "
            "that is 0 everywhere lets nothing through."
        )
    return math.sqrt(square)


def backward_term(slope: float, keep: float, factor: BackwardFactor) -> float:
    """B: p·E[f'²] ("paper") or E[f'²]/p ("inverted")."""
    return slope * keep if factor == "paper" else slope / keep


def fan_ratio(scheme: Scheme, fan_in: int, fan_out: int) -> float:
    """The weight of the backward term: 1, or fan-out / fan-in where entries are drawn one by one.

    Hypersphere and orthonormal follow section 2.2, which has no fans. For uniform the division then
    gives section 4's Unif[−1, 1]·√3 / √(n_in/p·E[f²] + p·n_out·E[f'²]), and for normal the Gaussian
    of the same variance.
    """
    check_choice(scheme, "scheme", get_args(Scheme))
    return fan_out / fan_in if scheme in ("uniform", "normal") else 1.0


def check_keep(keep: float, name: str) -> None:
    """Raise UsageError for a keep probability that is 0 or less, above 1, or NaN."""
    if not 0 < keep <= 1:
        raise UsageError(
            f"{name}={keep}: expected a keep probability in (0, 1]. It is 1 − rate for torch's dropout rates."
        )


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raise UsageError for a value that is not among the choices."""
    if value not in choices:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
