"""What the passes left behind, summarised: a result for every layer, and the verdict of the control layers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.errors import CheckFailed
from ckpt_tools.reestimate.choice import Choice
from ckpt_tools.reestimate.layer import Layer
from ckpt_tools.results import BatchNormLayer, Controls, LayerResult, Spread, Walk

DISAGREEMENT = math.log(2)  # a typical control channel off by a factor of two
SHIFT = 0.5  # or its mean by half a standard deviation
JUDGED = 3  # control layers, the first ones: behind them an unfinished training's own drift adds up to as much
_FORGOTTEN = 0.01  # weight that the initial variance of 1 may still have in a control's running average


def layer_results(walk: Walk, choice: Choice, layers: dict[str, Layer], error_scale: float) -> tuple[LayerResult, ...]:
    """One result for every BN layer of the walk, in its order."""
    return tuple(_result(found, choice, layers.get(found.name), error_scale) for found in walk.batch_norms)


def _result(found: BatchNormLayer, choice: Choice, layer: Layer | None, error_scale: float) -> LayerResult:
    measured = layer is not None and layer.moments is not None
    rewritten = measured and found.name in choice.rewrite
    ratio = error = None
    if layer is not None and layer.moments is not None:
        new = layer.scale.variance if rewritten else layer.moments.variance()
        floor = 1e-3 * layer.module.eps
        # A dead channel's ratio means nothing; it is left out unless all are dead.
        alive = new > floor if bool((new > floor).any()) else torch.ones_like(new, dtype=torch.bool)
        ratio = spread(((layer.stored.variance + floor) / (new + floor))[alive])
        error = spread((layer.relative_error() * error_scale)[alive])
    return LayerResult(
        name=found.name,
        channels=found.channels,
        rewritten=rewritten,
        reason=_reason(found, choice, measured),
        downstream_of=found.downstream_of,
        control=found.name in choice.controls,
        ratio=ratio,
        error=error,
    )


def _reason(found: BatchNormLayer, choice: Choice, measured: bool) -> str:
    if not found.reached:
        return "never reached by an evaluation forward"
    if found.name in choice.rewrite:
        if not measured:
            return "never reached by the data"
        return "behind dropout" if found.downstream_of else "rewritten with all layers"
    return "control: no active dropout reaches it"


def spread(values: Tensor) -> Spread:
    """Median, minimum and maximum over channels."""
    return Spread(float(values.median()), float(values.min()), float(values.max()))


def judge_controls(choice: Choice, layers: dict[str, Layer]) -> Controls:
    """Compare stored and measured variance of the layers that no dropout reaches.

    Layers whose stored variance is still largely its initial value cannot serve. The first three that can decide:
    behind them, what the weights of an unfinished training have moved since the statistics were taken adds up.
    """
    usable = {name: layers[name] for name in layers if name in choice.controls and trained(layers[name].module)}
    usable = {name: layer for name, layer in usable.items() if layer.moments is not None}
    if not usable:
        why = "every BN layer is behind dropout" if not choice.controls else _UNTRAINED
        return Controls((), None, None, None, "none", why)
    judged = list(usable.values())[:JUDGED]
    noise = _typical(layer.relative_error() for layer in judged)
    if math.isinf(noise):
        return Controls((), None, None, None, "none", "from one sample nobody can tell")
    deviation, shift = _typical(map(_deviation, judged)), _typical(map(_shift, judged))
    worst = max(float(_deviation(layer).median()) for layer in usable.values())
    apart = deviation > DISAGREEMENT + 3 * noise or shift > SHIFT + 3 * _typical(map(_shift_error, judged))
    return Controls(tuple(usable), deviation, worst, shift, "disagree" if apart else "agree")


def _typical(values: Iterable[Tensor]) -> float:
    return float(torch.cat(list(values)).median())


_UNTRAINED = "the counters of the control layers do not show enough training batches to forget the initial variance"


def trained(module: _BatchNorm, *, counted: bool = True) -> bool:
    """Whether training has made this layer's statistics: the initial ones have no weight left in them.

    ``counted`` False: the file had no counters, and those of the module say nothing.
    """
    if not counted:
        assert module.running_mean is not None
        assert module.running_var is not None
        return bool((module.running_mean != 0).any()) or bool((module.running_var != 1).any())
    return batches_seen(module) > 0 and initial_weight(module) < _FORGOTTEN


def initial_weight(module: _BatchNorm) -> float:
    """The weight that the initial mean 0 and variance 1 still have in the running statistics; 0 if nobody counted."""
    batches = batches_seen(module)
    return (1 - module.momentum) ** batches if batches and module.momentum is not None else 0.0


def batches_seen(module: _BatchNorm) -> int:
    """How many batches a layer has counted in training; 0 if it did not count."""
    return 0 if module.num_batches_tracked is None else int(module.num_batches_tracked)


def _deviation(layer: Layer) -> Tensor:
    """|ln(stored / measured)| (C,), blind to differences far below the layer's eps."""
    assert layer.moments is not None
    eps = layer.module.eps
    return ((layer.stored.variance + eps) / (layer.moments.variance() + eps)).log().abs()


def _shift(layer: Layer) -> Tensor:
    """|measured mean − running mean| (C,) in stored standard deviations."""
    assert layer.moments is not None
    return (layer.moments.mean - layer.stored.mean).abs() / (layer.stored.variance + layer.module.eps).sqrt()


def _shift_error(layer: Layer) -> Tensor:
    assert layer.moments is not None
    assert layer.clusters is not None
    error = layer.clusters.mean_error(layer.moments, layer.stored.mean)
    return error / (layer.stored.variance + layer.module.eps).sqrt()


def refuse_disagreement(controls: Controls) -> None:
    """Raise CheckFailed if the control layers say that these are not the training data."""
    if controls.verdict != "disagree" or controls.deviation is None or controls.shift is None:
        return
    factor = math.exp(controls.deviation)
    judged = f"the first {min(JUDGED, len(controls.names))} of {len(controls.names)} control layer(s)"
    raise CheckFailed(
        f"the data does not look like the training data: in the median channel of {judged} that no dropout reaches "
        f"(from {controls.names[0]} on), the stored variance is off by a factor of "
        f"{factor:.3g} and the running mean by {controls.shift:.2g} standard deviations; expected less than 2 and "
        f"{SHIFT}. Check --data and the preprocessing (--mean, --std, --input-size), "
        "or pass --force (force=True) to go on."
    )
