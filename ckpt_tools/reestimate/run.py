"""The re-estimation of BN running variances with dropout off: one pass or several, one result."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.contract import Estimator, LayerChoice, Rates, Reestimation, Statistics, Walk
from ckpt_tools.errors import DataError, ModelError, UsageError
from ckpt_tools.moments import Moments
from ckpt_tools.reestimate.choice import Choice, choose
from ckpt_tools.reestimate.layer import (
    Interception,
    Layer,
    Rule,
    Scale,
    batch_only,
    kept_mean,
    log_step,
    stored,
)
from ckpt_tools.reestimate.outcome import judge_controls, layer_results, refuse_disagreement
from ckpt_tools.reestimate.stopping import Progress, enough, error_bound
from ckpt_tools.walker.call import Batch, Forward, batch_size, call, input_tensors, to_device, unwrap
from ckpt_tools.walker.downstream import walk as walk_model

SETTLED = 1e-4  # `exact`: largest relative change per pass; the fixed point is then known to 1e-3
DAMPING = 0.7  # weight of the new value in a log-space step; undamped passes diverge
MOST_PASSES = 100


def reestimate_bn(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    estimator: Estimator = "pooled",
    layers: LayerChoice = "auto",
    statistics: Statistics = "variance",
    tolerance: float | None = None,
    momentum: float = 0.1,
    epochs: int = 1,
    rates: Rates = "model",
    forward: Forward = call,
    walk: Walk | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Reestimation:
    """Re-estimate the running variances of BN layers with dropout off (Hendrycks & Gimpel 2016, section 3).

    The model is run in evaluation mode without gradients on the device it is on. When it returns, only the
    chosen ``running_var`` buffers (with ``statistics="mean+variance"`` also ``running_mean``) have changed; when
    it raises, nothing has.

    Args:
        model: any nn.Module; DataParallel, DDP and torch.compile wrappers are looked through.
        batches: an iterable of tensors, of tuples or lists whose first item is the input, or of dicts for
            ``model(**batch)``. `exact` and ``epochs > 1`` iterate over it several times.
        estimator: "pooled": one pass, each batch normalised with its own variance around the kept mean, variances
            pooled within and between batches, unbiased, (C,). "exact": continues with damped passes until each
            stored variance is that of the layer's input in the final network, to 1e-3 relative.
            "ema": exponential moving average of batch variances, as the paper's authors ran it.
        layers: "auto" (behind active dropout; every layer if the rates are unknown), "downstream", "all".
        statistics: "variance", or "mean+variance": precise BN (Wu & Johnson 2021, arXiv:2105.07576),
            population mean and biased variance.
        tolerance: stop when the 95th percentile over channels of the relative standard error is below it in
            every rewritten layer, after at least 128 images. None: read everything.
        momentum, epochs: of "ema".
        rates: who knows the drop rates; "model" takes the module's own as known.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        walk: the result of ``ckpt_tools.walk``, to save a second one.
        force: go on although control layers disagree with the data.
        progress: called after every batch.

    Raises:
        NothingToDo: no BN layer, or none behind dropout.
        CheckFailed: control layers show that these are not the training data (``force`` overrides).
        DataError: no batch, a batch of one value per channel, NaN in a batch.
        ModelError: NaN in the model, a model that cannot be run.
    """
    started = time.perf_counter()
    _check_arguments(batches, estimator, tolerance, momentum, epochs)
    model = unwrap(model)
    first, source = _peek(batches)
    if walk is None:
        walk = walk_model(model, first, forward=forward)
    choice = choose(walk, layers, rates=rates, statistics=statistics)
    run = _Run(model, source, forward, _observed(model, walk, choice), progress)
    with _evaluating(model), torch.no_grad():
        run.estimate(estimator, statistics, tolerance, momentum, epochs)
    results = layer_results(walk, choice, run.layers, run.error_scale)
    controls = judge_controls(choice, run.layers)
    if not force:
        refuse_disagreement(controls)
    _write(run.layers, statistics)
    return Reestimation(
        layers=results,
        controls=controls,
        why=choice.why,
        estimator=estimator,
        statistics=statistics,
        images=run.images,
        batches=run.batches,
        passes=run.passes,
        residual=run.residual,
        stopped_early=run.stopped_early,
        seconds=time.perf_counter() - started,
        device=str(_device(model)),
        left_alone=walk.left_alone,
    )


@dataclass
class _Run:
    """The passes over the data, and what they leave in ``layers``."""

    model: nn.Module
    source: Iterable[Batch]
    forward: Forward
    layers: dict[str, Layer]
    progress: Callable[[Progress], None] | None
    images: int = 0
    batches: int = 0
    passes: int = 0
    residual: float | None = None
    stopped_early: bool = False
    error_scale: float = 1.0  # standard error of the estimate / that of the pooled variance

    def estimate(
        self, estimator: Estimator, statistics: Statistics, tolerance: float | None, momentum: float, epochs: int
    ) -> None:
        if estimator == "ema":
            self._moving_average(statistics, momentum, epochs)
            return
        rule = kept_mean if statistics == "variance" else batch_only
        self._sweep(rule, tolerance)
        for layer in self._chosen():
            layer.scale = _measured(layer, statistics)
        if estimator == "exact":
            self._settle(statistics)

    def _chosen(self) -> list[Layer]:
        """Rewritten layers that the data reached; the others keep what they have."""
        return [layer for layer in self.layers.values() if layer.rewritten and layer.moments is not None]

    def _settle(self, statistics: Statistics) -> None:
        """Damped fixed-point passes. The residual may rise on the way: the system is triangular, so it ends."""
        while self.residual is None or self.residual > SETTLED:
            if self.passes >= MOST_PASSES:
                raise ModelError(
                    f"exact: after {self.passes} passes a running variance still changes by {self.residual:.2g} a "
                    "pass. Use --estimator pooled, or a larger --batch-size for a better start."
                )
            self._sweep(stored, None)
            targets = {layer.name: _measured(layer, statistics) for layer in self._chosen()}
            self.residual = max(_change(layer, targets[layer.name]) for layer in self._chosen())
            for layer in self._chosen():
                layer.scale = _step(layer.scale, targets[layer.name])

    def _moving_average(self, statistics: Statistics, momentum: float, epochs: int) -> None:
        def update(layer: Layer, batch: Moments) -> None:
            mean = batch.mean if statistics == "mean+variance" else layer.scale.mean
            layer.scale = Scale(
                torch.lerp(layer.scale.mean, mean, momentum),
                torch.lerp(layer.scale.variance, batch.variance(), momentum),
            )

        for _ in range(epochs):
            self._sweep(batch_only, None, update)
        steps = self.batches * epochs
        weights = momentum * (1 - momentum) ** torch.arange(steps, dtype=torch.float64)
        self.error_scale = float((steps * weights.square().sum()).sqrt() / weights.sum())

    def _sweep(
        self, rule: Rule, tolerance: float | None, update: Callable[[Layer, Moments], None] | None = None
    ) -> None:
        """One pass over the data. Later passes take as many batches as the first one did."""
        self.passes += 1
        for layer in self.layers.values():
            layer.begin_pass(rule)
        images = batches = 0
        interception = Interception(self.layers)
        device = _device(self.model)
        for batch in itertools.islice(self.source, self.batches or None):
            _check_finite_input(batch, batches)
            interception.images = batch_size(batch)
            with interception:
                self._forward(to_device(batch, device), batches)
            seen = {name: layer.end_batch() for name, layer in self.layers.items()}
            _check_finite(self.model, seen, batches)
            for name, moments in seen.items():
                if update is not None and moments is not None and self.layers[name].rewritten:
                    update(self.layers[name], moments)
            images, batches = images + interception.images, batches + 1
            bound = error_bound(self.layers.values())
            if self.progress is not None:
                self.progress(Progress(self.passes, images, bound, self.residual))
            if enough(bound, images, tolerance):
                self.stopped_early = True
                break
        self._after_sweep(images, batches)

    def _forward(self, batch: Batch, number: int) -> None:
        try:
            self.forward(self.model, batch)
        except RuntimeError as error:
            raise ModelError(
                f"batch {number}: the model cannot run on it: {error}. Check the input's shape and the device."
            ) from error

    def _after_sweep(self, images: int, batches: int) -> None:
        if self.batches and batches != self.batches:
            raise DataError(
                f"pass {self.passes} gave {batches} batches, the first one {self.batches}; `exact` and epochs > 1 "
                "need an iterable that can be read again, such as a list or a DataLoader."
            )
        self.images, self.batches = images, batches


def _check_arguments(
    batches: Iterable[Batch], estimator: str, tolerance: float | None, momentum: float, epochs: int
) -> None:
    if tolerance is not None and not (0 < tolerance < 1 and estimator != "ema"):
        raise UsageError(f"tolerance={tolerance}: expected a relative error in (0, 1) and not the ema estimator.")
    if not 0 < momentum <= 1:
        raise UsageError(f"momentum={momentum}: expected a number in (0, 1].")
    if epochs < 1:
        raise UsageError(f"epochs={epochs}: expected at least 1.")
    if isinstance(batches, Iterator) and (estimator == "exact" or epochs > 1):
        raise UsageError(
            f"estimator {estimator!r} reads the data several times, but batches is a one-shot iterator "
            f"({type(batches).__name__}). Pass a list or a DataLoader."
        )


def _peek(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and an iterable that still has all of them."""
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError("no batch of training data; expected at least one.") from None
    return first, itertools.chain([first], iterator) if iterator is batches else batches


def _observed(model: nn.Module, walk: Walk, choice: Choice) -> dict[str, Layer]:
    modules = dict(model.named_modules())
    observed = {}
    for layer in walk.batch_norms:
        if layer.name in choice.rewrite or layer.name in choice.controls:
            module = modules[layer.name]
            assert isinstance(module, _BatchNorm)
            observed[layer.name] = Layer(layer.name, module, rewritten=layer.name in choice.rewrite)
    return observed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module; afterwards each one's train flag is as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _measured(layer: Layer, statistics: Statistics) -> Scale:
    """What the last pass says should be stored: unbiased variance, or precise BN's population statistics."""
    moments = layer.moments
    assert moments is not None
    if statistics == "variance":
        return Scale(layer.stored.mean, moments.variance())
    return Scale(moments.mean, moments.variance(unbiased=False))


def _step(current: Scale, target: Scale) -> Scale:
    return Scale(
        torch.lerp(current.mean, target.mean, DAMPING),
        log_step(current.variance, target.variance, DAMPING),
    )


def _change(layer: Layer, target: Scale) -> float:
    """Largest relative change of a variance, and of a mean in standard deviations."""
    current, floor = layer.scale, 1e-6 * layer.module.eps
    larger = torch.maximum(current.variance, target.variance).clamp_min(floor)
    variance = (current.variance - target.variance).abs() / larger
    mean = (current.mean - target.mean).abs() / larger.sqrt()
    return float(torch.maximum(variance, mean).max())


def _write(layers: dict[str, Layer], statistics: Statistics) -> None:
    for layer in layers.values():
        if layer.rewritten and layer.moments is not None:
            _copy(layer.module.running_var, layer.scale.variance)
            if statistics == "mean+variance":
                _copy(layer.module.running_mean, layer.scale.mean)


def _copy(buffer: Tensor | None, value: Tensor) -> None:
    assert buffer is not None
    with torch.no_grad():
        buffer.copy_(value)


def _device(model: nn.Module) -> torch.device:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _check_finite_input(batch: Batch, number: int) -> None:
    for tensor in input_tensors(batch):
        if not bool(torch.isfinite(tensor).all()):
            bad = (~torch.isfinite(tensor.flatten(1))).any(1).nonzero().flatten().tolist()
            raise DataError(
                f"batch {number}: NaN or infinity in the input, samples {bad[:5]} of {tensor.shape[0]}. "
                "Remove them or fix the preprocessing."
            )


def _check_finite(model: nn.Module, seen: dict[str, Moments | None], number: int) -> None:
    sums = {name: moments.m2.sum() for name, moments in seen.items() if moments is not None}
    if not sums or bool(torch.isfinite(torch.stack(list(sums.values()))).all()):
        return
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: NaN or infinity in the model's weights; nothing can be measured behind them.")
    name = next(name for name, total in sums.items() if not bool(torch.isfinite(total)))
    raise ModelError(
        f"{name}: batch {number} gives non-finite inputs to this layer although weights and input are finite; "
        "the activations overflow. Check the preprocessing (--mean, --std), or run in float32."
    )
