"""Initialisation in the manner of ``torch.nn.init``, corrected for dropout and the nonlinearity.

``dropout_corrected_(layer.weight, torch.relu, keep=0.5)`` fills a weight in place, as
``torch.nn.init.kaiming_normal_(layer.weight)`` would. Biases should be 0; it does not touch them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from ckpt_tools.contract import BackwardFactor, BackwardTerm, Scheme
from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.activations import ActivationMoments, activation_moments
from ckpt_tools.initialize.rule import UNKNOWN, check_choice, divisor, fan_ratio
from ckpt_tools.initialize.scheme import fans, fill
from ckpt_tools.results import Geometry

__all__ = ["dropout_corrected_"]

Activation = Callable[[Tensor], Tensor]

_UNKNOWN = ActivationMoments(UNKNOWN, UNKNOWN, 0.0)


def dropout_corrected_(
    weight: Tensor,
    activation: Activation | None = None,
    keep: float = 1.0,
    next_activation: Activation | None = None,
    next_keep: float = 1.0,
    *,
    scheme: Scheme = "hypersphere",
    backward_term: BackwardTerm = "auto",
    backward_factor: BackwardFactor = "paper",
    geometry: Geometry | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with the initialisation that corrects for dropout and for the nonlinearity.

    W / √(E[f(z^{l−1})²] / keep + next_keep · E[f'(z^l)²]), z ~ N(0, 1), where each unit of W has
    its fan-in vector on the unit hypersphere (Hendrycks & Gimpel 2016, section 2.2; section 4 for
    ``scheme="uniform"``). Without the backward term Var(z^l) is 1; with it Var(z^l) is smaller, for
    the sake of the error signal.

    The paper's backward factor is meant for dropout that does not scale in its backward pass.
    PyTorch's does, by 1/p: its factor is "inverted", E[f'(z^l)²] / next_keep. Divided by the
    backward term alone, 20 ReLU layers of 500 at keep 0.8 hold the variance of their error signal
    with the inverted factor and multiply it by thousands with the paper's.

    Args:
        weight: (units, fan-in) of a linear layer, (units, inputs / groups, *kernel) of a
            convolution; others with ``geometry``. Any floating dtype, device and strides.
        activation: f of the layer before; ``nn.Identity()`` for the first layer, whose input is
            standardised. None: not known, E[f²] = 0.5.
        keep: keep probability, 1 − rate, of the dropout between f and this layer.
        next_activation: f behind this layer; ``nn.Identity()`` for the last layer. None: not known,
            E[f'²] = 0.5.
        next_keep: keep probability of the dropout behind it.
        scheme: "hypersphere"; "orthonormal" (also among each other); "uniform" (generalises
            Xavier's); "normal" (He's, for ReLU, keep 1 and no backward term).
        backward_term: whether the second summand is there; "auto": for linear weights, not for
            convolutions.
        backward_factor: "paper" or "inverted".
        geometry: what the dimensions of ``weight`` mean (groups, transposed convolutions, batches
            of linear weights). None: linear for two dimensions, a convolution without groups for
            more.
        generator: a CPU generator; None: torch's global one.

    Returns:
        ``weight``.

    Raises:
        UsageError: a keep probability outside (0, 1], an activation that is no pointwise function,
            an unknown word, or a weight that does not fit its geometry. The weight is as it was.
    """
    check_choice(backward_term, "backward_term", get_args(BackwardTerm))
    if geometry is None:
        geometry = Geometry("linear" if weight.dim() < 3 else "convolution")
    with_backward = backward_term == "on"
    if backward_term == "auto":
        with_backward = geometry.kind == "linear"
    before = _moments(activation, "activation")
    behind = _moments(next_activation, "next_activation")
    scale = divisor(
        before.forward,
        keep,
        next_slope=behind.backward if with_backward else None,
        next_keep=next_keep,
        backward_factor=backward_factor,
        fan_ratio=fan_ratio(scheme, *fans(weight.shape, geometry)),
    )
    fill(weight, geometry, scheme, generator or torch.default_generator, divisor=scale)
    return weight


def _moments(f: Activation | None, name: str) -> ActivationMoments:
    if f is None:
        return _UNKNOWN
    if not callable(f):
        raise UsageError(
            f"{name}={f!r}: expected a function of a tensor such as torch.relu or nn.GELU(), or None."
        )
    return activation_moments(f)
