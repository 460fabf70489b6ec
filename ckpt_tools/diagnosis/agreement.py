"""How well data agrees with the BN statistics of a trained model.

The running statistics of a checkpoint remember the inputs of its training. A channel's input is
described by mean and variance, m̂ and v̂ on the data, m and v as stored. Their distance is
√(Δ² + λ²/2) with Δ = (m̂ − m)/√(v + ε) and λ = ln((v̂ + ε)/(v + ε)): the length of a small step
between two normal distributions in Fisher's metric. It is cut off at 1, and averaged over the
channels of a layer, then over layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, force_eager, unwrap_model
from ckpt_tools.model.preserving import preserved_evaluation_mode
from ckpt_tools.model.randomness import seed_temporarily
from ckpt_tools.observation.finite import check_input
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.layer import Layer, batch_statistics, current_statistics
from ckpt_tools.observation.running import Runner
from ckpt_tools.observation.training_history import batches_seen, initial_weight, is_trained
from ckpt_tools.observation.training_mode import switch_dropout_on
from ckpt_tools.results import BatchNormLayer, Walk
from ckpt_tools.walker.declared_dropout import add_declared_dropout

Normalise = Literal["stored", "batch"]

CLEAR_WIN_RATIO = 0.8  # a candidate wins if its score is below this share of the next one's
_MIN_IMAGES = 2  # one image has no variance
_MEAN_OF_ABS_NORMAL = 0.8  # E|z| of z ~ N(0, 1), which is √(2/π) ≈ 0.80


@dataclass(frozen=True)
class LayerAgreement:
    """How well the inputs of one BN layer agree with its stored statistics.

    Attributes:
        name: the layer.
        channels: how many it has.
        distance: mean over the channels, 0–1.
        shift: |m̂ − m| in stored standard deviations, median over the channels.
        deviation: |ln(v̂/v)|, median over the channels; None where the variances cannot be
            compared, because the layer may lie behind dropout with an unknown rate.
        error: the distance that sampling so few images would make by itself.
    """

    name: str
    channels: int
    distance: float
    shift: float
    deviation: float | None
    error: float


@dataclass(frozen=True)
class Agreement:
    """How well data agrees with the stored statistics of a whole model.

    Attributes:
        layers: the layers that were compared, in order of execution.
        images: how many samples were compared.
        normalise: what the layers normalised by, as in ``measure_agreement``.
        score: the mean of the layers' distances, from 0 (perfect) to 1; None if no layer can serve.
        reason: why there is no score.
        batches: how many batches of training the layers have counted; None if none of them did.
    """

    layers: tuple[LayerAgreement, ...]
    images: int
    normalise: Normalise
    score: float | None
    reason: str = ""
    batches: int | None = None

    @property
    def error(self) -> float:
        """The score that sampling so few images would make by itself."""
        if not self.layers:
            return math.inf
        return sum(layer.error for layer in self.layers) / len(self.layers)

    @property
    def worst(self) -> LayerAgreement | None:
        """The layer that disagrees most."""
        return max(self.layers, key=lambda layer: layer.distance, default=None)


def measure_agreement(
    model: nn.Module,
    batches: Iterable[Batch],
    walk: Walk,
    *,
    rates_known: bool,
    forward: Forward = call_model,
    layers: int | None = None,
    normalise: Normalise = "stored",
    counted: bool = True,
    rows_are_samples: bool = False,
    seed: int = 0,
) -> Agreement:
    """Compare the inputs of BN layers under training conditions with what the layers have stored.

    Dropout is on if its rates are known. Else it is off, and layers that it may reach count with
    their means alone. They then normalise by the batch, so that nothing behind them inherits the
    difference. The model comes back as it was, and so do the random generators.

    Args:
        model: any nn.Module; wrappers are looked through.
        batches: as ``reestimate_bn`` takes them; read once.
        walk: of this model.
        rates_known: whether the model's drop rates are those of the training run.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        layers: how many layers to compare, from the first in order of execution; every forward ends
            at the last of them. None compares all.
        normalise: by "stored" statistics, as the final network does, differences add up from layer
            to layer. By those of the "batch", as in training, every layer is judged by itself.
        counted: whether the counters of the model's BN layers are those of the training run.
        rows_are_samples: whether batches may be halved where memory is short.
        seed: of dropout.

    Raises:
        DataError: NaN in a batch.
        ModelError: the model cannot run on a batch.
    """
    model = unwrap_model(model)
    usable = _usable_layers(model, walk, counted)[:layers]
    if not usable:
        return Agreement((), 0, normalise, None, _reason_without_layers(walk))
    measured_layers: list[Layer] = []
    means_only: set[str] = set()
    for walked, module in usable:
        # Without the noise of training, variances behind dropout differ on the very training data.
        if not rates_known and (walked.downstream_of or walked.potentially_downstream_of):
            means_only.add(walked.name)
        layer = Layer(walked.name, module, rewritten=True)
        by_batch = normalise == "batch" or walked.name in means_only
        layer.begin_pass(batch_statistics if by_batch else current_statistics)
        measured_layers.append(layer)
    interception = Interception(dropout=rates_known, containers=walk.containers_trained)
    runner = Runner(model, forward, interception, rows_are_samples=rows_are_samples)
    with (
        preserved_evaluation_mode(model, forward),
        seed_temporarily(seed),
        torch.no_grad(),
        force_eager(),
        ExitStack() as stack,
    ):
        if rates_known:
            switch_dropout_on(model, containers=walk.containers_trained)
            stack.callback(add_declared_dropout(model, walk.declared_dropout))
        images = sum(_run_batches(runner, batches, measured_layers, stop=layers is not None))
    # A layer of whose input there is a single value per channel shows no variance.
    reached_layers = [layer for layer in measured_layers if layer.moments and layer.moments.count > 1]
    return _summarise(reached_layers, means_only, images, normalise)


def best_candidate(agreements: Mapping[str, Agreement]) -> str | None:
    """Return the name whose statistics the data fits clearly best; None if there is no such name.

    The agreements are measured with ``normalise="batch"`` over all layers. If any candidate has no
    score, none wins; neither does a single one.
    """
    ranked = sorted(
        (agreement.score, name)
        for name, agreement in agreements.items()
        if agreement.score is not None and math.isfinite(agreement.score)
    )
    if len(ranked) < 2 or len(ranked) < len(agreements):
        return None
    (best, name), (second, _) = ranked[:2]
    return name if best < CLEAR_WIN_RATIO * second else None


def _usable_layers(model: nn.Module, walk: Walk, counted: bool) -> list[tuple[BatchNormLayer, _BatchNorm]]:
    """Return the layers that a forward reaches, and whose statistics come from training.

    They stand in order of execution, each with its module.
    """
    modules = dict(model.named_modules())
    layers = []
    for layer in walk.batch_norms:
        module = modules.get(layer.name)
        if layer.reached and isinstance(module, _BatchNorm) and is_trained(module, counted=counted):
            layers.append((layer, module))
    return layers


def _reason_without_layers(walk: Walk) -> str:
    if not any(layer.reached for layer in walk.batch_norms):
        return "a forward reaches no BN layer with running statistics"
    few = "the counters of the BN layers do not show enough training batches"
    return f"{few} to forget the initial statistics"


def _run_batches(
    runner: Runner, batches: Iterable[Batch], layers: Sequence[Layer], *, stop: bool
) -> Iterator[int]:
    """Run all batches through the model, and yield how many images each has held."""
    for number, batch in enumerate(batches):
        check_input(batch, number)
        for images in runner.run(batch, number, layers, stop=stop):
            for layer in layers:
                layer.end_batch()
            yield images


def _summarise(layers: Sequence[Layer], means_only: set[str], images: int, normalise: Normalise) -> Agreement:
    if not layers:
        return Agreement((), images, normalise, None, "the data reaches no BN layer")
    if images < _MIN_IMAGES:
        reason = f"{images} image(s) cannot show a variance"
        return Agreement((), images, normalise, None, reason)
    agreements = tuple(_compare_layer(layer, layer.name not in means_only) for layer in layers)
    score = sum(agreement.distance for agreement in agreements) / len(agreements)
    counts = [count for layer in layers if (count := batches_seen(layer.module))]
    return Agreement(agreements, images, normalise, score, batches=min(counts, default=None))


def _compare_layer(layer: Layer, compare_variance: bool) -> LayerAgreement:
    assert layer.moments is not None
    assert layer.evidence is not None
    # The stored variance of a dead channel may be nothing but what is left of the initial one.
    eps = layer.module.eps + 3 * initial_weight(layer.module)
    stored_variance, variance = layer.stored.variance + eps, layer.moments.variance() + eps
    shift = (layer.moments.mean - layer.stored.mean).abs() / stored_variance.sqrt()
    mean_error = layer.evidence.mean_error(layer.stored.mean)
    mean_error = mean_error / stored_variance.sqrt()
    deviation, variance_error = torch.zeros_like(shift), torch.zeros_like(shift)
    if compare_variance:
        deviation = (variance / stored_variance).log().abs()
        variance_error = layer.relative_error() * layer.moments.variance() / variance
    error = _MEAN_OF_ABS_NORMAL * _distance(mean_error, variance_error)
    return LayerAgreement(
        name=layer.name,
        channels=len(shift),
        distance=float(_distance(shift, deviation).mean()),
        shift=float(shift.nan_to_num(torch.inf).median()),
        deviation=float(deviation.nan_to_num(torch.inf).median()) if compare_variance else None,
        error=float(error.mean()),
    )


def _distance(shift: Tensor, deviation: Tensor) -> Tensor:
    # An overflow makes NaN or infinity, which is as far away as can be.
    return (shift.square() + deviation.square() / 2).sqrt().nan_to_num(1.0, 1.0).clamp(max=1.0)
