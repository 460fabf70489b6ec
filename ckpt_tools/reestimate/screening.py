"""A batch is run, looked at, and run again without the samples that would spoil what it shows of the others.

What is measured anyway, the sums over clusters of samples, is enough to see that all is well: then nothing is computed
twice, or otherwise than without a guard. Where a batch looks odd it is run again to measure sample by sample, and once
more without those that stand out: they have been in the variance that normalised their neighbours.
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
from ckpt_tools.reestimate.guards import check_activations
from ckpt_tools.reestimate.layer import Seen
from ckpt_tools.reestimate.outliers import (
    ENOUGH,
    FEWEST,
    Gauge,
    Suspect,
    clusters_odd,
    energies,
    extremes,
    fingerprints,
    head,
    not_finite,
    overflowing,
    unusual,
    weighed,
)
from ckpt_tools.results import Outlier

Shown = Mapping[str, Seen]
"""What every layer that a forward reached has seen of it, in the order of execution."""

Run = Callable[[Batch, bool], Iterator[tuple[int, Shown]]]
"""Runs a batch, whole or in parts, and with True measures every sample: how many samples, and what they showed."""

Mark = bytes | tuple[int, int]
"""What a later pass knows a sample by: its fingerprint, else its place."""

_MOST = 6  # times that a batch is run without what stood out before
_PLENTY, _SHARE = 8, 0.02  # of a kind: so many, and this share of what was seen, are no outliers
TOLERATED = 0.01  # share of samples that may be outliers
_HOPELESS = 100  # samples that are not finite: if most are, nobody reads on


@dataclass(frozen=True)
class Found:
    """An outlier, and what a later pass knows it by."""

    outlier: Outlier
    mark: Mark


@dataclass(frozen=True)
class _Task:
    """Rows of a batch to run; ``suspects`` are measured before they are left out."""

    rows: Sequence[int]
    suspects: Mapping[int, Suspect] = field(default_factory=dict)
    closely: bool = False
    turn: int = 0

    def of(self, rows: Sequence[int]) -> _Task:
        """The part of it that concerns these rows."""
        return _Task(rows, {row: self.suspects[row] for row in rows if row in self.suspects}, self.closely, self.turn)

    def without(self, rows: Iterable[int]) -> _Task:
        """The next turn."""
        out = set(rows)
        return _Task([row for row in self.rows if row not in out], turn=self.turn + 1)


class Screening:
    """Keeps outliers out of a pass; with ``keep`` only what is not finite.

    ``name(batch, row)`` is what a sample is called. Of kinds in ``common`` the data are full: they count as usual.
    """

    def __init__(self, model: nn.Module, name: Callable[[int, int], str], *, keep: bool) -> None:
        self.common: frozenset[OutlierReason] = frozenset({"blank", "extreme"} if keep else ())
        self._model, self._name = model, name
        self.begin_pass(None)

    def begin_pass(self, known: Collection[Mark] | None) -> None:
        """Judge anew, or leave out what is ``known``, and nothing else."""
        self._known = known
        self._gauges: dict[str, Gauge] = defaultdict(Gauge)
        self._counts: Counter[OutlierReason] = Counter()
        self._not_finite: list[Found] = []
        self._images = 0

    @property
    def judges(self) -> bool:
        """Whether samples are compared with others in this pass."""
        return self._known is None and "extreme" not in self.common

    def look_ahead(self, batches: Sequence[Batch]) -> None:
        """See in the first batches what inputs are like, before any of them is judged: small ones cannot tell alone."""
        if any(batch_size(one) >= ENOUGH for one in batches[:1]):
            return
        for number, batch in enumerate(batches):
            finite = sorted(set(range(batch_size(batch))) - set(not_finite(batch, number)))
            values = energies(select_samples(batch, finite)) if finite else None
            if values is not None:
                self._gauges["input"].remember(values)

    @property
    def too_common(self) -> frozenset[OutlierReason]:
        """Kinds of which there are already too many for outliers."""
        plenty = max(_PLENTY, _SHARE * self._images)
        return frozenset(kind for kind, number in self._counts.items() if kind != "not finite" and number > plenty)

    def screened(
        self, batch: Batch, own: int, number: int, run: Run, merge: Callable[[Shown], None]
    ) -> tuple[Sequence[int], tuple[Found, ...]]:
        """Run a batch and merge what its usual samples show; the rows that count, and the outliers.

        Args:
            own: its number among those of this rank.
            number: its number among all.
            run: see ``Run``.
            merge: called with what a part of the batch has shown.

        Raises:
            ModelError: the activations of most samples are not finite.
            DataError: values that belong to no single sample are not.
        """
        found = {row: Suspect("not finite", None, "input") for row in not_finite(batch, number)}
        kept: list[int] = []
        tasks = [self._task(batch, number, found)]
        while tasks:
            task, start = tasks.pop(0), 0
            if not task.rows:
                continue
            part = batch if len(task.rows) == batch_size(batch) else select_samples(batch, task.rows)
            for count, shown in run(part, task.closely):
                rows, start = task.rows[start : start + count], start + count
                again = self._again(task.of(rows), shown, number, found)
                if again is None:
                    merge(shown)
                    kept += rows
                else:
                    tasks.append(again)
        self._images += batch_size(batch)
        self._counts.update(one.reason for one in found.values())
        named = tuple(self._found(batch, own, number, row, found[row]) for row in sorted(found))
        self._not_finite += [one for one in named if one.outlier.reason == "not finite"]
        if len(self._not_finite) > max(_HOPELESS, self._images / 2):
            refuse_not_finite(self._not_finite, self._images)
        return sorted(kept), named

    def _task(self, batch: Batch, number: int, found: Mapping[int, Suspect]) -> _Task:
        """What to run of a batch at first."""
        rows = [row for row in range(batch_size(batch)) if row not in found]
        if self._known is not None:
            heads = {head(mark) for mark in self._known if isinstance(mark, bytes)}
            marks = _marks(batch, number, heads=heads)
            return _Task([row for row in rows if marks[row] not in self._known])
        if not rows:
            return _Task(rows)
        odd = unusual(select_samples(batch, rows) if found else batch, self._gauges["input"], self.common)
        return _Task(rows, {rows[place]: one for place, one in odd.items()}, closely=bool(odd))

    def _found(self, batch: Batch, own: int, number: int, row: int, one: Suspect) -> Found:
        outlier = Outlier(self._name(own, row), one.reason, one.leverage, one.where)
        return Found(outlier, _marks(select_samples(batch, [row]), number, row)[0])

    def _again(self, task: _Task, shown: Shown, number: int, found: dict[int, Suspect]) -> _Task | None:
        """What to run in place of this; None if it may count."""
        energy = _on_host({name: seen.energy for name, seen in shown.items()})
        finite = all(bool(one.isfinite().all()) for one in energy.values())
        if finite and not task.suspects and not self._worth_a_look(task, energy):
            for name, values in energy.items():
                self._gauges[name].remember(values)
            return None
        if not task.closely:
            return replace(task, closely=True)
        out = self._outliers(task, shown, number, finite=finite)
        found.update(out)
        return task.without(out) if out else None

    def _worth_a_look(self, task: _Task, energy: Mapping[str, Tensor]) -> bool:
        """Whether a layer may have been shown something extreme."""
        if not self.judges or task.turn >= _MOST:
            return False
        return task.closely or any(
            clusters_odd(one, len(task.rows), self._gauges[name]) for name, one in energy.items()
        )

    def _outliers(self, task: _Task, shown: Shown, number: int, *, finite: bool) -> dict[int, Suspect]:
        """Whom to leave out of a batch that was measured sample by sample."""
        images = {name: seen.images for name, seen in shown.items() if seen.images is not None}
        single = {name: one for name, one in _on_host(images).items() if len(one) == len(task.rows)}
        if task.suspects:
            return {row: weighed(task.rows.index(row), one, single) for row, one in task.suspects.items()}
        if finite:
            places = extremes(single, self._gauges)
        else:
            places = overflowing(single)
            alone = len(task.rows) == 1 and self._images >= FEWEST
            if self._known is not None or not 0 < len(places) <= max(len(task.rows) / 2, alone):
                moments = {name: seen.evidence.moments for name, seen in shown.items()}
                check_activations(self._model, moments, number)
        return {task.rows[place]: one for place, one in places.items()}


def plenty(images: int) -> float:
    """How many of so many samples may be outliers; a single one always."""
    return max(1, TOLERATED * images)


def refuse_not_finite(found: Sequence[Found], images: int) -> None:
    """Raise DataError if more than 1 % of the samples are not finite."""
    bad = [one.outlier for one in found if one.outlier.reason == "not finite"]
    if len(bad) <= TOLERATED * images:
        return
    names = ", ".join(one.name for one in bad[:5]) + (", …" if len(bad) > 5 else "")
    places = " and ".join(dict.fromkeys(f"the {one.where}" if one.where == "input" else one.where for one in bad))
    raise DataError(
        f"{names}: NaN or infinity in {places}; {len(bad)} of {images} samples, expected {TOLERATED:.0%} at most. "
        "Remove them or fix the preprocessing."
    )


def _marks(batch: Batch, number: int, first: int = 0, heads: Collection[bytes] | None = None) -> Sequence[Mark]:
    """What tells every sample of a batch from others, or from those with fingerprints of these ``heads``."""
    return fingerprints(batch, heads) or [(number, first + row) for row in range(batch_size(batch))]


def _on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, brought there at once."""
    if not values:
        return {}
    together = torch.cat(list(values.values())).cpu()
    return dict(zip(values, together.split([len(one) for one in values.values()]), strict=True))
