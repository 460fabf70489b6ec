"""The passes over the data: one for `pooled` and `ema`, as many as it takes for `exact`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ckpt_tools.contract import Estimator, Spread, Statistics
from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.moments import Moments
from ckpt_tools.reestimate.guards import check_activations, check_input
from ckpt_tools.reestimate.layer import (
    Layer,
    Rule,
    Scale,
    batch_only,
    kept_mean,
    log_step,
    stored,
)
from ckpt_tools.reestimate.precision import deviation
from ckpt_tools.reestimate.running import Runner
from ckpt_tools.reestimate.source import Batches, checksum
from ckpt_tools.reestimate.stopping import Progress, enough, error_bound
from ckpt_tools.walker.call import Batch, samples

SETTLED = 1e-4  # `exact`: largest relative change per pass; the fixed point is then known to 1e-3
DAMPING = 0.7  # weight of the new value in a log-space step; undamped passes diverge
MOST_PASSES = 100
_COMPARED = 64  # images that run in two precisions
CONTROL_IMAGES = 512  # what control layers look at: enough to tell a factor of two


@dataclass
class Passes:
    """The passes over the data, and what they leave in ``layers``."""

    model: nn.Module
    source: Batches
    runner: Runner
    layers: dict[str, Layer]
    progress: Callable[[Progress], None] | None
    images: int = 0
    batches: int = 0
    passes: int = 0
    residual: float | None = None
    stopped_early: bool = False
    repeats: bool = False  # whether later passes must see the same samples
    checksum: float | None = None  # of the input of the first pass, if so
    error_scale: float = 1.0  # standard error of the estimate / that of the pooled variance
    deviation: Spread | None = None  # of the variances from those in fp32, if that is not the precision
    _once: bool | None = None  # whether a forward runs every layer exactly once: then it may end at the last

    def estimate(
        self,
        estimator: Estimator,
        statistics: Statistics,
        tolerance: float | None,
        momentum: float,
        epochs: int,
    ) -> None:
        """Leave the new statistics in every layer's ``scale``; arguments as in ``reestimate_bn``."""
        if estimator == "ema":
            self._moving_average(statistics, momentum, epochs)
            return
        self.repeats = estimator == "exact"
        rule = kept_mean if statistics == "variance" else batch_only
        self._sweep(rule, tolerance)
        for layer in self._chosen():
            layer.scale = _measured(layer, statistics)
        if not self._chosen():
            raise ModelError("the data reached none of the layers to rewrite, although the example input did.")
        if estimator == "exact":
            self._settle(statistics)

    def compare_precision(self) -> None:
        """Run the first images in fp32 and in the precision of the pass, and keep how far the variances differ."""
        batch = samples(self.source.first(), 0, _COMPARED)
        check_input(batch, 0)
        precision = self.runner.precision
        found = []
        for kind in ("fp32", precision):
            self.runner.precision = kind
            for layer in self.layers.values():
                layer.begin_pass(kept_mean)
            for _ in self.runner.run(batch, 0, list(self.layers.values())):
                seen = {name: layer.end_batch() for name, layer in self.layers.items()}
                check_activations(self.model, seen, 0)
            found.append({layer.name: layer.moments.variance() for layer in self._chosen() if layer.moments})
        self.deviation = deviation(*found)

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
        total = 0.0
        for batch in itertools.islice(self.source, self.batches or None):
            check_input(batch, batches)
            for count in self._run(batch, batches, images):
                images += count
                self._end_batch(batches, update)
            batches, total = batches + 1, total + (checksum(batch) if self.repeats else 0.0)
            if tolerance is None and self.progress is None:
                continue
            bound = error_bound(self.layers.values())
            if self.progress is not None:
                self.progress(Progress(self.passes, images, bound, self.residual))
            if enough(bound, images, tolerance):
                self.stopped_early = True
                break
        self._after_sweep(images, batches, total, repeatable=rule is stored)

    def _run(self, batch: Batch, number: int, images: int) -> Iterator[int]:
        """Run a batch up to the last layer that is of interest, by what the first batch has shown."""
        watched = [layer for layer in self.layers.values() if layer.rewritten or images < CONTROL_IMAGES]
        for count in self.runner.run(batch, number, watched, stop=self._once is True):
            if self._once is None:
                self._once = all(layer.calls == 1 for layer in watched)
            yield count

    def _end_batch(self, number: int, update: Callable[[Layer, Moments], None] | None) -> None:
        """Merge what the layers saw."""
        seen = {name: layer.end_batch() for name, layer in self.layers.items()}
        check_activations(self.model, seen, number)
        for name, moments in seen.items():
            if update is not None and moments is not None and self.layers[name].rewritten:
                update(self.layers[name], moments)

    def _after_sweep(self, images: int, batches: int, total: float, *, repeatable: bool) -> None:
        if not batches:
            raise DataError("no batch of training data; expected at least one.")
        if self.batches and batches != self.batches:
            raise DataError(
                f"pass {self.passes} gave {batches} batches, the first one {self.batches}; `exact` and epochs > 1 "
                "need an iterable that can be read again, such as a list or a DataLoader."
            )
        if (
            repeatable
            and self.checksum is not None
            and not math.isclose(total, self.checksum, rel_tol=1e-6, abs_tol=1e-3)
        ):
            raise DataError(
                f"pass {self.passes} saw other samples than the first one (random augmentation, drop_last, or "
                "shuffling with a tolerance?); `exact` needs the same ones in every pass. Use pooled, or fix the data."
            )
        self.images, self.batches, self.checksum = images, batches, total


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
