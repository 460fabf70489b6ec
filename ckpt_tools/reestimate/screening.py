"""Outliers are kept out of a pass: a batch is run, looked at, and run again without them.

The sums over clusters of images, which are measured anyway, suffice to see that a batch is usual.
Then nothing is computed twice, and all results are those of a pass without screening. A batch that
looks unusual is run again to measure image by image, and once more without the images that stand
out, because these have influenced the variance that normalised their neighbours.

Only a batch whose rows are known to be independent samples is run without some of them. Of any
other batch (a graph, frames folded into the batch) nobody knows what belongs to a row, so it is
left out as a whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ckpt_tools.contract import OutlierReason
from ckpt_tools.errors import DataError
from ckpt_tools.model.batch import Batch, batch_size, select_samples
from ckpt_tools.observation.finite import check_activations, not_finite_rows
from ckpt_tools.observation.layer import Observation
from ckpt_tools.observation.outliers import (
    MIN_COMPARED,
    SELF_SUFFICIENT,
    EnergyHistory,
    Suspect,
    extreme_samples,
    find_suspects,
    fingerprint_head,
    fingerprints,
    has_extreme_cluster,
    log_energies,
    overflowing_samples,
    with_leverage,
)
from ckpt_tools.results import Outlier

Observations = Mapping[str, Observation]
"""What a forward has shown of each layer that it reached, in the order of execution."""

RunBatch = Callable[[Batch, bool], Iterator[tuple[int, Observations]]]
"""Runs a batch, as a whole or in parts; yields how many samples each part had, and what it showed.

With True every sample is measured by itself.
"""

SampleKey = bytes | tuple[int, int]
"""What a later pass recognises a sample by: its fingerprint, or else its batch and row."""

TOLERATED_SHARE = 0.01  # of the samples that may be outliers
# A reason that rejects so many samples, and this share of what was read, is common (not outliers).
# It is a coarser limit than the one at the end of a pass, and ends a hopeless pass early.
_COMMON_COUNT, _COMMON_SHARE = 8, 0.02
_MAX_TURNS = 6  # times that a batch is run without what stood out before
_MAX_NOT_FINITE = 100  # if there are more, and most samples are not finite, reading ends


@dataclass(frozen=True)
class DetectedOutlier:
    """An outlier, and the keys by which a later pass recognises what was left out with it.

    That is the sample alone. Of a batch that is left out as a whole, the first outlier has the keys
    of all its samples, and any other outlier has none.
    """

    outlier: Outlier
    keys: tuple[SampleKey, ...]


@dataclass(frozen=True)
class _Task:
    """Rows of a batch to run; ``suspects`` are measured once more before they are left out."""

    rows: Sequence[int]
    suspects: Mapping[int, Suspect] = field(default_factory=dict)
    per_image: bool = False
    turn: int = 0

    def restricted_to(self, rows: Sequence[int]) -> _Task:
        suspects = {row: self.suspects[row] for row in rows if row in self.suspects}
        return replace(self, rows=rows, suspects=suspects)

    def without(self, rows: Iterable[int]) -> _Task:
        excluded = set(rows)
        return _Task([row for row in self.rows if row not in excluded], turn=self.turn + 1)


class Screening:
    """Keeps outliers out of passes; with ``keep`` only samples that are not finite.

    ``sample_name(batch, row)`` is what users know a sample by. Samples with a reason in ``common``
    count as usual, because the data have many of them. Unless ``rows_are_samples``, a batch with an
    outlier is left out as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        sample_name: Callable[[int, int], str],
        *,
        keep: bool,
        rows_are_samples: bool,
    ) -> None:
        self.common: frozenset[OutlierReason] = frozenset({"blank", "extreme"} if keep else ())
        self.rows_are_samples = rows_are_samples
        self._model, self._sample_name = model, sample_name
        self.begin_pass(None)

    def begin_pass(self, excluded: Collection[SampleKey] | None) -> None:
        """Forget what was seen. From then on leave out ``excluded`` only; None: judge anew."""
        self._excluded = excluded
        self._histories: dict[str, EnergyHistory] = defaultdict(EnergyHistory)
        self._counts: Counter[OutlierReason] = Counter()
        self._not_finite: list[DetectedOutlier] = []
        self._images = 0

    @property
    def judges(self) -> bool:
        """Whether samples are compared with others in this pass."""
        return self._excluded is None and "extreme" not in self.common

    def look_ahead(self, batches: Sequence[Batch]) -> None:
        """Learn from the first batches what inputs are like, before any of them is judged.

        A small batch alone does not show what is usual.
        """
        if any(batch_size(batch) >= SELF_SUFFICIENT for batch in batches[:1]):
            return
        for number, batch in enumerate(batches):
            not_finite = not_finite_rows(batch, number)
            finite = sorted(set(range(batch_size(batch))) - set(not_finite))
            if not_finite and not self.rows_are_samples:
                continue
            energies = log_energies(select_samples(batch, finite)) if finite else None
            if energies is not None:
                self._histories["input"].remember(energies)

    @property
    def too_common(self) -> frozenset[OutlierReason]:
        """Reasons that have rejected so many samples already that these cannot be outliers."""
        limit = max(_COMMON_COUNT, _COMMON_SHARE * self._images)
        reasons = {reason for reason, count in self._counts.items() if count > limit}
        return frozenset(reasons - {"not finite"})

    def screen(
        self,
        batch: Batch,
        local_number: int,
        number: int,
        run: RunBatch,
        count: Callable[[Observations], None],
    ) -> tuple[Sequence[int], tuple[DetectedOutlier, ...]]:
        """Run a batch, let its usual samples count, and return their rows and the outliers.

        Args:
            batch: is left as it is; outliers are excluded from copies.
            local_number: its number among the batches of this process.
            number: its number among those of all processes.
            run: see ``RunBatch``.
            count: called with the observations of a part of the batch that has no outliers.

        Raises:
            ModelError: the activations of most samples are not finite.
            DataError: values that belong to no single sample are not finite, or most samples of
                the data so far.
        """
        input_rows = not_finite_rows(batch, number)
        outliers = {row: Suspect("not finite", None, "input") for row in input_rows}
        usual: list[int] = []
        counting: list[Observations] = []
        tasks = [self._first_task(batch, number, outliers)]
        while tasks and (self.rows_are_samples or not outliers):
            task, start = tasks.pop(0), 0
            if not task.rows:
                continue
            part = batch if len(task.rows) == batch_size(batch) else select_samples(batch, task.rows)
            # Where memory is short the rows come in several parts, and each is judged by itself.
            for size, observations in run(part, task.per_image):
                rows, start = task.rows[start : start + size], start + size
                part_task = task.restricted_to(rows)
                next_task = self._next_task(part_task, observations, number, outliers)
                if next_task is None:
                    counting.append(observations)
                    usual += rows
                else:
                    tasks.append(next_task)
        if outliers and not self.rows_are_samples:
            usual, counting = [], []
        for observations in counting:
            count(observations)
        self._images += batch_size(batch)
        reasons = [suspect.reason for suspect in outliers.values()]
        self._counts.update(reasons if self.rows_are_samples else set(reasons))
        detected = self._describe(batch, local_number, number, outliers)
        self._not_finite += [item for item in detected if item.outlier.reason == "not finite"]
        if len(self._not_finite) > max(_MAX_NOT_FINITE, self._images / 2):
            refuse_not_finite(self._not_finite, self._images)
        return sorted(usual), tuple(detected)

    def _describe(
        self, batch: Batch, local_number: int, number: int, outliers: Mapping[int, Suspect]
    ) -> list[DetectedOutlier]:
        """Name the outliers of a batch; the arguments are those of ``screen``, with their rows."""
        detected: list[DetectedOutlier] = []
        for row, suspect in sorted(outliers.items()):
            name = self._sample_name(local_number, row)
            whole = not self.rows_are_samples
            outlier = Outlier(name, suspect.reason, suspect.leverage, suspect.where, whole_batch=whole)
            keys: Sequence[SampleKey] = ()
            if not whole:
                keys = _sample_keys(select_samples(batch, [row]), number, row)[:1]
            elif not detected:
                keys = _sample_keys(batch, number)
            detected.append(DetectedOutlier(outlier, tuple(keys)))
        return detected

    def _first_task(self, batch: Batch, number: int, outliers: Mapping[int, Suspect]) -> _Task:
        rows = [row for row in range(batch_size(batch)) if row not in outliers]
        if self._excluded is not None:
            # Heads are cheap to compute, digests are not: few samples share a head with an outlier.
            heads = {fingerprint_head(key) for key in self._excluded if isinstance(key, bytes)}
            keys = _sample_keys(batch, number, heads=heads)
            usual = [row for row in rows if keys[row] not in self._excluded]
            return _Task(usual if self.rows_are_samples or not usual else rows)
        if not rows or (outliers and not self.rows_are_samples):
            return _Task([])
        finite = select_samples(batch, rows) if outliers else batch
        suspects = find_suspects(finite, self._histories["input"], self.common)
        by_row = {rows[place]: suspect for place, suspect in suspects.items()}
        return _Task(rows, by_row, per_image=bool(suspects))

    def _next_task(
        self, task: _Task, observations: Observations, number: int, outliers: dict[int, Suspect]
    ) -> _Task | None:
        """What to run instead of this task; None if its observations may count.

        Samples to leave out are added to ``outliers``.
        """
        energy = _to_host({name: item.energy for name, item in observations.items()})
        finite = all(bool(values.isfinite().all()) for values in energy.values())
        if finite and not task.suspects and not self._may_hold_extremes(task, energy):
            # Outliers must not enter the history, or the next ones would look usual.
            for name, values in energy.items():
                self._histories[name].remember(values)
            return None
        # Clusters only show that some image is unusual; the next run tells which.
        if not task.per_image:
            return replace(task, per_image=True)
        new = self._find_outliers(task, observations, number, finite=finite)
        outliers.update(new)
        return task.without(new) if new else None

    def _may_hold_extremes(self, task: _Task, energy: Mapping[str, Tensor]) -> bool:
        """Whether the input of a layer may hold an extreme sample."""
        if not self.judges or task.turn >= _MAX_TURNS:
            return False
        return task.per_image or any(
            has_extreme_cluster(values, len(task.rows), self._histories[name])
            for name, values in energy.items()
        )

    def _find_outliers(
        self, task: _Task, observations: Observations, number: int, *, finite: bool
    ) -> dict[int, Suspect]:
        """Outliers by row, in a task that was measured image by image."""
        layers = observations.items()
        measured = {name: x.image_energy for name, x in layers if x.image_energy is not None}
        on_host, count = _to_host(measured).items(), len(task.rows)
        # In a layer whose rows belong to no single image, the numbers differ.
        energies = {name: values for name, values in on_host if len(values) == count}
        if task.suspects:
            return {
                row: with_leverage(task.rows.index(row), suspect, energies)
                for row, suspect in task.suspects.items()
            }
        if finite:
            places = extreme_samples(energies, self._histories)
        else:
            places = overflowing_samples(energies)
            # Where most samples of a batch overflow, the model is to blame. A sample that is alone
            # in its batch may overflow if others before it did not.
            alone = count == 1 and self._images >= MIN_COMPARED
            limit = max(count / 2, alone)
            if self._excluded is not None or not 0 < len(places) <= limit:
                moments = {name: item.evidence.moments for name, item in observations.items()}
                check_activations(self._model, moments, number)
        return {task.rows[place]: suspect for place, suspect in places.items()}


def tolerated_outliers(samples: int) -> float:
    """How many of so many samples may be outliers: 1 %, and a single one always.

    If a reason rejects more of them, it describes the data and not some outliers.
    """
    return max(1, TOLERATED_SHARE * samples)


def refuse_not_finite(outliers: Sequence[DetectedOutlier], samples: int) -> None:
    """Raise DataError if over 1 % of the ``slice_samples`` that were read are not finite."""
    not_finite = [item.outlier for item in outliers if item.outlier.reason == "not finite"]
    if len(not_finite) <= TOLERATED_SHARE * samples:
        return
    names = ", ".join(outlier.name for outlier in not_finite[:5])
    if len(not_finite) > 5:
        names += ", …"
    places = dict.fromkeys(
        "the input" if outlier.where == "input" else outlier.where for outlier in not_finite
    )
    raise DataError(
        f"{names}: NaN or infinity in {' and '.join(places)}; {len(not_finite)} of {samples} "
        f"samples, expected {TOLERATED_SHARE:.0%} at most. Remove them or fix the preprocessing."
    )


def _sample_keys(
    batch: Batch, number: int, first_row: int = 0, heads: Collection[bytes] | None = None
) -> Sequence[SampleKey]:
    """The key of each sample of a batch; ``heads`` as in ``fingerprints``."""
    places = [(number, first_row + row) for row in range(batch_size(batch))]
    return fingerprints(batch, heads) or places


def _to_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, copied in one transfer instead of one for each layer."""
    if not values:
        return {}
    flat = torch.cat(list(values.values())).cpu()
    parts = flat.split([len(tensor) for tensor in values.values()])
    return dict(zip(values, parts, strict=True))
