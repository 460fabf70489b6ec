"""How well data agrees with the BN statistics of a trained model: a checkpoint remembers its training inputs.

A channel's input is described by mean and variance, m̂ and v̂ on the data, m and v as stored. Their distance is
√(Δ² + λ²/2) with Δ = (m̂ − m)/√(v + ε) and λ = ln((v̂ + ε)/(v + ε)): the length of a small step between two normal
distributions in Fisher's metric. It is cut off at 1, and averaged over the channels of a layer, then over layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, force_eager, unwrap_model
from ckpt_tools.model.preserving import preserved_evaluation_mode
from ckpt_tools.model.randomness import seed_temporarily
from ckpt_tools.reestimate.controls import batches_seen, initial_weight, is_trained
from ckpt_tools.reestimate.finite import check_input
from ckpt_tools.reestimate.interception import Interception
from ckpt_tools.reestimate.layer import Layer, batch_statistics, current_statistics
from ckpt_tools.reestimate.running import Runner
from ckpt_tools.results import BatchNormLayer, Walk

Normalise = Literal["stored", "batch"]

CLEAR_WIN_RATIO = 0.8  # a candidate wins if its score is below this share of the next one's
_FEWEST = 2  # images


@dataclass(frozen=True)
class LayerAgreement:
    """One BN layer. ``distance`` is the mean over channels, in 0–1; the others are medians over channels.

    ``shift``: |m̂ − m| in stored standard deviations; ``deviation``: |ln(v̂/v)|, None where unknown dropout keeps
    the variance from being compared; ``error``: the distance that sampling these images alone would make.
    """

    name: str
    channels: int
    distance: float
    shift: float
    deviation: float | None
    error: float


@dataclass(frozen=True)
class Agreement:
    """All layers in order of execution, and the mean of their distances: 0 is perfect, 1 as far as it goes.

    ``score`` is None, with the ``reason``, where no layer can serve. ``batches``: how many the layers have counted in
    training, None where none did.
    """

    layers: tuple[LayerAgreement, ...]
    images: int
    normalise: Normalise
    score: float | None
    reason: str = ""
    batches: int | None = None

    @property
    def error(self) -> float:
        """The score that sampling these images alone would make."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else math.inf

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
    seed: int = 0,
) -> Agreement:
    """Compare the inputs of BN layers under training conditions with what the layers have stored.

    Dropout is on at its rates where they are known, else off; then layers that it may reach count with their
    means alone and normalise by the batch, so that nothing behind them inherits the difference. The model comes back
    as it was, and so do the random generators.

    Args:
        model: any nn.Module; wrappers are looked through.
        batches: as ``reestimate_bn`` takes them; read once.
        walk: of this model.
        rates_known: whether the model's drop rates are those of the training run.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        layers: end every forward at the first so many usable layers in order of execution; None: all.
        normalise: "stored" statistics, as in the final network: differences add up from layer to layer; or those of
            the "batch", as in training: every layer is judged by itself.
        counted: whether the counters of the model's BN layers are those of the training run.
        seed: of dropout.

    Raises:
        DataError: NaN in a batch, a batch of one value per channel.
        ModelError: the model cannot run on a batch.
    """
    model = unwrap_model(model)
    usable = _usable(model, walk, counted)[:layers]
    if not usable:
        return Agreement((), 0, normalise, None, _reason(walk))
    masked = {found.name for found in usable if not rates_known and _may_drop(found)}
    modules = dict(model.named_modules())
    observed: dict[str, Layer] = {}
    for found in usable:
        module = modules[found.name]
        assert isinstance(module, _BatchNorm)
        observed[found.name] = Layer(found.name, module, rewritten=True)
        by_batch = normalise == "batch" or found.name in masked
        observed[found.name].begin_pass(batch_statistics if by_batch else current_statistics)
    runner = Runner(model, forward, Interception(dropout=rates_known))
    with preserved_evaluation_mode(model, forward), seed_temporarily(seed), torch.no_grad(), force_eager():
        if rates_known:
            switch_dropout_on(model, containers=walk.containers_trained)
        images = sum(_run(runner, batches, list(observed.values()), stop=layers is not None))
    seen = {name: layer for name, layer in observed.items() if layer.moments is not None}
    return _summary(seen, masked, images, normalise)


def best_candidate(agreements: Mapping[str, Agreement]) -> str | None:
    """The name whose statistics the data fits clearly best; None if there is no such name.

    Measured with ``normalise="batch"`` over all layers; a candidate without a score cannot win, and a single one
    has won nothing.
    """
    ranked = sorted((a.score, name) for name, a in agreements.items() if a.score is not None and math.isfinite(a.score))
    if len(ranked) < 2 or len(ranked) < len(agreements):
        return None
    (best, name), (second, _) = ranked[:2]
    return name if best < CLEAR_WIN_RATIO * second else None


def _usable(model: nn.Module, walk: Walk, counted: bool) -> list[BatchNormLayer]:
    """Layers that a forward reaches, and whose statistics training has made, in order of execution."""
    modules = dict(model.named_modules())
    found = []
    for layer in walk.batch_norms:
        module = modules.get(layer.name)
        if layer.reached and isinstance(module, _BatchNorm) and is_trained(module, counted=counted):
            found.append(layer)
    return found


def _reason(walk: Walk) -> str:
    if not any(layer.reached for layer in walk.batch_norms):
        return "a forward reaches no BN layer with running statistics"
    return "the counters of the BN layers do not show enough training batches to forget the initial statistics"


def _may_drop(layer: BatchNormLayer) -> bool:
    return bool(layer.downstream_of or layer.potentially_downstream_of)


def _run(runner: Runner, batches: Iterable[Batch], layers: Sequence[Layer], *, stop: bool) -> Iterator[int]:
    """All batches through the model; how many images each held."""
    for number, batch in enumerate(batches):
        check_input(batch, number)
        for images in runner.run(batch, number, layers, stop=stop):
            for layer in layers:
                layer.end_batch()
            yield images


def _summary(seen: Mapping[str, Layer], masked: set[str], images: int, normalise: Normalise) -> Agreement:
    if not seen or images < _FEWEST:
        why = "the data reaches no BN layer" if not seen else f"{images} image(s) cannot show a variance"
        return Agreement((), images, normalise, None, why)
    layers = tuple(_compare_layer(layer, variance=name not in masked) for name, layer in seen.items())
    score = sum(layer.distance for layer in layers) / len(layers)
    counts = [count for layer in seen.values() if (count := batches_seen(layer.module))]
    return Agreement(layers, images, normalise, score, batches=min(counts, default=None))


def _compare_layer(layer: Layer, *, variance: bool) -> LayerAgreement:
    assert layer.moments is not None
    assert layer.clusters is not None
    # Of a dead channel, the rest of the initial variance may be all there is.
    eps = layer.module.eps + 3 * initial_weight(layer.module)
    there, here = layer.stored.variance + eps, layer.moments.variance() + eps
    shift = (layer.moments.mean - layer.stored.mean).abs() / there.sqrt()
    deviation = (here / there).log().abs() if variance else torch.zeros_like(shift)
    mean_error = layer.clusters.mean_error(layer.moments, layer.stored.mean) / there.sqrt()
    variance_error = layer.relative_error() * layer.moments.variance() / here
    # 0.8: the mean of |z|; NaN and infinity (an overflow) are as far as it goes.
    error = 0.8 * _distance(mean_error, variance_error if variance else torch.zeros_like(shift))
    return LayerAgreement(
        name=layer.name,
        channels=len(shift),
        distance=float(_distance(shift, deviation).mean()),
        shift=float(shift.nan_to_num(torch.inf).median()),
        deviation=float(deviation.nan_to_num(torch.inf).median()) if variance else None,
        error=float(error.mean()),
    )


def _distance(shift: Tensor, deviation: Tensor) -> Tensor:
    return (shift.square() + deviation.square() / 2).sqrt().nan_to_num(1.0, 1.0).clamp(max=1.0)


def switch_dropout_on(model: nn.Module, *, containers: bool) -> None:
    """Training mode for all but BN layers; with ``containers=False`` for leaf modules only.

    Flags are set one by one, and whoever calls this restores them.
    """
    for module in model.modules():
        leaf = not any(True for _ in module.children())
        if not isinstance(module, _BatchNorm) and (containers or leaf):
            module.training = True
