"""The estimators `ratio`, `pooled`, `exact` and `ema`: how new statistics follow from passes over the data.

Each is a function that runs one or more passes and returns an `Estimate`. An estimator that runs
several passes gives the later ones the result of the first, so that changed data is noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckpt_tools.arguments import advise
from ckpt_tools.contract import Statistics
from ckpt_tools.errors import ModelError, NothingToDo
from ckpt_tools.moments import Moments
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import (
    Layer,
    MeanVariance,
    Rule,
    batch_statistics,
    batch_variance,
    current_statistics,
)
from ckpt_tools.observation.paired_layer import paired_statistics
from ckpt_tools.reestimate.passes import DataPass, PassContext, PassResult
from ckpt_tools.reestimate.screening import DetectedOutlier
from ckpt_tools.results import DropoutSite, Outlier

# `exact` ends when no statistic changes by more in a pass; the fixed point is then known to 1e-3.
_SETTLED = 1e-4
_MAX_PASSES = 100
# Weight of the new value in a log-space step. Undamped passes diverge; from `pooled`, a weight of
# 0.7 reaches 1e-3 in 6 to 7 passes on small nets, 0.5 in 8 to 9.
_DAMPING = 0.7
_TOLERATED_LOSS = 0.5  # of the samples of a paired measurement, in batches that cannot be cut
_NO_SHIFT = 1e-5  # a smaller relative change of a variance is rounding


@dataclass(frozen=True)
class Estimate:
    """What an estimator found out.

    ``statistics`` are the new ones of the layers to rewrite, by layer name, without layers that
    the data did not reach. ``last_pass`` holds the evidence for them, ``outliers`` the samples that
    were left out in any pass, and ``kept_outliers`` those that counted in the first one.
    ``residual`` is the largest relative change in the last pass of `exact`. ``error_scale`` is the
    standard error of a layer's estimate in units of that of the pooled variance, by layer name where
    it is not 1.
    """

    statistics: Mapping[str, MeanVariance]
    last_pass: PassResult
    outliers: tuple[DetectedOutlier, ...]
    passes: int = 1
    stopped_early: bool = False
    residual: float | None = None
    error_scale: Mapping[str, float] = field(default_factory=dict)
    kept_outliers: tuple[Outlier, ...] = ()


def ratio(context: PassContext, tolerance: float | None, max_images: int | None = None) -> Estimate:
    """The stored variance, less dropout's share of it: stored · V_off / V_on.

    Both variances are measured on the same samples, under test and under training conditions. So
    what the samples have of their own cancels, and they need not be those of the training. The
    layers of the context are of type ``PairedLayer``.
    """
    # What is left out of both sides of a ratio costs precision alone.
    only = DataPass(
        context,
        paired_statistics,
        tolerance=tolerance,
        max_images=max_images,
        tolerated_loss=_TOLERATED_LOSS,
    ).run()
    shifts = {name: dropout_shift(only.evidence[name]) for name in _reached_names(context, only.evidence)}
    corrected = {
        name: MeanVariance(stored.mean, stored.variance / shift)
        for name, shift in shifts.items()
        for stored in [context.layers[name].stored]
    }
    _require_some(corrected)
    return Estimate(
        corrected, only, only.total.outliers, stopped_early=only.stopped_early, kept_outliers=only.kept
    )


def refuse_without_noise(estimate: Estimate, noise_left_on: Sequence[DropoutSite]) -> None:
    """Raise NothingToDo if a paired measurement found the same variances with dropout on and off.

    ``noise_left_on``: what drew random numbers with dropout off, too, and so made no difference.
    """
    shifts = [dropout_shift(estimate.last_pass.evidence[name]) for name in estimate.statistics]
    if all(bool(((shift - 1).abs() < _NO_SHIFT).all()) for shift in shifts):
        cause = "no noise reaches them"
        if noise_left_on:
            sites = ", ".join(f"{site.name} ({site.op})" for site in noise_left_on[:3])
            cause = f"all noise is of a kind that stays on in evaluation mode, too: {sites}"
        raise NothingToDo(
            "nothing to do: with dropout on and off the inputs of every BN layer have the same "
            f"variance, so {cause}. "
            + advise(
                "Give the drop rates of the training run (--model-kwargs), or use --estimator pooled.",
                "Build the model with the drop rates of the training run, or use estimator='pooled'.",
            )
        )


def dropout_shift(evidence: Evidence) -> Tensor:
    """Variance under training conditions / variance under test conditions (C,).

    It is 1 for a channel that has no variance under one of them: such a channel shows nothing.
    """
    assert evidence.training is not None
    training, test = evidence.training.variance(), evidence.moments.variance()
    return torch.where((training > 0) & (test > 0), training / test, 1.0)


def pooled(
    context: PassContext, statistics: Statistics, tolerance: float | None, *, number: int = 1
) -> Estimate:
    """One pass: each batch is normalised with its own variance, and the variances are pooled.

    With a ``tolerance`` the pass ends as soon as the relative standard error is below it. ``number``
    is that of the pass, for the progress display.
    """
    first = DataPass(context, _pooling_rule(statistics), number, tolerance=tolerance).run()
    measured = _measured_statistics(context, first.evidence, statistics)
    return Estimate(
        measured, first, first.total.outliers, stopped_early=first.stopped_early, kept_outliers=first.kept
    )


def exact(context: PassContext, statistics: Statistics, tolerance: float | None) -> Estimate:
    """Damped fixed-point passes from `pooled` on, until a pass measures what it normalised with.

    In each pass the layers normalise with the current statistics, as the final network will. Later
    passes must see the samples of the first. Raises ModelError after 100 passes.
    """
    rule = _pooling_rule(statistics)
    first = last = DataPass(context, rule, tolerance=tolerance, same_samples=True).run()
    current = _measured_statistics(context, first.evidence, statistics)
    passes, residual = 1, None
    # The residual may rise on the way (on DenseNet-121 from 0.29 to 46 before it falls below
    # 1e-3). Each layer depends only on those before it, so the passes converge all the same.
    while residual is None or residual > _SETTLED:
        if passes >= _MAX_PASSES:
            raise ModelError(
                f"exact: after {passes} passes a running variance still changes by {residual:.2g} a pass. "
                + advise(
                    "Use --estimator pooled, or a larger --batch-size for a better start.",
                    "Use estimator='pooled', or larger batches for a better start.",
                )
            )
        for name, values in current.items():
            context.layers[name].current = values
        passes += 1
        last = DataPass(
            context, current_statistics, passes, first, same_samples=True, residual=residual
        ).run()
        targets = _measured_statistics(context, last.evidence, statistics)
        residual = _largest_change(context, targets)
        current = {name: _step(context.layers[name].current, targets[name]) for name in targets}
    return Estimate(
        current,
        last,
        first.total.outliers,
        passes,
        first.stopped_early,
        residual,
        kept_outliers=first.kept,
    )


def ema(context: PassContext, statistics: Statistics, momentum: float, epochs: int) -> Estimate:
    """The exponential moving average of batch statistics that training itself would keep.

    As in training, a layer that a forward runs several times is updated after each call.
    """
    calls: Counter[str] = Counter()

    def update(layer: Layer, batch: Moments) -> None:
        if batch.count < 2:  # PyTorch's training mode refuses such a batch
            return
        calls[layer.name] += 1
        mean = batch.mean if statistics == "mean+variance" else layer.current.mean
        layer.current = MeanVariance(
            torch.lerp(layer.current.mean, mean, momentum),
            torch.lerp(layer.current.variance, batch.variance(), momentum),
        )

    first = last = DataPass(context, batch_statistics, update=update).run()
    outliers = first.total.outliers
    for number in range(2, epochs + 1):
        last = DataPass(context, batch_statistics, number, first, update=update).run()
        names = {earlier.outlier.name for earlier in outliers}
        outliers += tuple(new for new in last.total.outliers if new.outlier.name not in names)
    averages = {name: context.layers[name].current for name in _reached_names(context, last.evidence)}
    batches = last.total.batches * epochs
    scales = {
        name: _moving_average_error(batches, max(1, calls[name]) / batches, momentum) for name in averages
    }
    return Estimate(averages, last, outliers, epochs, error_scale=scales, kept_outliers=first.kept)


def _moving_average_error(batches: int, calls: float, momentum: float) -> float:
    """The standard error of a moving average of batches, in units of that of their mean.

    Batch i of n has the weight m(1 − m)^(n − i), where pooling would give every batch 1/n. Several
    ``calls`` of a layer in a batch are worth one with a larger m.
    """
    kept = (1 - momentum) ** calls
    weights = (1 - kept) * kept ** torch.arange(batches, dtype=torch.float64)
    return float((batches * weights.square().sum()).sqrt() / weights.sum())


def _pooling_rule(statistics: Statistics) -> Rule:
    """What the pass of `pooled` normalises with: batch statistics, with the mean to be kept."""
    return batch_variance if statistics == "variance" else batch_statistics


def _measured_statistics(
    context: PassContext, evidence: Mapping[str, Evidence], statistics: Statistics
) -> dict[str, MeanVariance]:
    """What a pass says should be stored, by the names of the layers to rewrite.

    That is the unbiased variance beside the stored mean, or for "mean+variance" the population
    mean and biased variance of precise BN. Raises ModelError if the data reached no such layer.
    """
    measured = {}
    for name in _reached_names(context, evidence):
        moments = evidence[name].moments
        if statistics == "variance":
            measured[name] = MeanVariance(context.layers[name].stored.mean, moments.variance())
        else:
            measured[name] = MeanVariance(moments.mean, moments.variance(unbiased=False))
    _require_some(measured)
    return measured


def _require_some(statistics: Mapping[str, MeanVariance]) -> None:
    if not statistics:
        raise ModelError("the data reached none of the layers to rewrite, although the example input did.")


def _reached_names(context: PassContext, evidence: Mapping[str, Evidence]) -> list[str]:
    """Names of the layers to rewrite that the data reached; the others keep what they have."""
    layers = context.layers.values()
    return [layer.name for layer in layers if layer.rewritten and layer.name in evidence]


def _largest_change(context: PassContext, targets: Mapping[str, MeanVariance]) -> float:
    """The largest change of any layer, as the main process computes it.

    Processes on different machines may differ in the last bit, and must end after the same pass.
    """

    def largest() -> float:
        return max(_relative_change(context.layers[name], targets[name]) for name in targets)

    return context.team.first(largest)


def _relative_change(layer: Layer, target: MeanVariance) -> float:
    """Largest relative change of a variance, and of a mean in standard deviations."""
    # The floor keeps a dead channel, whose variance is zero, from 0 / 0.
    current, floor = layer.current, 1e-6 * layer.module.eps
    larger = torch.maximum(current.variance, target.variance).clamp_min(floor)
    variance = (current.variance - target.variance).abs() / larger
    mean = (current.mean - target.mean).abs() / larger.sqrt()
    return float(torch.maximum(variance, mean).max())


def _step(current: MeanVariance, target: MeanVariance) -> MeanVariance:
    """One damped step from the current statistics towards those that a pass measured with them."""
    return MeanVariance(
        torch.lerp(current.mean, target.mean, _DAMPING),
        _log_step(current.variance, target.variance),
    )


def _log_step(current: Tensor, target: Tensor) -> Tensor:
    """``current^(1 − d) · target^d`` with damping d; a zero has no logarithm and is replaced."""
    blended = torch.exp((1 - _DAMPING) * current.log() + _DAMPING * target.log())
    return torch.where((current > 0) & (target > 0), blended, target)
