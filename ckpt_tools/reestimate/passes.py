"""One pass over the data: each batch is run, screened for outliers and counted in the layers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ckpt_tools.distributed import ALONE, Team
from ckpt_tools.errors import DataError
from ckpt_tools.model.batch import Batch, batch_shapes, batch_size, select_samples
from ckpt_tools.moments import Moments
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer, MeanVariance, Rule
from ckpt_tools.observation.outliers import SELF_SUFFICIENT
from ckpt_tools.observation.running import Runner, has_hooks
from ckpt_tools.reestimate.batches import Batches, checksum, no_batch_error
from ckpt_tools.reestimate.screening import (
    TOLERATED_SHARE,
    Observations,
    SampleKey,
    Screening,
    refuse_not_finite,
)
from ckpt_tools.reestimate.shares import combine_shares
from ckpt_tools.reestimate.stopping import Progress, error_bound, is_precise_enough
from ckpt_tools.reestimate.tally import Tally
from ckpt_tools.results import Outlier

# Control layers are watched on so many images only: they suffice to tell a factor of two.
_CONTROL_IMAGES = 512

Update = Callable[[Layer, Moments], None]
"""What an estimator does with a rewritten layer after each of its calls, given that call's moments."""


@dataclass(frozen=True)
class PassContext:
    """What all passes of a re-estimation share: the model, its data, and how batches are run.

    ``layers`` are the observed BN layers by name: those to rewrite and the control layers. The
    processes of ``team`` each have their own share of the batches.
    """

    model: nn.Module
    batches: Batches
    runner: Runner
    layers: dict[str, Layer]
    screening: Screening
    team: Team = ALONE
    progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass measured: the evidence of each layer that the data reached, by layer name.

    ``total`` counts the data of all processes, ``local_batches`` the batches of this one. ``kept``
    are outliers that count, because too much would have been left out with them.
    """

    evidence: dict[str, Evidence]
    total: Tally
    local_batches: int
    control_batches: int  # the first ones, on which control layers were watched
    stopped_early: bool
    kept: tuple[Outlier, ...] = ()


@dataclass
class DataPass:
    """One pass of the model over its data; call ``run`` once.

    Several processes go over the data together, each over its own batches. They exchange what they
    measured in rounds, after which all hold the same evidence. A round is one batch of each process
    where there is a ``tolerance`` to meet, else the whole pass.

    Args:
        context: the model and the data.
        rule: what the layers to rewrite normalise with.
        number: of this pass, from 1.
        first: the result of the first pass, to whose data a later one is compared.
        same_samples: whether later passes must see the samples of the first, and leave out the
            outliers of the first. Otherwise the passes may be augmented differently.
        tolerance: end the pass when the error bound is below it; None reads everything.
        max_images: read only the first batches, which hold so many samples; the next pass begins
            with them again.
        update: called for each rewritten layer after each batch, once for each call of the layer.
        residual: of the pass before, for the progress display.
        tolerated_loss: which share of the data may be left out in whole batches, because these hold
            outliers and cannot be cut.
    """

    context: PassContext
    rule: Rule
    number: int = 1
    first: PassResult | None = None
    same_samples: bool = False
    tolerance: float | None = None
    max_images: int | None = None
    update: Update | None = None
    residual: float | None = None
    tolerated_loss: float = TOLERATED_SHARE
    _control_batches: int = field(default=0, init=False)
    # Shapes of the batches on which a forward runs each layer exactly once. Larger batches may be
    # cut into several ghost batches, longer sequences run a recursion more often.
    _shapes_run_once: set[object] = field(default_factory=set, init=False)

    def run(self) -> PassResult:
        """Read the data and return what it shows.

        Raises:
            DataError: no batch, over 1 % of the samples not finite, or, in a later pass, other
                data than in the first.
            ModelError: the model cannot run on a batch, or its activations overflow.
        """
        layers = self.context.layers.values()
        initial = [layer.current for layer in layers]
        self._control_batches = self._count_control_batches()
        local, total, stopped = self._read_data(initial)
        # Where many samples look like outliers of one kind, they are what the data look like. What
        # was measured without them is wrong, so the pass begins again and lets them count. The same
        # holds where too many whole batches would be lost, but for this pass alone.
        kept: tuple[Outlier, ...] = ()
        screening, common = self.context.screening, self.context.screening.common
        while self._is_rereadable():
            new, costly = total.common_reasons(), total.costly_outliers(self.tolerated_loss)
            if not new and not costly:
                break
            kept += tuple(outlier for outlier in costly if outlier.reason not in new)
            common |= new
            screening.common |= new | {outlier.reason for outlier in costly}
            local, total, stopped = self._read_data(initial)
        screening.common = common
        self._check_data(total)
        evidence = {
            layer.name: layer.evidence
            for layer in layers
            if layer.evidence is not None and layer.evidence.moments.count > 1
        }
        return PassResult(evidence, total, local.batches, self._control_batches, stopped, kept)

    def _count_control_batches(self) -> int:
        """How many batches hold the images that control layers need, by the largest first batch."""
        if self.first is not None:
            return self.first.control_batches
        first_sizes = self.context.team.all(
            lambda: max(map(batch_size, self.context.batches.ahead(1)[:1]), default=0)
        )
        if not max(first_sizes):
            raise no_batch_error()
        return math.ceil(_CONTROL_IMAGES / max(first_sizes))

    def _read_data(self, initial: Iterable[MeanVariance]) -> tuple[Tally, Tally, bool]:
        """Read all rounds; what this process and all have read, and whether the tolerance was met.

        Later passes take as many batches as the first one did.
        """
        context, team = self.context, self.context.team
        for layer, current in zip(context.layers.values(), initial, strict=True):
            layer.current = current
            layer.begin_pass(self.rule)
        excluded: set[SampleKey] | None = None
        if self.first is not None and self.same_samples:
            excluded = {key for detected in self.first.total.outliers for key in detected.keys}
        context.screening.begin_pass(excluded)
        # Small batches cannot show what is usual, so several are looked at before the first is run.
        if context.screening.judges:
            team.all(lambda: context.screening.look_ahead(context.batches.ahead(SELF_SUFFICIENT)))
        numbered = enumerate(self._batches())
        local, total, stopped = Tally(), Tally(), False
        while not stopped:
            shares = self._read_round(numbered)
            local += shares[team.rank]
            new = sum(shares, Tally())
            total += new
            if self.tolerance is None or not new.batches or total.common:
                break
            stopped = self._meets_tolerance(self.tolerance, total.images)
        if total.batches and not team.alone:  # the other processes may have ended later than this
            self._report_progress(total.images)
        return local, total, stopped

    def _batches(self) -> Iterator[Batch]:
        batches = self.context.batches
        if self.max_images is not None:
            return batches.first_images(math.ceil(self.max_images / self.context.team.world))
        return itertools.islice(batches, None if self.first is None else self.first.local_batches)

    def _is_rereadable(self) -> bool:
        return not any(self.context.team.all(lambda: self.context.batches.one_shot))

    def _read_round(self, numbered: Iterator[tuple[int, Batch]]) -> list[Tally]:
        """Read one round; what each process has read in it. All layers then hold the same."""
        team = self.context.team
        limit = None if self.tolerance is None else 1
        if team.alone:
            return [self._read_batches(itertools.islice(numbered, limit))]
        # Only what is new is exchanged. The evidence that all processes share already would
        # otherwise count once for each of them.
        layers = list(self.context.layers.values())
        before = [layer.evidence for layer in layers]
        for layer in layers:
            layer.evidence = None
        shares = team.all(lambda: self._read_batches(itertools.islice(numbered, limit)))
        combine_shares(layers, before, team)
        return shares

    def _read_batches(self, numbered: Iterable[tuple[int, Batch]]) -> Tally:
        """Run batches of this process until there are no more, or another process has failed."""
        team, total = self.context.team, Tally()
        for local_number, batch in numbered:
            new = self._run_screened(batch, local_number)
            total += new
            if self.tolerance is None:
                images = total.images
                # A counter in the store of the process group: no process waits for another.
                if not team.alone:
                    images = team.tally(f"images in pass {self.number}", new.images)
                self._report_progress(images, in_round=not team.alone)
            # What is read after this would be thrown away.
            if new.common or team.has_failed:
                break
        return total

    def _run_screened(self, batch: Batch, local_number: int) -> Tally:
        """Run a batch without its outliers, and count what the layers observed."""
        team, screening = self.context.team, self.context.screening
        number = local_number * team.world + team.rank
        observe = functools.partial(self._observe, number)
        rows, outliers = screening.screen(batch, local_number, number, observe, self._count)
        # Common reasons make the pass begin again, which one-shot data does not allow.
        common = frozenset() if self.context.batches.one_shot else screening.too_common
        total = 0.0
        if self.same_samples and rows:
            total = checksum(batch if len(rows) == batch_size(batch) else select_samples(batch, rows))
        return Tally(len(rows), 1, total, outliers, common)

    def _observe(self, number: int, batch: Batch, per_image: bool) -> Iterator[tuple[int, Observations]]:
        """Run a batch, as a whole or in parts; yield each part's size and observations."""
        layers, with_controls = self.context.layers.values(), number < self._control_batches
        watched = [layer for layer in layers if layer.rewritten or layer.paired or with_controls]
        for layer in watched:
            layer.begin_batch(per_image=per_image)
        shape = batch_shapes(batch)
        stop = shape in self._shapes_run_once
        for images in self.context.runner.run(batch, number, watched, stop=stop):
            # A forward may end behind the last layer only if that layer is not run again, and if no
            # hook of somebody else counts on the forward's end.
            once = not stop and all(layer.calls == 1 for layer in watched)
            if once and not has_hooks(self.context.model):
                self._shapes_run_once.add(shape)
            observations = {layer.name: layer.take_observation() for layer in watched}
            yield images, {name: item for name, item in observations.items() if item is not None}

    def _count(self, observations: Observations) -> None:
        for name, observation in observations.items():
            layer = self.context.layers[name]
            layer.add_evidence(observation.evidence)
            if self.update is not None and layer.rewritten:
                for moments in observation.calls:
                    self.update(layer, moments)

    def _report_progress(self, images: int, *, in_round: bool = False) -> None:
        """Call the caller's ``progress``; the common error is unknown before a round ends."""
        if self.context.progress is not None:
            bound = math.inf if in_round else error_bound(self.context.layers.values())
            self.context.progress(Progress(self.number, images, bound, self.residual))

    def _meets_tolerance(self, tolerance: float, images: int) -> bool:
        """Whether the evidence of all processes is enough; the main process decides for all."""
        bound = error_bound(self.context.layers.values())
        self._report_progress(images)
        return self.context.team.first(lambda: is_precise_enough(bound, images, tolerance))

    def _check_data(self, total: Tally) -> None:
        """Raise DataError if the pass read nothing, or other data than the first one."""
        if not total.batches:
            raise no_batch_error()
        refuse_not_finite(total.outliers, total.samples)
        if not total.images:
            names = ", ".join(detected.outlier.name for detected in total.outliers[:3])
            raise DataError(
                f"every batch holds an outlier ({names}) and was left out as a whole. Remove these samples, "
                "or, if the rows of a batch are independent samples, leave out the outliers alone "
                "(rows_are_samples=True, --rows-are-samples)."
            )
        for layer in self.context.layers.values():
            if layer.rewritten and layer.moments is not None and layer.moments.count < 2:
                raise DataError(
                    f"{layer.name}: all the data holds one value per channel for this layer; a variance "
                    "needs two. Give more samples, or larger inputs (--input-size)."
                )
        if self.first is None:
            return
        # The totals of all processes are compared, because a DataLoader may deal samples out to the
        # processes in another way in each pass.
        expected = self.first.total
        if total.batches != expected.batches:
            raise DataError(
                f"pass {self.number} gave {total.batches} batches, the first one "
                f"{expected.batches}; `exact` and epochs > 1 need an iterable that can be read "
                "again, such as a list or a DataLoader."
            )
        # Sums of floats depend on the order, and data may be shuffled.
        equal = math.isclose(total.checksum, expected.checksum, rel_tol=1e-6, abs_tol=1e-3)
        if self.same_samples and not equal:
            raise DataError(
                f"pass {self.number} saw other samples than the first one (random augmentation, "
                "drop_last, or shuffling with a tolerance?); `exact` needs the same ones in every "
                "pass. Use pooled, or fix the data."
            )
