"""How running variances are re-estimated: one set of settings, the same from the command line to
the passes.

Importing this module imports no torch, so that the command line can build a `Method` before it
loads anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from ckpt_tools.arguments import advise, is_number
from ckpt_tools.contract import Estimator, LayerChoice, Precision, Statistics
from ckpt_tools.errors import UsageError

__all__ = ["Method"]

_DEFAULT_MOMENTUM, _DEFAULT_EPOCHS = 0.1, 1


@dataclass(frozen=True)
class Method:
    """The settings of a re-estimation, checked when they are put together.

    ``reestimate_bn`` documents each of them; its keyword arguments of the same names become one
    Method. What concerns a single model or run (who knows the drop rates, its walk, its progress)
    is no part of it.

    Raises UsageError for settings that mean nothing, or nothing together.
    """

    estimator: Estimator = "auto"
    layers: LayerChoice = "auto"
    only: Sequence[str] = ()  # patterns of layer names; becomes a tuple
    keep: Sequence[str] = ()
    statistics: Statistics = "variance"
    tolerance: float | None = None
    momentum: float = _DEFAULT_MOMENTUM  # with epochs: of the estimator "ema" alone
    epochs: int = _DEFAULT_EPOCHS
    precision: Precision = "fp32"
    compile: bool = False
    keep_outliers: bool = False
    rows_are_samples: bool = False  # the rows of a batch are independent samples, so it may be cut
    force: bool = False  # go on although control layers disagree with the data
    strict: bool = False  # stop at every doubt about the data, and every warning about the result

    def __post_init__(self) -> None:
        for name in ("only", "keep"):
            patterns = getattr(self, name)
            # A single text is one pattern; as a sequence it would be one for each character.
            patterns = (patterns,) if isinstance(patterns, str) else patterns
            if not isinstance(patterns, Iterable):
                raise UsageError(f"{name}={patterns!r}: expected patterns of names of BN layers.")
            patterns = tuple(patterns)
            if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
                raise UsageError(f"{name}: {wrong[0]!r} is no pattern; expected a text such as 'layer4.*'.")
            object.__setattr__(self, name, patterns)
        for name, value, choices in (
            ("estimator", self.estimator, get_args(Estimator)),
            ("layers", self.layers, get_args(LayerChoice)),
            ("statistics", self.statistics, get_args(Statistics)),
        ):
            if value not in choices:
                raise UsageError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
        is_fraction = is_number(self.tolerance) and 0 < (self.tolerance or 0) < 1
        if self.tolerance is not None and not (is_fraction and self.estimator != "ema"):
            raise UsageError(
                f"tolerance={self.tolerance!r}: expected a relative error in (0, 1), and not the ema "
                "estimator."
            )
        if not (is_number(self.momentum) and 0 < self.momentum <= 1):
            raise UsageError(f"momentum={self.momentum!r}: expected a number in (0, 1].")
        if self.estimator == "ratio" and self.statistics != "variance":
            raise UsageError(
                f"statistics={self.statistics} measures the data itself, and the estimator ratio takes "
                "dropout's share out of the stored variance. Leave one of them out."
            )
        if self.force and self.strict:
            raise UsageError("force goes on where strict stops. Leave one of them out.")
        if isinstance(self.epochs, bool) or not (isinstance(self.epochs, int) and self.epochs >= 1):
            raise UsageError(f"epochs={self.epochs!r}: expected a whole number of at least 1.")
        is_default = (self.momentum, self.epochs) == (_DEFAULT_MOMENTUM, _DEFAULT_EPOCHS)
        if self.estimator != "ema" and not is_default:
            raise UsageError(
                f"momentum and epochs belong to the ema estimator, not to {self.estimator}. Leave them out."
            )

    @property
    def reads_data_repeatedly(self) -> bool:
        """Whether the same samples are read in several passes, so that they should be kept, and
        must not change.
        """
        return self.estimator == "exact" or self.epochs > 1

    @property
    def replaces_statistics(self) -> bool:
        """Whether the stored mean and variance are replaced, and influence nothing."""
        return self.statistics == "mean+variance" and self.estimator != "ema"

    def require_no_data(self) -> None:
        """Raise UsageError if this method needs training data: only the paired measurement does not."""
        if self.estimator not in ("auto", "ratio"):
            raise UsageError(
                f"the estimator {self.estimator} takes the data for that of the training; expected "
                f"data ({advise('--data', 'batches')}). Without data, leave the estimator out: the "
                "variances are compared with dropout on and off."
            )
        if self.statistics != "variance":
            raise UsageError(
                f"statistics={self.statistics} measures the data itself; expected data "
                f"({advise('--data', 'batches')})."
            )
