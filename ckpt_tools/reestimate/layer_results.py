"""A summary of what became of each BN layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ckpt_tools.diagnosis.mismatch import compare_layer, measure
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.reestimate.choice import Choice
from ckpt_tools.reestimate.estimators import Estimate, dropout_shift
from ckpt_tools.results import BatchNormLayer, LayerResult, Spread, Walk


def layer_results(
    walk: Walk,
    choice: Choice,
    layers: Mapping[str, Layer],
    estimate: Estimate,
    paired: Mapping[str, Evidence],
) -> tuple[LayerResult, ...]:
    """One result for every BN layer of the walk, in its order.

    ``layers`` are those that the passes observed. The variance of a layer that is not rewritten, a
    control layer, is compared with the stored one all the same. ``paired`` is the evidence of a
    paired measurement, if there was one.
    """
    return tuple(_result(layer, choice, layers, estimate, paired) for layer in walk.batch_norms)


def _result(
    walked: BatchNormLayer,
    choice: Choice,
    layers: Mapping[str, Layer],
    estimate: Estimate,
    paired: Mapping[str, Evidence],
) -> LayerResult:
    evidence = estimate.last_pass.evidence.get(walked.name)
    ratio = error = mismatch = shift = None
    if evidence is not None:
        layer = layers[walked.name]
        # A paired measurement changes nothing in a layer that is not rewritten.
        new = layer.stored.variance if evidence.training else evidence.moments.variance()
        if walked.name in estimate.statistics:
            new = estimate.statistics[walked.name].variance
        # A variance far below eps has no influence on the layer's output.
        floor = 1e-3 * layer.module.eps
        # The ratio of a dead channel means nothing; it is left out unless all are dead.
        alive = new > floor if bool((new > floor).any()) else torch.ones_like(new, dtype=torch.bool)
        ratio = _spread(((layer.stored.variance + floor) / (new + floor))[alive])
        scale = estimate.error_scale.get(walked.name, 1.0)
        relative = evidence.relative_error(layer.stored.mean) * scale
        error = _spread(relative[alive])
    both = paired.get(walked.name)
    if both is not None and both.training is not None:
        layer = layers[walked.name]
        compared = compare_layer(layer, both)
        alive = both.training.variance() > 1e-3 * layer.module.eps
        mismatch = measure(compared.log_variance.exp(), compared.log_variance_error, alive)
        shift = measure(dropout_shift(both), both.relative_error(layer.stored.mean), alive)
    return LayerResult(
        name=walked.name,
        channels=walked.channels,
        rewritten=walked.name in estimate.statistics,
        reason=_reason(walked, choice, measured=evidence is not None),
        downstream_of=walked.downstream_of,
        control=walked.name in choice.controls,
        ratio=ratio,
        error=error,
        mismatch=mismatch,
        dropout_shift=shift,
    )


def _reason(walked: BatchNormLayer, choice: Choice, *, measured: bool) -> str:
    if not walked.reached:
        return "never reached by an evaluation forward"
    if walked.name in choice.rewrite:
        if not measured:
            return "never reached by the data"
        return "behind dropout" if walked.downstream_of else "rewritten with all layers"
    if walked.name in choice.kept:
        return choice.kept[walked.name]
    return "control: no active dropout reaches it"


def _spread(values: Tensor) -> Spread:
    return Spread(float(values.median()), float(values.min()), float(values.max()))
