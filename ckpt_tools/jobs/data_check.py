"""Is this the training data? What the model remembers of its inputs, against what it is about to be given.

Two scores in 0–1 (``reestimate.agreement``): ``early`` is that of the first BN layers on their stored statistics,
``deep`` that of all layers on batch statistics. Of data that looks suspicious two questions are asked: would some usual
training augmentation explain it (then it is excused), and does another preprocessing fit much better (then
it is refused, and the better one named)? The thresholds come from ``scripts/bench-data``; its figures, false alarms and
misses among them, stand in ``scripts/bench_data.json``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ckpt_tools.contract import InputSpec, Walk
from ckpt_tools.errors import CheckFailed
from ckpt_tools.jobs.data_sample import Sample, Tried, drawn
from ckpt_tools.jobs.hypotheses import augmentations, hypotheses, sizes
from ckpt_tools.reestimate.agreement import Agreement
from ckpt_tools.walker.call import Batch, Forward, call

IMAGES = 256  # looked at
EARLY_CLEAN, DEEP_CLEAN = 0.12, 0.20  # below both, nothing else is tried
EARLY_WRONG, DEEP_WRONG = 0.27, 0.25  # above one, with every excuse, the data is refused
EXCUSED = 0.06  # a score that no other preprocessing needs to beat
_FINAL = 3  # hypotheses, ranked on few images, that are then scored on all


@dataclass(frozen=True)
class DataVerdict:
    """Whether the data looks like the training data, in numbers and in a sentence.

    ``early`` and ``deep``: 0 where the stored statistics are those of the data, 1 as far as it goes; None for
    "none", whose ``cause`` says why nobody can tell. ``tried``: every hypothesis, best first; empty where nothing was
    suspicious. ``layers``: the deep score, layer by layer.
    """

    verdict: Literal["agree", "disagree", "none"]
    cause: str = ""
    early: float | None = None
    deep: float | None = None
    images: int = 0
    tried: tuple[Tried, ...] = ()
    layers: Agreement | None = None

    @property
    def best(self) -> Tried | None:
        """The hypothesis that fits best."""
        return self.tried[0] if self.tried else None


def refuse(verdict: DataVerdict) -> None:
    """Raise CheckFailed if the data disagrees."""
    if verdict.verdict == "disagree":
        raise CheckFailed(
            f"this does not look like the data that the model was trained on: {verdict.cause}. "
            "Fix the data or its preprocessing, or pass --force to go on."
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

    Data that agrees costs little more than one forward of the sample; suspicious data some dozen forwards of
    64 images that end at the third BN layer.

    Args:
        model: on its device; wrappers are looked through.
        batches: ready for the model, in random order; as many are read as ``images`` needs.
        walk: of this model.
        spec: the preprocessing in force; None where unknown.
        preprocessed: whether the samples go to the model as they were stored.
        rates_known: whether the model's drop rates are those of the training run.
        usual_size: one sample's shape as the architecture usually takes it.
        forward: ``forward(model, batch)``.
        images: how many samples to look at.
        seed: of dropout and of the augmentations tried.

    Raises:
        DataError: NaN in a batch, a batch of one value per channel.
        ModelError: the model cannot run on a batch.
    """
    sample = Sample(model, drawn(batches, images), walk, rates_known, forward, seed)
    early, deep = sample.early(), sample.deep()
    if early.score is None or deep.score is None:
        return DataVerdict("none", deep.reason, images=deep.images)
    spare = _spare(deep.images)
    scores = early.score, deep.score
    if early.score <= EARLY_CLEAN + spare and deep.score <= DEEP_CLEAN + spare:
        return DataVerdict("agree", "", *scores, deep.images, layers=deep)
    tried = _tried(sample, spec, preprocessed, usual_size)
    cause = _cause(sample, scores, _excused(sample, scores, spec, preprocessed), deep, tried, usual_size)
    return DataVerdict("disagree" if cause else "agree", cause, *scores, deep.images, tried, deep)


Scores = tuple[float, float]
"""Early and deep."""


def _spare(images: int) -> float:
    """What thresholds that were measured on IMAGES images need on top for fewer: scores of n grow like 1/√n."""
    return max(0.0, 1.13 * (1 / math.sqrt(images) - 1 / math.sqrt(IMAGES)))


def _cause(
    sample: Sample,
    scores: Scores,
    excused: Scores,
    deep: Agreement,
    tried: tuple[Tried, ...],
    usual_size: tuple[int, ...] | None,
) -> str:
    """Why the data is refused; empty if it is not."""
    spare = _spare(deep.images)
    if tried and scores[0] > EARLY_CLEAN + spare and excused[0] > max(EXCUSED + spare, tried[0].share):
        best = tried[0]
        fit = f"the stored statistics fit {best.hypothesis.title} (score {best.score:.2f} against {scores[0]:.2f})"
        return f"{_arriving(sample)}; {fit}: {best.hypothesis.advice}"
    if excused[0] <= EARLY_WRONG + spare and excused[1] <= DEEP_WRONG + spare:
        return ""
    worst = deep.worst
    assert worst is not None
    return (
        f"no usual preprocessing fits (score {scores[0]:.2f} in the first BN layers, expected below {EARLY_WRONG}; "
        f"{scores[1]:.2f} over all of them, expected below {DEEP_WRONG}; most in {worst.name}): another data set"
        f"{_other_size(sample, usual_size)}"
    )


def _excused(sample: Sample, scores: Scores, spec: InputSpec | None, preprocessed: bool) -> Scores:
    """The scores under the training augmentation that explains the early one best, if any does."""
    if not sample.tensors:
        return scores
    few = sample.few
    changes = augmentations(sample.together, _black(sample.together, spec, preprocessed))
    found = [(score, change) for change in changes if (score := few.early(change).score) is not None]
    if not found:
        return scores
    _, change = min(found, key=lambda one: one[0])
    changed = sample.early(change).score, sample.deep(change).score
    return min(scores[0], changed[0] or 1.0), min(scores[1], changed[1] or 1.0)


def _black(batch: Tensor, spec: InputSpec | None, preprocessed: bool) -> Tensor:
    """The value (C,) of a black pixel; of preprocessed floats, the lowest there is."""
    channels = batch.shape[1]
    if preprocessed or spec is None:
        return batch.transpose(0, 1).reshape(channels, -1).amin(1)
    mean, std = (torch.tensor(v).expand(channels) for v in (spec.mean or (0.0,), spec.std or (1.0,)))
    return -mean / std


def _tried(
    sample: Sample, spec: InputSpec | None, preprocessed: bool, usual_size: tuple[int, ...] | None
) -> tuple[Tried, ...]:
    if not sample.tensors:
        return ()
    batch, few = sample.together, sample.few
    possible = [*hypotheses(batch, spec, preprocessed=preprocessed), *sizes(batch, usual_size)]
    ranked = sorted((few.tried(one) for one in possible), key=lambda tried: tried.share)
    ranked[:_FINAL] = [sample.tried(one.hypothesis) for one in ranked[:_FINAL]]
    return tuple(sorted(ranked, key=lambda tried: tried.share))


def _arriving(sample: Sample) -> str:
    values = torch.stack([torch.stack(torch.aminmax(tensor)) for tensor in sample.tensors])
    return f"the values reach the model as {float(values.min()):.3g} to {float(values.max()):.3g}"


def _other_size(sample: Sample, usual_size: tuple[int, ...] | None) -> str:
    shape = tuple(sample.tensors[0].shape[1:]) if sample.tensors else None
    if shape is None or usual_size is None or shape == usual_size:
        return ""
    usual, given = ("×".join(map(str, size)) for size in (usual_size, shape))
    return f", or another input size (the architecture usually takes {usual}, given {given})"
