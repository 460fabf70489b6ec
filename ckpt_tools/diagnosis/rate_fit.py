"""At which drop rates do the stored statistics describe the data?

A state dict does not hold drop rates, but its running variances depend on them: they were measured
with dropout on. So the variances are measured under training conditions at trial rates, and the
rates fit where the mean over channels of |ln(stored variance / measured variance)| is smallest.

Compared on 15 small nets that were trained on the digits, this mean finds the rate better than the
median of the channels or the difference from layers without dropout: training augmentation changes
variances by other factors in each layer, which average out, while the control layers, which stand
first, show far more of it than the layers behind dropout.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.batch import Batch, batch_size
from ckpt_tools.model.calling import Forward, call_model, force_eager
from ckpt_tools.model.preserving import preserve_models
from ckpt_tools.model.randomness import seed_random_generators
from ckpt_tools.observation.finite import check_input
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.layer import Layer, batch_statistics
from ckpt_tools.observation.running import Runner
from ckpt_tools.observation.training_history import initial_weight, is_trained
from ckpt_tools.observation.training_mode import copy_in_training_mode
from ckpt_tools.results import Walk

Rates = Mapping[str, float]

# Dropout of whole paths needs that many: with 256 the error is half as large again.
SAMPLES, BATCH_SIZE = 512, 64  # of every trial; batches as large as those of a training
_FEWEST_SAMPLES = 32
_COARSE_RATES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.65)
_FINE_STEP = 0.05  # around the best of the coarse rates
_RESOLUTION = 0.005  # of the interpolation between trial rates
_LARGEST_ERROR = 0.05  # of a clear estimate
_ZERO = 0.025  # a smaller estimate is none: such rates change variances less than sampling does
_WORST_SCORE = 0.5  # where stored and measured variances differ by more, they are not comparable
_LAYER_GROUPS = 8  # of the jackknife over layers
_ROUNDS = 2  # over several rates, each fitted while the others stay


@dataclass(frozen=True)
class RateFit:
    """The drop rates at which the stored statistics fit the data best.

    Attributes:
        rates: by the keyword argument of the constructor.
        errors: their standard errors, from how samples and layers scatter.
        is_clear: whether the minimum says something. A clear rate of 0 says that training had no
            dropout in front of BN layers.
        score: mean over channels of |ln(stored / measured variance)| at these rates.
        score_at_zero: the same without dropout.
        samples: how many were measured.
        layers: how many BN layers were compared.
    """

    rates: Mapping[str, float]
    errors: Mapping[str, float]
    is_clear: bool
    score: float
    score_at_zero: float
    samples: int
    layers: int

    @property
    def is_zero(self) -> bool:
        """Whether no dropout fits best."""
        return not any(self.rates.values())

    @property
    def sentence(self) -> str:
        """The result in words, with the numbers that it rests on."""
        values = {
            name: f"{rate:.2f} ± {self.errors.get(name, math.nan):.2f}" for name, rate in self.rates.items()
        }
        if len(values) == 1:
            [(name, fitted)] = values.items()
            subject = name.replace("_", " ")
        else:
            subject = "drop rates"
            fitted = ", ".join(f"{name} {value}" for name, value in values.items())
        if not self.is_clear:
            return f"{subject} not recorded; the statistics show no clear rate ({fitted} fits best)"
        numbers = f"{self.samples} samples, {self.layers} BN layers"
        return f"{subject} not recorded; the statistics fit {fitted} ({numbers})"


def fit_rates(
    make_model: Callable[[Rates], nn.Module],
    names: Sequence[str],
    batches: Iterable[Batch],
    walk: Walk,
    *,
    forward: Forward = call_model,
    frozen: Collection[str] = (),
    counted: bool = True,
    rows_are_samples: bool = False,
    seed: int = 0,
) -> RateFit | None:
    """Find the drop rates at which the stored BN statistics fit the data best.

    Every trial draws dropout from the same seed, so that the score is smooth in the rates. With
    several names each rate is fitted in turn while the others stay.

    Args:
        make_model: builds the model with the stored statistics at the rates that it is given by
            name, on the device that it shall run on; it is called some ten times for each name.
        names: of the rates.
        batches: as ``reestimate_bn`` takes them. The first 512 samples are used.
        walk: of this model; noise at any rate can reach the layers that it calls downstream or
            potentially downstream.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        frozen: names of BN layers that training left in evaluation mode. They normalise with their
            stored statistics, and nothing is compared there.
        counted: whether the counters of the model's BN layers are those of the training run.
        rows_are_samples: whether batches may be halved where memory is short.
        seed: of dropout.

    Returns:
        None where nothing can be compared: too few samples, no trained layer behind dropout, or no
        trial rate that changes anything.

    Raises:
        DataError: NaN in a batch.
        ModelError: the model cannot run on a batch.
    """
    parts = _take_batches(batches)
    samples = sum(map(batch_size, parts))
    noisy_layers = [
        layer.name
        for layer in walk.batch_norms
        if layer.reached and (layer.downstream_of or layer.potentially_downstream_of)
    ]
    if samples < _FEWEST_SAMPLES or not noisy_layers or not names:
        return None
    trials = _Trials(
        make_model,
        parts,
        noisy_layers,
        walk.containers_trained,
        forward,
        frozen,
        counted,
        rows_are_samples,
        seed,
    )
    best = dict.fromkeys(names, 0.0)
    estimates: dict[str, _Estimate] = {}
    for _ in range(_ROUNDS if len(names) > 1 else 1):
        for name in names:
            estimate = _fit_one_rate(trials, best, name)
            if estimate is None:
                return None
            best[name], estimates[name] = estimate.rate, estimate
    return _summarise(trials, estimates, samples)


@dataclass(frozen=True)
class _Estimate:
    rate: float
    error: float
    is_clear: bool


@dataclass(frozen=True)
class _Trial:
    """What was measured at one choice of rates.

    ``variances`` (parts, channels) are those under training conditions in each part of the samples,
    of all compared layers one after the other. ``stored`` (channels,) are those of the checkpoint.
    Both contain what BN adds to a variance. ``layers`` (channels,) is the number of each channel's
    layer.
    """

    variances: Tensor
    stored: Tensor
    layers: Tensor

    def residual(self, part: int | None = None) -> Tensor:
        """ln(stored / measured variance) of each channel (channels,), of one part or of all.

        Variances are averaged over parts, as training averages those of its batches.
        """
        measured = self.variances.mean(0) if part is None else self.variances[part]
        return (self.stored / measured).log()


class _Trials:
    """Measures at trial rates, once at each."""

    def __init__(
        self,
        make_model: Callable[[Rates], nn.Module],
        parts: Sequence[Batch],
        noisy_layers: Sequence[str],
        containers_trained: bool,
        forward: Forward,
        frozen: Collection[str],
        counted: bool,
        rows_are_samples: bool,
        seed: int,
    ) -> None:
        self._make_model, self._parts, self._noisy_layers = make_model, parts, noisy_layers
        self._containers_trained, self._forward = containers_trained, forward
        self._frozen, self._counted, self._seed = frozen, counted, seed
        self._rows_are_samples = rows_are_samples
        self._trials: dict[tuple[float, ...], _Trial | None] = {}

    def at(self, rates: Rates) -> _Trial | None:
        """What these rates show, measured now or before; None if no layer can be compared."""
        key = tuple(round(rate, 6) for rate in rates.values())
        if key not in self._trials:
            self._trials[key] = self._measure(dict(zip(rates, key, strict=True)))
        return self._trials[key]

    def _measure(self, rates: Rates) -> _Trial | None:
        model = copy_in_training_mode(self._make_model(rates), containers=self._containers_trained)
        layers: dict[str, Layer] = {}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_var is not None and name not in self._frozen:
                layers[name] = Layer(name, module, rewritten=True)
        compared = [
            layers[name]
            for name in self._noisy_layers
            if name in layers and is_trained(layers[name].module, counted=self._counted)
        ]
        if not compared:
            return None
        interception = Interception(dropout=True, containers=self._containers_trained)
        runner = Runner(model, self._forward, interception, rows_are_samples=self._rows_are_samples)
        variances = []
        with preserve_models(self._forward), torch.no_grad(), force_eager():
            seed_random_generators(self._seed)
            for number, part in enumerate(self._parts):
                for layer in layers.values():
                    layer.begin_pass(batch_statistics)
                for _ in runner.run(part, number, list(layers.values())):
                    for layer in layers.values():
                        layer.end_batch()
                variances.append(torch.cat([_variance(layer) for layer in compared]))
        stored = torch.cat([layer.stored.variance + _added_variance(layer) for layer in compared])
        numbers = [torch.full_like(layer.stored.variance, i) for i, layer in enumerate(compared)]
        return _Trial(torch.stack(variances).cpu(), stored.cpu(), torch.cat(numbers).cpu())


def _added_variance(layer: Layer) -> float:
    # The stored variance of a dead channel may be nothing but what is left of the initial one.
    return layer.module.eps + 3 * initial_weight(layer.module)


def _variance(layer: Layer) -> Tensor:
    if layer.moments is None or layer.moments.count < 2:  # the batch shows no variance of this layer
        return torch.full_like(layer.stored.variance, torch.nan)
    return layer.moments.variance() + _added_variance(layer)


def _take_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The first batches that together hold enough samples. They are not cut."""
    parts: list[Batch] = []
    for number, batch in enumerate(batches):
        check_input(batch, number)
        parts.append(batch)
        if sum(map(batch_size, parts)) >= SAMPLES:
            break
    # A much smaller last batch would count as much as the others.
    largest = max(map(batch_size, parts), default=0)
    return [part for part in parts if 2 * batch_size(part) > largest]


def _fit_one_rate(trials: _Trials, rates: Rates, name: str) -> _Estimate | None:
    """Find the best rate under one name, and its error; None if nothing can be compared."""
    points = list(_COARSE_RATES)
    curve = _measure_curve(trials, rates, name, points)
    if curve is None:
        return None
    best = _best_rate(points, _residuals(curve))
    refined = {max(0.0, best - _FINE_STEP), best, min(best + _FINE_STEP, points[-1])}
    points = sorted({*points, *(round(rate, 3) for rate in refined)})
    curve = _measure_curve(trials, rates, name, points)
    assert curve is not None
    residuals = _residuals(curve)
    best = _best_rate(points, residuals)
    error = math.hypot(_RESOLUTION, _error_of_samples(points, curve), _error_of_layers(points, curve))
    score = float(_scores(points, residuals).min())
    comparable = error <= _LARGEST_ERROR and score <= _WORST_SCORE
    if best <= _ZERO:
        return _Estimate(0.0, error, comparable)
    is_clear = comparable and best > 2 * error and best < points[-1]
    return _Estimate(best, error, is_clear)


def _measure_curve(trials: _Trials, rates: Rates, name: str, points: Sequence[float]) -> list[_Trial] | None:
    """The trials at each of the points; None if no layer can be compared or no rate matters."""
    curve = [trial for rate in points if (trial := trials.at({**rates, name: rate})) is not None]
    if len(curve) < len(points):
        return None
    change = (curve[-1].residual() - curve[0].residual()).abs().nan_to_num(0.0).max()
    return curve if float(change) > 0 else None


def _residuals(curve: Sequence[_Trial], part: int | None = None) -> Tensor:
    """ln(stored / measured variance) at each point of a curve: (points, channels)."""
    residuals = torch.stack([trial.residual(part) for trial in curve])
    # A channel that some trial did not reach, or that is constant, cannot be compared.
    return residuals[:, residuals.isfinite().all(0)]


def _fine_rates(points: Sequence[float]) -> Tensor:
    return torch.arange(0.0, points[-1] + _RESOLUTION / 2, _RESOLUTION, dtype=torch.float64)


def _scores(points: Sequence[float], residuals: Tensor) -> Tensor:
    """The mean of |residual| over channels, at rates in steps of the resolution.

    Between trial rates the residual of each channel is interpolated. Its absolute value has a kink
    where the rate fits, which an interpolation of the scores would miss.
    """
    fine, known = _fine_rates(points), torch.tensor(points, dtype=torch.float64)
    upper = torch.searchsorted(known, fine).clamp(1, len(points) - 1)
    share = ((fine - known[upper - 1]) / (known[upper] - known[upper - 1]))[:, None]
    return torch.lerp(residuals[upper - 1], residuals[upper], share).abs().mean(1)


def _best_rate(points: Sequence[float], residuals: Tensor) -> float:
    return float(_fine_rates(points)[_scores(points, residuals).argmin()])


def _error_of_samples(points: Sequence[float], curve: Sequence[_Trial]) -> float:
    """The standard error of the best rate, from how it scatters between parts of the samples."""
    parts = len(curve[0].variances)
    if parts < 2:
        return 0.0
    best = [_best_rate(points, _residuals(curve, part)) for part in range(parts)]
    return statistics.stdev(best) / math.sqrt(parts)


def _error_of_layers(points: Sequence[float], curve: Sequence[_Trial]) -> float:
    """The standard error from what layers contribute: a jackknife that leaves out groups of them.

    It contains the noise of the stored statistics and what training augmentation has changed, which
    no number of samples averages out. Neighbouring layers share both, so they form groups.
    """
    layers = curve[0].layers
    count = int(layers.max()) + 1
    groups = min(count, _LAYER_GROUPS)
    if groups < 2:
        return 0.0
    residuals = torch.stack([trial.residual() for trial in curve])
    usable, group = residuals.isfinite().all(0), (layers * groups / count).floor()
    best = [_best_rate(points, residuals[:, usable & (group != left_out)]) for left_out in range(groups)]
    return math.sqrt((groups - 1) * statistics.pvariance(best))


def _summarise(trials: _Trials, estimates: Mapping[str, _Estimate], samples: int) -> RateFit:
    rates = {name: estimate.rate for name, estimate in estimates.items()}
    best, zero = trials.at(rates), trials.at(dict.fromkeys(rates, 0.0))
    assert best is not None
    assert zero is not None
    return RateFit(
        rates=rates,
        errors={name: estimate.error for name, estimate in estimates.items()},
        is_clear=all(estimate.is_clear for estimate in estimates.values()),
        score=_mean_residual(best),
        score_at_zero=_mean_residual(zero),
        samples=samples,
        layers=int(best.layers.max()) + 1,
    )


def _mean_residual(trial: _Trial) -> float:
    residual = trial.residual()
    return float(residual[residual.isfinite()].abs().mean())
