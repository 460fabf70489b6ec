"""The passes over the data: one for `pooled` and `ema`, as many as it takes for `exact`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ckpt_tools.contract import OutlierReason, Statistics
from ckpt_tools.distributed import ALONE, Team
from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.machine.precision import relative_deviation
from ckpt_tools.method import Method
from ckpt_tools.model.batch import Batch, batch_size, select_samples, slice_samples
from ckpt_tools.moments import Moments
from ckpt_tools.reestimate.guards import check_activations, check_input
from ckpt_tools.reestimate.layer import (
    Layer,
    Rule,
    Scale,
    Seen,
    batch_only,
    kept_mean,
    stored,
)
from ckpt_tools.reestimate.outliers import ENOUGH, Look
from ckpt_tools.reestimate.running import Runner, has_hooks
from ckpt_tools.reestimate.screening import Found, Screening, Shown, plenty, refuse_not_finite
from ckpt_tools.reestimate.shares import combine
from ckpt_tools.reestimate.source import Batches, checksum
from ckpt_tools.reestimate.steps import change, measured, step
from ckpt_tools.reestimate.stopping import Progress, enough, error_bound
from ckpt_tools.results import Spread

SETTLED = 1e-4  # `exact`: largest relative change per pass; the fixed point is then known to 1e-3
MOST_PASSES = 100
_COMPARED = 64  # images that run in two precisions
CONTROL_IMAGES = 512  # what control layers look at: enough to tell a factor of two


def _no_batch() -> DataError:
    return DataError("no batch of training data; expected at least one.")


@dataclass(frozen=True)
class Read:
    """What has been read of the data, by one rank or by all; ``checksum`` of the input where passes repeat.

    ``images`` and ``checksum`` are of what counted, ``found`` is what did not, ``common`` the kinds of which a rank
    has found too many.
    """

    images: int = 0
    batches: int = 0
    checksum: float = 0.0
    found: tuple[Found, ...] = ()
    common: frozenset[OutlierReason] = frozenset()

    def __add__(self, other: Read) -> Read:
        return Read(
            self.images + other.images,
            self.batches + other.batches,
            self.checksum + other.checksum,
            self.found + other.found,
            self.common | other.common,
        )


@dataclass
class Passes:
    """The passes over the data, and what they leave in ``layers``.

    A ``team`` of several ranks goes over its data together, each over its ``source``: after every round all hold the
    moments of all. A round is a batch on every rank that has one left if there is a tolerance to meet, else the pass.
    """

    model: nn.Module
    source: Batches
    runner: Runner
    layers: dict[str, Layer]
    progress: Callable[[Progress], None] | None
    screening: Screening
    team: Team = ALONE
    images: int = 0
    batches: int = 0
    passes: int = 0
    residual: float | None = None
    stopped_early: bool = False
    repeats: bool = False  # whether later passes must see the same samples
    checksum: float | None = None  # of the input of the first pass, if so
    found: tuple[Found, ...] = ()  # outliers, in the order in which they were met
    error_scale: float = 1.0  # standard error of the estimate / that of the pooled variance
    deviation: Spread | None = None  # of the variances from those in fp32, if that is not the precision
    _own: int | None = None  # batches of this rank in the first pass
    _control_batches: int = 0  # the first ones, on which control layers are watched
    _once: bool | None = None  # whether a forward runs every layer exactly once: then it may end at the last

    def estimate(self, method: Method) -> None:
        """Leave the new statistics in every layer's ``scale``."""
        estimator, statistics = method.estimator, method.statistics
        if estimator == "ema":
            self._moving_average(statistics, method.momentum, method.epochs)
            return
        self.repeats = estimator == "exact"
        rule = kept_mean if statistics == "variance" else batch_only
        self._sweep(rule, method.tolerance)
        for layer in self._chosen():
            layer.scale = measured(layer, statistics)
        if not self._chosen():
            raise ModelError("the data reached none of the layers to rewrite, although the example input did.")
        if estimator == "exact":
            self._settle(statistics)

    def compare_precision(self) -> None:
        """Run the first images in fp32 and in the precision of the pass, and keep how far the variances differ."""
        known = [one for one in self.team.all(self._deviation) if one is not None]
        if not known:
            raise _no_batch()
        self.deviation = known[0]

    def _deviation(self) -> Spread | None:
        """Of the first images of this rank, if there are any."""
        ahead = self.source.ahead(1)
        if not ahead:
            return None
        batch = Look().usual(slice_samples(ahead[0], 0, _COMPARED), 0)
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
        return relative_deviation(*found)

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
            targets = {layer.name: measured(layer, statistics) for layer in self._chosen()}
            self.residual = self._largest_change(targets)
            for layer in self._chosen():
                layer.scale = step(layer.scale, targets[layer.name])

    def _largest_change(self, targets: dict[str, Scale]) -> float:
        return self.team.first(lambda: max(change(layer, targets[layer.name]) for layer in self._chosen()))

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
        scales = {layer: layer.scale for layer in self.layers.values()}
        for layer in self.layers.values():
            layer.begin_pass(rule)
        self.screening.begin_pass({one.mark for one in self.found} if rule is stored else None)
        if self.screening.judges:
            self.team.all(lambda: self.screening.look_ahead(self.source.ahead(ENOUGH)))
        if not self._control_batches:
            size = max(self.team.all(lambda: max(map(batch_size, self.source.ahead(1)[:1]), default=0)))
            if not size:
                raise _no_batch()
            self._control_batches = -(-CONTROL_IMAGES // size)
        most = None if tolerance is None else 1
        mine = enumerate(itertools.islice(self.source, self._own))
        own, together = Read(), Read()
        more = True
        while more:
            reads = self._round(lambda: self._read(itertools.islice(mine, most), update, told=most is None))
            own, new = own + reads[self.team.rank], sum(reads, Read())
            together += new
            over = not new.batches or bool(together.common)
            more = tolerance is not None and not over and not self._reached(tolerance, together.images)
        if together.batches and not self.team.alone and self.progress is not None:  # the others may have ended later
            self.progress(Progress(self.passes, together.images, error_bound(self.layers.values()), self.residual))
        if common := self._common(together):
            self.passes -= 1
            self.screening.common |= common
            for layer, scale in scales.items():
                layer.scale = scale
            self._sweep(rule, tolerance, update)
            return
        self._after_sweep(own, together, repeatable=rule is stored)

    def _common(self, together: Read) -> frozenset[OutlierReason]:
        """Kinds of outliers that are what the data look like, so that the pass must be repeated with them."""
        most = plenty(together.images + len(together.found))
        kinds = Counter(one.outlier.reason for one in together.found if one.outlier.reason != "not finite")
        common = together.common | {kind for kind, number in kinds.items() if number > most}
        return frozenset() if common and any(self.team.all(lambda: self.source.one_shot)) else common

    def _round(self, read: Callable[[], Read]) -> list[Read]:
        """What every rank has read; afterwards all know what all have seen."""
        if self.team.alone:
            return [read()]
        layers = list(self.layers.values())
        before = [layer.seen for layer in layers]
        for layer in layers:
            layer.seen = None
        reads = self.team.all(read)
        combine(layers, before, self.team)
        return reads

    def _read(
        self, mine: Iterable[tuple[int, Batch]], update: Callable[[Layer, Moments], None] | None, *, told: bool
    ) -> Read:
        """Run batches of this rank until there are no more, or another rank has failed; ``told``: with progress."""
        read = Read()
        for own, batch in mine:
            number = own * self.team.world + self.team.rank
            new = self._screened(batch, own, number, update)
            read += new
            if told:
                self._tell_read(read.images, new.images)
            if new.common or self.team.interrupted:
                break
        return read

    def _screened(self, batch: Batch, own: int, number: int, update: Callable[[Layer, Moments], None] | None) -> Read:
        """Run a batch but for its outliers, and merge what its layers saw."""
        rows, found = self.screening.screened(
            batch,
            own,
            number,
            lambda part, closely: self._run(part, number, closely=closely),
            lambda shown: self._merge(shown, update),
        )
        common = frozenset() if self.source.one_shot else self.screening.too_common
        total = 0.0
        if self.repeats and rows:
            total = checksum(batch if len(rows) == batch_size(batch) else select_samples(batch, rows))
        return Read(len(rows), 1, total, found, common)

    def _tell_read(self, images: int, new: int) -> None:
        """Progress within a round: of several ranks, how sure they are together is not known before its end."""
        if not self.team.alone:
            images = self.team.tally(f"images in pass {self.passes}", new)
        if self.progress is not None:
            bound = error_bound(self.layers.values()) if self.team.alone else math.inf
            self.progress(Progress(self.passes, images, bound, self.residual))

    def _reached(self, tolerance: float, images: int) -> bool:
        """Whether what all have seen is enough, at the end of a round."""
        bound = error_bound(self.layers.values())
        if self.progress is not None:
            self.progress(Progress(self.passes, images, bound, self.residual))
        self.stopped_early = self.team.first(lambda: enough(bound, images, tolerance))
        return self.stopped_early

    def _run(self, batch: Batch, number: int, *, closely: bool) -> Iterator[tuple[int, dict[str, Seen]]]:
        """Run a batch up to the last layer that is of interest, by what the first batch has shown."""
        controls = number < self._control_batches
        watched = {name: layer for name, layer in self.layers.items() if layer.rewritten or controls}
        for layer in watched.values():
            layer.begin_batch(closely=closely)
        for count in self.runner.run(batch, number, list(watched.values()), stop=self._once is True):
            if self._once is None:
                self._once = not has_hooks(self.model) and all(layer.calls == 1 for layer in watched.values())
            shown = {name: layer.take() for name, layer in watched.items()}
            yield count, {name: seen for name, seen in shown.items() if seen is not None}

    def _merge(self, shown: Shown, update: Callable[[Layer, Moments], None] | None) -> None:
        """Count what the layers saw."""
        for name, seen in shown.items():
            self.layers[name].add(seen.evidence)
        for name, seen in shown.items():
            if update is not None and self.layers[name].rewritten:
                update(self.layers[name], seen.evidence.moments)

    def _after_sweep(self, own: Read, together: Read, *, repeatable: bool) -> None:
        """Hold a pass against the first one, over all ranks: they may divide the same data anew."""
        if not together.batches:
            raise _no_batch()
        refuse_not_finite(together.found, together.images + len(together.found))
        if self.batches and together.batches != self.batches:
            raise DataError(
                f"pass {self.passes} gave {together.batches} batches, the first one {self.batches}; `exact` and "
                "epochs > 1 need an iterable that can be read again, such as a list or a DataLoader."
            )
        if (
            repeatable
            and self.checksum is not None
            and not math.isclose(together.checksum, self.checksum, rel_tol=1e-6, abs_tol=1e-3)
        ):
            raise DataError(
                f"pass {self.passes} saw other samples than the first one (random augmentation, drop_last, or "
                "shuffling with a tolerance?); `exact` needs the same ones in every pass. Use pooled, or fix the data."
            )
        self._own = own.batches
        if not repeatable:  # those that come later know these already
            names = {old.outlier.name for old in self.found}
            self.found += tuple(one for one in together.found if one.outlier.name not in names)
        self.images, self.batches, self.checksum = together.images, together.batches, together.checksum
