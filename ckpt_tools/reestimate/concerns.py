"""What is worth a warning about a result: signs that a correction does more than remove dropout's share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_tools.arguments import advise
from ckpt_tools.errors import CheckFailed
from ckpt_tools.reestimate.effect import effect_warning
from ckpt_tools.results import (
    BatchSpread,
    Controls,
    DropoutSite,
    Effect,
    LayerResult,
    Outlier,
    Reestimation,
    Verdict,
)

_MAX_ERROR = 0.1  # relative standard error of a layer's median channel
# Dropout changes a variance by 1.2 to 1.9 right behind it, and less deeper down (33 small nets).
_MAX_FACTOR = 5.0  # of stored / new variance, up or down, of a layer's median channel
_LISTED = 3


def result_warnings(result: Reestimation) -> tuple[str, ...]:
    """Return what a user should look at before a corrected model is used, a sentence each.

    Predictions on synthetic inputs mean nothing, so a change of them is no warning.
    """
    effect = None if is_synthetic(result) else result.effect
    return collect_warnings(
        result.layers, effect, result.noise_left_on, result.batch_spread, result.kept_outliers
    )


def collect_warnings(
    layers: Iterable[LayerResult],
    effect: Effect | None,
    noise_left_on: Sequence[DropoutSite] = (),
    spread: BatchSpread | None = None,
    kept: Sequence[Outlier] = (),
) -> tuple[str, ...]:
    """Return the warnings about these layers, the effect of a correction, noise and the batches."""
    layers = [layer for layer in layers if layer.rewritten]
    warnings = [
        _effect_sentence(effect),
        _error_sentence(layers),
        _factor_sentence(layers),
        noise_warning(noise_left_on),
        _spread_sentence(spread),
        _kept_sentence(kept),
    ]
    return tuple(warning for warning in warnings if warning)


def is_synthetic(result: Reestimation) -> bool:
    """Tell whether the inputs were made up: then nobody compared them with the training data."""
    return result.verdict is None and result.estimator == "ratio"


def refuse_doubts(verdicts: Iterable[Verdict | None], controls: Controls, warnings: tuple[str, ...]) -> None:
    """Raise CheckFailed for any doubt about the data, and for any warning about the result."""
    levels = ("doubt", "refuse")
    doubts = [f"the data is in doubt: {item.reason}" for item in verdicts if item and item.level in levels]
    if controls.verdict in ("doubt", "disagree"):
        doubts.append(controls.reason)
    doubts = [*dict.fromkeys(doubts), *warnings]
    if doubts:
        raise CheckFailed(
            f"strict: {'; '.join(doubts)}. Nothing was written. Look at the data, or go on without "
            f"{advise('--strict', 'strict=True')}."
        )


def _spread_sentence(spread: BatchSpread | None) -> str:
    if spread is None or not spread.unlike:
        return ""
    return (
        f"the batches differ more than chance: {spread.ratio:.1f} times as much as batches of independent "
        f"samples ({spread.batches} batches, layer {spread.layer or '(root)'}); shuffle the data, or the "
        "variances are off, unless the training had such batches, too"
    )


def _kept_sentence(kept: Sequence[Outlier]) -> str:
    if not kept:
        return ""
    names = _list([f"{outlier.name} ({outlier.reason})" for outlier in kept])
    return (
        f"outliers count, because their batches cannot be cut and hold over 1 % of the samples: "
        f"{names}; remove them or, if the rows of a batch are independent samples, say so "
        "(--rows-are-samples, rows_are_samples=True)"
    )


def _effect_sentence(effect: Effect | None) -> str:
    return effect_warning(effect)


def _error_sentence(layers: list[LayerResult]) -> str:
    uncertain = [layer for layer in layers if layer.error and layer.error.median > _MAX_ERROR]
    if not uncertain:
        return ""
    worst = max(uncertain, key=lambda layer: layer.error.median if layer.error else 0.0)
    assert worst.error is not None
    return (
        f"{_count(uncertain)} not measured well: the standard error of the new variance is above "
        f"{_MAX_ERROR:.0%} in the median channel (worst: {worst.name or '(root)'}, "
        f"{worst.error.median:.0%}); read more samples"
    )


def _factor_sentence(layers: list[LayerResult]) -> str:
    changed = [
        layer for layer in layers if layer.ratio and not 1 / _MAX_FACTOR <= layer.ratio.median <= _MAX_FACTOR
    ]
    if not changed:
        return ""
    listed = _list([f"{layer.name or '(root)'} {layer.ratio.median:.3g}" for layer in changed if layer.ratio])
    return (
        f"{_count(changed)} changed beyond a factor of {_MAX_FACTOR:g}, more than dropout explains: "
        f"stored / new variance {listed}; check drop rates, data and preprocessing"
    )


def noise_warning(sites: Sequence[DropoutSite]) -> str:
    """Return the warning about noise that was on in the evaluation pass; empty if there was none."""
    if not sites:
        return ""
    listed = _list([f"{site.name} ({site.op})" for site in sites])
    return (
        f"noise stayed on in evaluation mode: {listed} drew random numbers without asking for "
        "the mode, so variances behind that are those of noisy inputs; let it ask self.training"
    )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _count(layers: list[LayerResult]) -> str:
    return f"{len(layers)} BN layer was" if len(layers) == 1 else f"{len(layers)} BN layers were"
