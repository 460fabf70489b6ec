"""Which estimator a re-estimation uses, and why: the one asked for, or what the data suggests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckpt_tools.contract import Estimator, Rates
from ckpt_tools.diagnosis.mismatch import judge_mismatch
from ckpt_tools.method import Method
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.reestimate.estimators import Estimate, ema, exact, pooled, ratio
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.results import Verdict

# Of a paired measurement that was not asked for by name: so many inputs, fewer if all layers are
# this precise before. The error of the stored statistics themselves is of the same size.
AUTO_IMAGES = 512
_AUTO_TOLERANCE = 0.02


@dataclass(frozen=True)
class Selection:
    """An estimate, the estimator that made it, and the reason for that.

    ``paired`` is the evidence of the paired measurement by layer name, if there was one, with the
    ``layers`` that it observed.
    """

    estimate: Estimate
    estimator: Estimator
    reason: str
    verdict: Verdict | None = None
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
    if method.estimator == "ratio":
        return _measure_ratio(make_paired(), method, "asked for", None, synthetic)
    if method.estimator != "auto" or method.statistics != "variance" or rates == "unknown":
        return _measure_directly(context, method, rates)
    if synthetic:
        reason = "there is no data, and the ratio of variances with dropout on and off needs none"
        return _measure_ratio(make_paired(), method, reason, AUTO_IMAGES, synthetic)
    if verdict is not None and verdict.level in ("doubt", "refuse"):
        reason = f"the data differs from the stored statistics ({verdict.reason})"
        return _measure_ratio(make_paired(), method, reason, AUTO_IMAGES, synthetic)
    paired = _measure_ratio(make_paired(), method, "", AUTO_IMAGES, synthetic)
    assert paired.verdict is not None
    if paired.verdict.level == "agree":
        reason = (
            f"drop rates are known and the data agrees with the stored statistics ({paired.verdict.reason})"
        )
        estimate = pooled(context, method.statistics, method.tolerance)
        return Selection(estimate, "pooled", reason, paired.verdict, paired.paired, paired.layers)
    reason = f"the data is not known to agree with the training ({paired.verdict.reason})"
    return Selection(paired.estimate, "ratio", reason, paired.verdict, paired.paired, paired.layers)


def _measure_ratio(
    context: PassContext, method: Method, reason: str, max_images: int | None, synthetic: bool
) -> Selection:
    tolerance = method.tolerance
    if max_images is not None and tolerance is None:
        tolerance = _AUTO_TOLERANCE
    elif tolerance is not None:
        max_images = None
    estimate = ratio(context, tolerance, max_images)
    evidence, images = estimate.last_pass.evidence, estimate.last_pass.total.images
    verdict = None if synthetic else judge_mismatch(context.layers, evidence, images)
    return Selection(estimate, "ratio", reason, verdict, evidence, context.layers)


def _measure_directly(context: PassContext, method: Method, rates: Rates) -> Selection:
    statistics = method.statistics
    if method.estimator == "ema":
        return Selection(ema(context, statistics, method.momentum, method.epochs), "ema", "asked for")
    if method.estimator == "exact":
        return Selection(exact(context, statistics, method.tolerance), "exact", "asked for")
    reason = "asked for"
    if method.estimator == "auto":
        reason = "drop rates are not known, so the data is taken for that of the training, as in the paper"
        if statistics == "mean+variance":
            reason = "mean and variance are those of the data"
    return Selection(pooled(context, statistics, method.tolerance), "pooled", reason)
