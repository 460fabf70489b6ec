"""Is this the training data? The verdict compares it with what the model remembers of its inputs.

It rests on three scores in 0–1 (see ``agreement``). ``early`` compares the first BN layers on
their stored statistics and is the most sensitive. ``first`` (the first layer alone) and ``deep``
(all layers) are measured on batch statistics. So they do not add up how far the weights of an
unfinished training have moved since the statistics were taken.

Of data that looks suspicious two questions are asked. Does another preprocessing fit almost
perfectly, and the given one does not? Then the data is refused, and the message names the better
one. Are the first layers further from the stored statistics than any usual training augmentation
takes them? Then it is another data set. Everything else is a doubt: training does many things to images, to
weights and to layers that a correction need not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from ckpt_tools.contract import InputSpec, VerdictLevel
from ckpt_tools.diagnosis.agreement import Agreement
from ckpt_tools.diagnosis.augmentations import training_augmentations
from ckpt_tools.diagnosis.data_sample import Sample, ScoredHypothesis, draw_sample
from ckpt_tools.diagnosis.hypotheses import preprocessing_hypotheses, size_hypotheses
from ckpt_tools.errors import CheckFailed
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model
from ckpt_tools.results import Walk


# A dataclass and no tuple, because the JSON report shows the names of the scores.
@dataclass(frozen=True)
class AgreementScores:
    """Distances between the data and the stored statistics, from 0 (none) to 1.

    The module's docstring says which layers each of them compares.
    """

    early: float
    first: float
    deep: float

    def are_below(self, bounds: AgreementScores, spare: float) -> bool:
        """Tell whether no score exceeds its bound by more than ``spare``."""
        pairs = zip(astuple(self), astuple(bounds), strict=True)
        return all(score <= bound + spare for score, bound in pairs)

    @property
    def shallow(self) -> float:
        """The smaller one of the scores that depend little on weights behind the first layers."""
        return min(self.early, self.first)


SAMPLE_IMAGES = 256  # how many images are looked at, and the thresholds were measured on
# Data with all scores below these agrees, and no hypothesis is tried.
UNSUSPICIOUS_SCORES = AgreementScores(early=0.12, first=0.15, deep=0.12)
# Data whose early and first scores are both above this is another data set, unless some augmentation
# brings one of them below the lower bound. Of photographs given for digits, all but a few per cent are
# above both, and no right data is, whatever its net's training did to images and weights (scripts/run
# bench refusals). The deep score does not count: averaged or pruned weights move it as well.
OTHER_DATA_SCORE, EXCUSED_SCORE = 0.25, 0.175
# This comes on top of both for a training that has hardly begun.
EARLY_TRAINING_MARGIN = 0.10
# After so many batches weights, and with them the statistics, move no faster than at the end.
SETTLED_BATCHES = 150
PERFECT_FIT_SCORE = 0.06  # an early score that no other preprocessing needs to beat
_FINALISTS = 3  # of the hypotheses, ranked on few images, so many are scored on all


@dataclass(frozen=True)
class DataVerdict:
    """Whether the data looks like the training data, in numbers and in a sentence.

    Attributes:
        verdict: "none" if nobody can tell.
        cause: what was seen, or why nobody can tell; empty for "agree".
        scores: None if nobody can tell.
        images: how many samples were compared.
        tried: every hypothesis, best first; empty if nothing was suspicious.
        layers: the deep score, layer by layer.
    """

    verdict: VerdictLevel
    cause: str = ""
    scores: AgreementScores | None = None
    images: int = 0
    tried: tuple[ScoredHypothesis, ...] = ()
    layers: Agreement | None = None

    @property
    def early_score(self) -> float | None:
        """The most sensitive score, that of the first layers."""
        return self.scores.early if self.scores else None

    @property
    def deep_score(self) -> float | None:
        """The score over all layers."""
        return self.scores.deep if self.scores else None


def refuse_unlike_training_data(verdict: DataVerdict) -> None:
    """Raise CheckFailed, which ends a command with exit code 4, if the data is refused."""
    if verdict.verdict == "refuse":
        raise CheckFailed(
            f"this does not look like the data that the model was trained on: {verdict.cause}. "
            "Fix the data or its preprocessing, use --estimator ratio, which does not depend on it, "
            "or pass --force to go on."
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
    """Compare a sample of the data with the statistics that training has left in the model.

    The model is not changed. Data that agrees costs little more than one forward of the sample.
    Suspicious data costs some dozen forwards of 64 images that end at the third BN layer.

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
        DataError: NaN in a batch.
        ModelError: the model cannot run on a batch.
    """
    sample = Sample(
        model=model,
        batches=draw_sample(batches, images),
        walk=walk,
        spec=spec,
        preprocessed=preprocessed,
        usual_size=usual_size,
        rates_known=rates_known,
        counted=counted,
        forward=forward,
        rows_are_samples=getattr(batches, "rows_are_samples", False),
        seed=seed,
    )
    deep = sample.deep_agreement()
    scores = _scores(sample.early_agreement(), deep)
    if scores is None:
        return DataVerdict("none", deep.reason, images=deep.images)
    if scores.are_below(UNSUSPICIOUS_SCORES, _spare(deep.images)):
        return DataVerdict("agree", "", scores, deep.images, layers=deep)
    tried = _score_hypotheses(sample)
    refusal = _better_preprocessing(sample, scores, deep, tried)
    if not refusal:
        refusal = _other_data_set(sample, scores, deep)
    if refusal:
        return DataVerdict("refuse", refusal, scores, deep.images, tried, deep)
    return DataVerdict("doubt", _describe_doubt(scores, deep), scores, deep.images, tried, deep)


def _scores(early: Agreement, deep: Agreement) -> AgreementScores | None:
    if early.score is None or deep.score is None:
        return None
    # The input of the first layer has passed no other BN layer.
    return AgreementScores(early.score, deep.layers[0].distance, deep.score)


def _margin(deep: Agreement) -> float:
    """Return what right data of this sample's size may have above the bounds."""
    batches = SETTLED_BATCHES if deep.batches is None else min(deep.batches, SETTLED_BATCHES)
    return (1 - batches / SETTLED_BATCHES) * EARLY_TRAINING_MARGIN + _spare(deep.images)


def _spare(images: int) -> float:
    """Return what comes on top of the thresholds for a sample of fewer than SAMPLE_IMAGES."""
    # Sampling n images moves Δ and λ/√2 of a channel (see ``agreement``) by 1/√n, and so the score
    # by 0.8 · √2/√n = 1.13/√n.
    return max(0.0, 1.13 * (1 / math.sqrt(images) - 1 / math.sqrt(SAMPLE_IMAGES)))


def _better_preprocessing(
    sample: Sample, scores: AgreementScores, deep: Agreement, tried: tuple[ScoredHypothesis, ...]
) -> str:
    """Return which other preprocessing explains the data almost perfectly; empty if none does."""
    spare = _spare(deep.images)
    if not tried or scores.early <= UNSUSPICIOUS_SCORES.early + spare:
        return ""
    best = tried[0]
    if best.score > PERFECT_FIT_SCORE + spare or scores.early <= best.needed:
        return ""
    fit = (
        f"the stored statistics fit {best.title} almost perfectly (score {best.score:.2f}, expected "
        f"{PERFECT_FIT_SCORE + spare:.2f} at most) and the data as given not (score {scores.early:.2f}, "
        f"expected {UNSUSPICIOUS_SCORES.early + spare:.2f} at most)"
    )
    return f"{_describe_value_range(sample)}; {fit}: {best.advice}"


def _other_data_set(sample: Sample, scores: AgreementScores, deep: Agreement) -> str:
    """Return how far beyond every training augmentation the data is; empty if it is not."""
    margin = _margin(deep)
    if scores.shallow <= OTHER_DATA_SCORE + margin:
        return ""
    excused = _scores_with_augmentation(sample) or scores
    if excused.shallow <= EXCUSED_SCORE + margin:
        return ""
    worst = deep.worst
    assert worst is not None
    return (
        f"no usual preprocessing fits, and no usual augmentation (score {scores.shallow:.2f} in the first BN "
        f"layers, expected {OTHER_DATA_SCORE + margin:.2f} at most, and {excused.shallow:.2f} with the best "
        f"one, expected {EXCUSED_SCORE + margin:.2f} at most; most in {worst.name}): another data "
        f"set{_describe_size(sample)}"
    )


def _describe_doubt(scores: AgreementScores, deep: Agreement) -> str:
    spare = _spare(deep.images)
    places = {"early": "the first BN layers", "first": "the first BN layer", "deep": "all BN layers"}
    broken = [
        f"{score:.2f} in {places[name]} where {bound + spare:.2f} is usual"
        for name, score in vars(scores).items()
        if score > (bound := vars(UNSUSPICIOUS_SCORES)[name]) + spare
    ]
    return (
        f"the distance from the stored statistics is {', '.join(broken)}, as after training with strong "
        "augmentation, with averaged or merged weights, or on other samples of the data"
    )


def _scores_with_augmentation(sample: Sample) -> AgreementScores | None:
    """Return the scores under the training augmentation that explains the early one best."""
    if not sample.batch_tensors:
        return None
    batch, small_sample = sample.concatenated_inputs, sample.small_sample
    scored_changes = []
    for change in training_augmentations(batch, _black(sample, batch)):
        score = small_sample.early_agreement(change).score
        if score is not None:
            scored_changes.append((score, change))
    if not scored_changes:
        return None
    _, best_change = min(scored_changes, key=lambda pair: pair[0])
    return _scores(sample.early_agreement(best_change), sample.deep_agreement(best_change))


def _black(sample: Sample, batch: Tensor) -> Tensor:
    """Return the value (C,) of a black pixel; of preprocessed floats that is the lowest value."""
    channels, spec = batch.shape[1], sample.spec
    if sample.preprocessed or spec is None:
        return batch.transpose(0, 1).reshape(channels, -1).amin(1)
    mean, std = torch.tensor(spec.mean or (0.0,)), torch.tensor(spec.std or (1.0,))
    return -mean.expand(channels) / std.expand(channels)


def _score_hypotheses(sample: Sample) -> tuple[ScoredHypothesis, ...]:
    """Score all hypotheses, the best ones on the whole sample, and return them, best first."""
    if not sample.batch_tensors:
        return ()
    batch, small_sample = sample.concatenated_inputs, sample.small_sample
    hypotheses = [
        *preprocessing_hypotheses(batch, sample.spec, preprocessed=sample.preprocessed),
        *size_hypotheses(batch, sample.usual_size),
    ]
    # The small sample is enough for a ranking, and only the best ones cost a run of the whole one.
    scored = [(small_sample.score_hypothesis(hypothesis), hypothesis) for hypothesis in hypotheses]
    scored.sort(key=lambda pair: pair[0].needed)
    results = [sample.score_hypothesis(hypothesis) for _, hypothesis in scored[:_FINALISTS]]
    results += [result for result, _ in scored[_FINALISTS:]]
    return tuple(sorted(results, key=lambda result: result.needed))


def _describe_value_range(sample: Sample) -> str:
    low = min(float(tensor.min()) for tensor in sample.batch_tensors)
    high = max(float(tensor.max()) for tensor in sample.batch_tensors)
    return f"the values reach the model as {low:.3g} to {high:.3g}"


def _describe_size(sample: Sample) -> str:
    """Return how the size differs from the usual one, as the end of a message.

    It is empty if the sizes are equal or unknown.
    """
    if sample.usual_size is None or not sample.batch_tensors:
        return ""
    shape = tuple(sample.batch_tensors[0].shape[1:])
    if shape == sample.usual_size:
        return ""
    usual_text, text = ("×".join(map(str, size)) for size in (sample.usual_size, shape))
    return f", or another input size (the architecture usually takes {usual_text}, given {text})"
