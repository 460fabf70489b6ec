"""Is this the training data? What the model remembers of its inputs, against what it is about to be given.

Two scores of ``reestimate.agreement``: ``early``, the first BN layers on their stored statistics, shows preprocessing
and colours; ``deep``, all layers on batch statistics, shows other contents and sizes. The thresholds come from
``scripts/bench-data``, whose figures stand in ``scripts/bench_data.json``. Two questions are asked of data that looks
suspicious: would some usual training augmentation explain it (then it is excused), and does another
preprocessing fit much better (then it is refused, and the better one named)?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ckpt_tools.contract import InputSpec, Walk
from ckpt_tools.errors import CheckFailed, ModelError
from ckpt_tools.jobs.hypotheses import Hypothesis, augmentations, hypotheses, sizes
from ckpt_tools.reestimate.agreement import Agreement, Normalise, measure
from ckpt_tools.reestimate.training import seeded
from ckpt_tools.walker.call import Batch, Forward, batch_size, call, first_samples, input_tensors

IMAGES = 256  # looked at
EARLY_LAYERS = 3
EARLY_CLEAN, DEEP_CLEAN = 0.12, 0.20  # below both, nothing else is tried
EARLY_WRONG, DEEP_WRONG = 0.27, 0.25  # above one, with every excuse, the data is refused
EXCUSED = 0.06  # a score that no other preprocessing needs to beat
_RANKING = 64  # images that rank the hypotheses
_FINAL = 3  # hypotheses that are then scored on all

Verdict = Literal["agree", "disagree", "none"]


@dataclass(frozen=True)
class Tried:
    """A hypothesis with its early score, 1 if the model cannot run on what it makes of the data."""

    hypothesis: Hypothesis
    score: float

    @property
    def share(self) -> float:
        """The score on a scale on which scores of different kinds of hypotheses compare."""
        return self.score / self.hypothesis.enough


@dataclass(frozen=True)
class DataVerdict:
    """Whether the data looks like the training data, in numbers and in a sentence.

    ``early`` and ``deep`` are scores in 0–1 (0: the stored statistics are those of the data), None for "none".
    ``tried`` holds every hypothesis, best first; it is empty where nothing was suspicious.
    """

    verdict: Verdict
    cause: str
    early: float | None = None
    deep: float | None = None
    images: int = 0
    tried: tuple[Tried, ...] = ()
    layers: Agreement | None = None  # of the deep score, layer by layer

    @property
    def best(self) -> Tried | None:
        """The hypothesis that fits best."""
        return self.tried[0] if self.tried else None


def refuse(verdict: DataVerdict) -> None:
    """Raise CheckFailed if the data disagrees."""
    if verdict.verdict == "disagree":
        raise CheckFailed(
            f"this does not look like the data that the model was trained on: {verdict.cause}. "
            "Fix the data or its preprocessing (--mean, --std, --input-size), or pass --force to go on."
        )


def check_data(
    model: nn.Module,
    batches: Iterable[Batch],
    walk: Walk,
    spec: InputSpec | None,
    *,
    preprocessed: bool,
    rates_known: bool,
    usual_size: tuple[int, ...] | None = None,
    forward: Forward = call,
    images: int = IMAGES,
    seed: int = 0,
) -> DataVerdict:
    """Compare a sample of the data with the statistics that training left in the model, which is not changed.

    Args:
        model: on its device; wrappers are looked through.
        batches: ready for the model, in random order; as many are read as ``images`` needs.
        walk: of this model.
        spec: the preprocessing in force; None where unknown.
        preprocessed: whether the samples went to the model as they were stored.
        rates_known: whether the model's drop rates are those of the training run.
        usual_size: one sample's shape as the architecture usually takes it.
        forward: ``forward(model, batch)``.
        images: how many samples to look at.
        seed: of dropout and of the augmentations tried.

    Raises DataError and ModelError as ``measure`` does.
    """
    look = _Look(model, _sample(batches, images), walk, rates_known, forward, seed)
    early = look.score("stored", EARLY_LAYERS)
    deep = look.agreement("batch", None)
    if early is None or deep.score is None:
        return DataVerdict("none", deep.reason, images=deep.images)
    spare = _spare(deep.images)
    if early <= EARLY_CLEAN + spare and deep.score <= DEEP_CLEAN + spare:
        return DataVerdict("agree", "", early, deep.score, deep.images, layers=deep)
    return _suspect(look, early, deep, spec, preprocessed, usual_size)


def _spare(images: int) -> float:
    """What the thresholds, measured on IMAGES images, need on top for fewer: scores of n grow like 1/√n."""
    return max(0.0, 1.13 * (1 / math.sqrt(images) - 1 / math.sqrt(IMAGES)))


@dataclass(frozen=True)
class _Look:
    """The sample, and how to score changes of it."""

    model: nn.Module
    batches: Sequence[Batch]
    walk: Walk
    rates_known: bool
    forward: Forward
    seed: int

    def agreement(
        self, normalise: Normalise, layers: int | None, change: Callable[[Tensor], Tensor] | None = None
    ) -> Agreement:
        """How the sample, changed or as it is, agrees."""
        batches = self.batches
        if change is not None:
            with seeded(self.model, self.seed):
                batches = [change(batch) for batch in self.tensors]
        return measure(
            self.model,
            batches,
            self.walk,
            rates_known=self.rates_known,
            forward=self.forward,
            layers=layers,
            normalise=normalise,
            seed=self.seed,
        )

    def score(
        self, normalise: Normalise, layers: int | None, change: Callable[[Tensor], Tensor] | None = None
    ) -> float | None:
        """The score alone."""
        return self.agreement(normalise, layers, change).score

    def tried(self, hypothesis: Hypothesis) -> Tried:
        """The early score of a hypothesis."""
        try:
            score = self.score("stored", EARLY_LAYERS, hypothesis.change)
        except ModelError:  # a size that this architecture does not take, say
            score = None
        return Tried(hypothesis, 1.0 if score is None else score)

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs, if each batch holds exactly one of shape (N, C, …); else nothing."""
        found = [input_tensors(batch) for batch in self.batches]
        return [one[0] for one in found] if all(len(one) == 1 and one[0].ndim > 1 for one in found) else []


def _suspect(
    look: _Look,
    early: float,
    deep: Agreement,
    spec: InputSpec | None,
    preprocessed: bool,
    usual_size: tuple[int, ...] | None,
) -> DataVerdict:
    """The verdict on data that does not simply agree."""
    assert deep.score is not None
    excused_early, excused_deep = _excused(look, early, deep.score, spec, preprocessed)
    spare = _spare(deep.images)
    tried = _tried(look, spec, preprocessed, usual_size)
    parts = early, deep.score, deep.images, tried, deep
    suspicious = early > EARLY_CLEAN + spare and excused_early > EXCUSED + spare
    if suspicious and tried and tried[0].share <= excused_early:
        return DataVerdict("disagree", _named(look, tried[0], early), *parts)
    if excused_early > EARLY_WRONG + spare or excused_deep > DEEP_WRONG + spare:
        return DataVerdict("disagree", _unnamed(look, early, deep, usual_size), *parts)
    return DataVerdict("agree", "", *parts)


def _excused(look: _Look, early: float, deep: float, spec: InputSpec | None, preprocessed: bool) -> tuple[float, float]:
    """The scores under the training augmentation that explains the early ones best, if any does."""
    if not look.tensors:
        return early, deep
    first = look.tensors[0]
    scored = [(early, deep)]
    for change in augmentations(first, _black(first, spec, preprocessed)):
        score = look.score("stored", EARLY_LAYERS, change)
        if score is not None and score < scored[-1][0]:
            scored.append((score, look.score("batch", None, change) or deep))
    return min(one for one, _ in scored), min(other for _, other in scored)


def _black(batch: Tensor, spec: InputSpec | None, preprocessed: bool) -> Tensor:
    channels = batch.shape[1]
    if preprocessed or spec is None:
        return batch.transpose(0, 1).reshape(channels, -1).amin(1)
    mean, std = (torch.tensor(v).expand(channels) for v in (spec.mean or (0.0,), spec.std or (1.0,)))
    return -mean / std


def _tried(
    look: _Look, spec: InputSpec | None, preprocessed: bool, usual_size: tuple[int, ...] | None
) -> tuple[Tried, ...]:
    if not look.tensors:
        return ()
    sample = torch.cat([t for t in look.tensors if t.shape[1:] == look.tensors[0].shape[1:]])
    possible = [*hypotheses(sample, spec, preprocessed=preprocessed), *sizes(sample, usual_size)]
    few = replace(look, batches=[sample[:_RANKING]])
    ranked = sorted((few.tried(one) for one in possible), key=lambda tried: tried.share)
    for place, one in enumerate(ranked[:_FINAL]):
        ranked[place] = look.tried(one.hypothesis)
    return tuple(sorted(ranked, key=lambda tried: tried.share))


def _sample(batches: Iterable[Batch], images: int) -> list[Batch]:
    """The first batches until ``images`` samples are together, the last one cut."""
    found: list[Batch] = []
    for batch in batches:
        size = batch_size(batch)
        if size:
            found.append(batch if size <= images else first_samples(batch, images))
        images -= size
        if images <= 0:
            break
    return found


def _named(look: _Look, best: Tried, early: float) -> str:
    title, advice = best.hypothesis.title, best.hypothesis.advice
    scores = f"score {best.score:.2f} against {early:.2f}"
    return f"{_arriving(look)}; the stored statistics fit {title} ({scores}): {advice}"


def _unnamed(look: _Look, early: float, deep: Agreement, usual_size: tuple[int, ...] | None) -> str:
    worst = deep.worst
    assert worst is not None
    size = ""
    if look.tensors and usual_size is not None and tuple(look.tensors[0].shape[1:]) != usual_size:
        given = "×".join(map(str, look.tensors[0].shape[1:]))
        usual = "×".join(map(str, usual_size))
        size = f", or another input size (the architecture usually takes {usual}; given {given})"
    return (
        f"no usual preprocessing fits (score {early:.2f} in the first BN layers, expected below {EARLY_WRONG}; "
        f"{deep.score:.2f} over all, expected below {DEEP_WRONG}; most in {worst.name}): another data set{size}"
    )


def _arriving(look: _Look) -> str:
    values = torch.cat([t.reshape(len(t), -1)[:, ::7].flatten() for t in look.tensors])
    low, high = float(values.min()), float(values.max())
    return f"the values reach the model as {low:.3g} to {high:.3g}"
