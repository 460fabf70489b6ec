"""What an init rewrite did, layer by layer, and how signals spread in a model."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tools.contract import BackwardFactor, BackwardTerm, InitRule, Scheme, WeightKind


@dataclass(frozen=True)
class Factors:
    """The terms of a weight's divisor √(second_moment / keep + backward term).

    ``activation`` names the function f of the preceding layer, ``second_moment`` is E[f²], ``keep``
    is the keep probability of the dropout between them. ``next_activation``, ``next_slope``
    (E[f'²]) and ``next_keep`` describe what follows the layer. ``next_slope`` is None where the
    backward term is left out. `ckpt_tools.initialize.rule` has the formula.
    """

    activation: str
    second_moment: float
    keep: float
    next_activation: str = ""
    next_slope: float | None = None
    next_keep: float = 1.0
    divisor: float = 1.0


@dataclass(frozen=True)
class InitLayer:
    """One weight: it was rewritten with ``factors``, or left as it was for a ``reason``.

    ``kind`` is None where the forward did not use the parameter as a weight. ``bias`` is the key of
    the bias that became zero, or "".
    """

    name: str
    parameter: str
    kind: WeightKind | None
    shape: tuple[int, ...]
    rewritten: bool
    reason: str = ""
    fan_in: int = 0
    fan_out: int = 0
    factors: Factors | None = None
    bias: str = ""


@dataclass(frozen=True)
class InitRewrite:
    """The result of `rewrite_init`.

    ``layers`` has the rewritten weights in order of execution, then those that were left alone.
    """

    layers: tuple[InitLayer, ...]
    rule: InitRule
    scheme: Scheme
    backward_term: BackwardTerm
    backward_factor: BackwardFactor
    seed: int

    @property
    def rewritten(self) -> tuple[InitLayer, ...]:
        """The layers whose weights are new."""
        return tuple(layer for layer in self.layers if layer.rewritten)


@dataclass(frozen=True)
class LayerSignal:
    """How one weight layer's output z and its error signal δ = ∂L/∂z are spread in training mode.

    Variances are over batch, units and positions together. ``error_variance`` is relative to the
    variance of the error that was fed in at the model's output; it is None where no gradient
    arrived. The figures show the samples ``outputs`` and ``errors``, the latter without zeros
    (Hendrycks & Gimpel 2016, appendix A).
    """

    name: str
    parameter: str
    variance: float
    error_variance: float | None
    outputs: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
