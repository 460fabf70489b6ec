"""Which estimator a re-estimation uses, and why: the one asked for, or what the data suggests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ckpt_tools.contract import Estimator, Rates
from ckpt_tools.diagnosis.mismatch import compare_layers, judge_mismatch, trail_behind_weights
from ckpt_tools.method import Method
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.reestimate.estimators import Estimate, ema, exact, pooled, ratio, refuse_without_noise
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.results import Verdict

# Of a paired measurement that was not asked for by name: so many inputs, fewer if all layers are
# this precise before. The error of the stored statistics themselves is of the same size.
AUTO_IMAGES = 512
# Further inputs cost nothing where they are made up, so few repeats and many inputs are best.
SYNTHETIC_REPEATS = 3
_AUTO_TOLERANCE = 0.02


@dataclass(frozen=True)
class Selection:
    """An estimate, the estimator that made it, and the reason for that.

    ``paired`` is the evidence of the paired measurement by layer name, if there was one, with the
    ``layers`` that it observed. ``trails``: the stored statistics differ from the data because the
    weights have moved since, so that to scale them would keep what is old.
    """

    estimate: Estimate
    estimator: Estimator
    reason: str
    verdict: Verdict | None = None
    trails: bool = False
    paired: Mapping[str, Evidence] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)


def estimate_statistics(
    context: PassContext,
    make_paired: Callable[[], PassContext],
    method: Method,
    *,
    rates: Rates,
    synthetic: bool,
    verdict: Verdict | None,
) -> Selection:
    """Run the passes of the estimator that was asked for, or of the one that `auto` selects.

    Args:
        context: for passes under test conditions.
        make_paired: makes the context of a paired measurement, for which the model is copied.
        method: the settings.
        rates: where the drop rates stem from.
        synthetic: whether the inputs are made up, so that they cannot agree with the training data.
        verdict: what is known about the data already.
    """
    if method.estimator not in ("auto", "ratio"):
        return _measure_directly(context, method, "asked for")
    if method.estimator == "auto" and method.statistics != "variance":
        return _measure_directly(context, method, "mean and variance are those of the data")
    if method.estimator == "auto" and rates == "unknown":
        reason = "drop rates are not known, so the data is taken for that of the training, as in the paper"
        return _measure_directly(context, method, reason)
    paired = _measure_ratio(make_paired(), method, verdict, synthetic=synthetic)
    if method.estimator == "ratio" or not _suits_pooled(paired):
        refuse_without_noise(paired.estimate, context.runner.noise_left_on)
        return paired
    assert paired.verdict is not None
    estimate = pooled(context, method.statistics, method.tolerance, number=2)
    seen = "the weights have moved, not the data" if paired.trails else "nothing speaks against the data"
    reason = f"the drop rates are known, and {seen} ({paired.verdict.reason})"
    return replace(paired, estimate=estimate, estimator="pooled", reason=reason)


def _suits_pooled(paired: Selection) -> bool:
    """Whether the data may be taken for that of the training, as the paper does."""
    return paired.verdict is not None and (paired.verdict.level in ("agree", "none") or paired.trails)


def _measure_ratio(
    context: PassContext, method: Method, verdict: Verdict | None, *, synthetic: bool
) -> Selection:
    tolerance, max_images = method.tolerance, None
    if method.estimator == "auto" and tolerance is None:
        tolerance, max_images = _AUTO_TOLERANCE, AUTO_IMAGES
    estimate = ratio(context, tolerance, max_images)
    evidence, images = estimate.last_pass.evidence, estimate.last_pass.total.images
    if synthetic:
        reason = "there is no data, and the ratio of variances with dropout on and off needs none"
        return Selection(estimate, "ratio", reason, None, False, evidence, context.layers)
    trails = False
    if verdict is None:
        compared = compare_layers(context.layers, evidence)
        verdict = judge_mismatch(compared, images)
        trails = verdict.level == "doubt" and trail_behind_weights(compared)
    reason = f"the data differs from the stored statistics ({verdict.reason})"
    if method.estimator == "ratio":
        reason = "asked for"
    return Selection(estimate, "ratio", reason, verdict, trails, evidence, context.layers)


def _measure_directly(context: PassContext, method: Method, reason: str) -> Selection:
    statistics = method.statistics
    if method.estimator == "ema":
        return Selection(ema(context, statistics, method.momentum, method.epochs), "ema", reason)
    if method.estimator == "exact":
        return Selection(exact(context, statistics, method.tolerance), "exact", reason)
    return Selection(pooled(context, statistics, method.tolerance), "pooled", reason)
