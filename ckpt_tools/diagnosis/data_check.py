"""Is this the training data? What the model remembers of its inputs, against what it is about to be given.

Three scores in 0–1 (``reestimate.agreement``): ``early``, the first BN layers on their stored statistics, is the most
sensitive; ``first``, the first of them, and ``deep``, all layers on batch statistics, do not add up how far the
weights of an unfinished training have moved since the statistics were taken.

Of data that looks suspicious two questions are asked: would some usual training augmentation explain it (then it
is excused), and does another preprocessing fit much better (then it is refused, and the better one named)? The
thresholds come from ``scripts/run bench data-check``; its figures, false alarms and misses, stand in
``scripts/bench/results/data_check.json``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ckpt_tools.contract import InputSpec
from ckpt_tools.diagnosis.agreement import Agreement
from ckpt_tools.diagnosis.data_sample import Sample, ScoredHypothesis, draw_sample
from ckpt_tools.diagnosis.hypotheses import preprocessing_hypotheses, size_hypotheses, training_augmentations
from ckpt_tools.errors import CheckFailed
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model
from ckpt_tools.results import Walk


@dataclass(frozen=True)
class AgreementScores:
    """0 where the stored statistics are those of the data, 1 as far as it goes."""

    early: float
    first: float
    deep: float

    def are_below(self, bounds: AgreementScores, spare: float) -> bool:
        """Whether no score is above its bound by more than ``spare``."""
        pairs = zip(astuple(self), astuple(bounds), strict=True)
        return all(score <= bound + spare for score, bound in pairs)

    def elementwise_minimum(self, other: AgreementScores) -> AgreementScores:
        """The smaller of each."""
        return AgreementScores(*map(min, astuple(self), astuple(other)))


SAMPLE_IMAGES = 256  # looked at
UNSUSPICIOUS_SCORES = AgreementScores(early=0.12, first=0.15, deep=0.12)  # below all, nothing else is tried
REFUSAL_SCORES = AgreementScores(early=0.22, first=0.22, deep=0.17)  # above one, with every excuse, the data is refused
EARLY_TRAINING_MARGIN = AgreementScores(
    early=0.15, first=0.10, deep=0.08
)  # on top for a training that has hardly begun
SETTLED_BATCHES = 150  # batches after which weights, and with them the statistics, move no faster than at the end
MAX_EXCUSED_SCORE = 0.15  # an augmentation that leaves more than this of the early score explains nothing
PERFECT_FIT_SCORE = 0.06  # an early score that no other preprocessing needs to beat
_FINAL = 3  # hypotheses, ranked on few images, that are then scored on all


@dataclass(frozen=True)
class DataVerdict:
    """Whether the data looks like the training data, in numbers and in a sentence.

    ``scores`` is None for "none", whose ``cause`` says why nobody can tell. ``tried``: every hypothesis, best first;
    empty where nothing was suspicious. ``layers``: the deep score, layer by layer.
    """

    verdict: Literal["agree", "disagree", "none"]
    cause: str = ""
    scores: AgreementScores | None = None
    images: int = 0
    tried: tuple[ScoredHypothesis, ...] = ()
    layers: Agreement | None = None

    @property
    def early_score(self) -> float | None:
        """The most sensitive score."""
        return self.scores.early if self.scores else None

    @property
    def deep_score(self) -> float | None:
        """The score over all layers."""
        return self.scores.deep if self.scores else None

    @property
    def best_hypothesis(self) -> ScoredHypothesis | None:
        """The hypothesis that fits best."""
        return self.tried[0] if self.tried else None


def refuse_unlike_training_data(verdict: DataVerdict) -> None:
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
    counted: bool = True,
    usual_size: tuple[int, ...] | None = None,
    forward: Forward = call_model,
    images: int = SAMPLE_IMAGES,
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
        counted: whether the counters of the model's BN layers are those of the training run.
        usual_size: one sample's shape as the architecture usually takes it.
        forward: ``forward(model, batch)``.
        images: how many samples to look at.
        seed: of dropout and of the augmentations tried.

    Raises:
        DataError: NaN in a batch, a batch of one value per channel.
        ModelError: the model cannot run on a batch.
    """
    sample = Sample(model, draw_sample(batches, images), walk, rates_known, counted, forward, seed)
    deep = sample.deep_agreement()
    scores = _scores(sample.early_agreement(), deep)
    if scores is None:
        return DataVerdict("none", deep.reason, images=deep.images)
    if scores.are_below(UNSUSPICIOUS_SCORES, _spare(deep.images)):
        return DataVerdict("agree", "", scores, deep.images, layers=deep)
    tried = _score_hypotheses(sample, spec, preprocessed, usual_size)
    cause = _cause(
        sample, scores, _scores_with_augmentation(sample, scores, spec, preprocessed), deep, tried, usual_size
    )
    return DataVerdict("disagree" if cause else "agree", cause, scores, deep.images, tried, deep)


def _scores(early: Agreement, deep: Agreement) -> AgreementScores | None:
    if early.score is None or deep.score is None:
        return None
    return AgreementScores(early.score, deep.layers[0].distance, deep.score)


def score_bounds(batches: int | None) -> AgreementScores:
    """What the data may score, by the number of batches the model was trained on; None: nobody counted."""
    moving = 0.0 if batches is None else max(0.0, 1 - batches / SETTLED_BATCHES)
    return AgreementScores(
        *(
            wrong + moving * more
            for wrong, more in zip(astuple(REFUSAL_SCORES), astuple(EARLY_TRAINING_MARGIN), strict=True)
        )
    )


def _spare(images: int) -> float:
    """What thresholds that were measured on IMAGES images need on top for fewer: scores of n grow like 1/√n."""
    return max(0.0, 1.13 * (1 / math.sqrt(images) - 1 / math.sqrt(SAMPLE_IMAGES)))


def _cause(
    sample: Sample,
    scores: AgreementScores,
    excused: AgreementScores,
    deep: Agreement,
    tried: tuple[ScoredHypothesis, ...],
    usual_size: tuple[int, ...] | None,
) -> str:
    """Why the data is refused; empty if it is not."""
    spare = _spare(deep.images)
    suspicious = scores.early > UNSUSPICIOUS_SCORES.early + spare
    if tried and suspicious and excused.early > max(PERFECT_FIT_SCORE + spare, tried[0].needed):
        best = tried[0]
        fit = f"the stored statistics fit {best.title} (score {best.score:.2f} against {scores.early:.2f})"
        return f"{_describe_value_range(sample)}; {fit}: {best.advice}"
    allowed = score_bounds(deep.batches)
    if excused.are_below(allowed, spare):
        return ""
    worst = deep.worst
    assert worst is not None
    return (
        f"no usual preprocessing fits (score {scores.early:.2f} in the first BN layers and {scores.deep:.2f} over all, "
        f"expected below {allowed.early:.2f} and {allowed.deep:.2f}; most in {worst.name}): "
        f"another data set{_other_size(sample, usual_size)}"
    )


def _scores_with_augmentation(
    sample: Sample, scores: AgreementScores, spec: InputSpec | None, preprocessed: bool
) -> AgreementScores:
    """The scores under the training augmentation that explains the early one best, if any does."""
    if not sample.batch_tensors:
        return scores
    few = sample.small_sample
    changes = training_augmentations(sample.concatenated_inputs, _black(sample.concatenated_inputs, spec, preprocessed))
    found = [(score, change) for change in changes if (score := few.early_agreement(change).score) is not None]
    if not found:
        return scores
    _, change = min(found, key=lambda one: one[0])
    changed = _scores(sample.early_agreement(change), sample.deep_agreement(change))
    if changed is None or changed.early > MAX_EXCUSED_SCORE + _spare(sum(map(len, sample.batch_tensors))):
        return scores
    return scores.elementwise_minimum(changed)


def _black(batch: Tensor, spec: InputSpec | None, preprocessed: bool) -> Tensor:
    """The value (C,) of a black pixel; of preprocessed floats, the lowest there is."""
    channels = batch.shape[1]
    if preprocessed or spec is None:
        return batch.transpose(0, 1).reshape(channels, -1).amin(1)
    mean, std = (torch.tensor(v).expand(channels) for v in (spec.mean or (0.0,), spec.std or (1.0,)))
    return -mean / std


def _score_hypotheses(
    sample: Sample, spec: InputSpec | None, preprocessed: bool, usual_size: tuple[int, ...] | None
) -> tuple[ScoredHypothesis, ...]:
    if not sample.batch_tensors:
        return ()
    batch, few = sample.concatenated_inputs, sample.small_sample
    possible = [*preprocessing_hypotheses(batch, spec, preprocessed=preprocessed), *size_hypotheses(batch, usual_size)]
    ranked = sorted(((few.score_hypothesis(one), one) for one in possible), key=lambda pair: pair[0].needed)
    tried = [sample.score_hypothesis(one) for _, one in ranked[:_FINAL]] + [tried for tried, _ in ranked[_FINAL:]]
    return tuple(sorted(tried, key=lambda one: one.needed))


def _describe_value_range(sample: Sample) -> str:
    values = torch.stack([torch.stack(torch.aminmax(tensor)) for tensor in sample.batch_tensors])
    return f"the values reach the model as {float(values.min()):.3g} to {float(values.max()):.3g}"


def _other_size(sample: Sample, usual_size: tuple[int, ...] | None) -> str:
    shape = tuple(sample.batch_tensors[0].shape[1:]) if sample.batch_tensors else None
    if shape is None or usual_size is None or shape == usual_size:
        return ""
    usual, given = ("×".join(map(str, size)) for size in (usual_size, shape))
    return f", or another input size (the architecture usually takes {usual}, given {given})"
