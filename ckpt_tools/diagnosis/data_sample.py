"""A sample of the data in front of a model, scored as it is or as some hypothesis changes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ckpt_tools.contract import InputSpec
from ckpt_tools.diagnosis.agreement import Agreement, measure_agreement
from ckpt_tools.diagnosis.augmentations import BatchChange
from ckpt_tools.diagnosis.hypotheses import Hypothesis
from ckpt_tools.errors import ModelError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors, slice_samples
from ckpt_tools.model.calling import Forward
from ckpt_tools.model.randomness import seed_temporarily
from ckpt_tools.observation.outliers import InputFilter
from ckpt_tools.results import Walk

EARLY_LAYERS = 3  # how many layers the early score compares
_SMALL_SAMPLE_IMAGES = 64


@dataclass(frozen=True)
class ScoredHypothesis:
    """A hypothesis with the early score of the data as it changes it.

    The ``score`` is 1 if the model cannot run on the changed data. ``needed`` is the score that the
    data as given must exceed for the hypothesis to be believed.
    """

    title: str
    advice: str
    score: float
    needed: float


@dataclass(frozen=True)
class Sample:
    """A few batches, what is known about them, the model that they go into, and how to run it.

    Attributes:
        model: on its device.
        batches: ready for the model.
        walk: of this model.
        spec: the preprocessing in force; None where unknown.
        preprocessed: whether the samples go to the model as they were stored.
        usual_size: one sample's shape as the architecture usually takes it; None where unknown.
        rates_known: whether the model's drop rates are those of the training run.
        counted: whether the counters of the model's BN layers are those of the training run.
        forward: ``forward(model, batch)``.
        seed: of dropout and of the random changes.
    """

    model: nn.Module
    batches: Sequence[Batch]
    walk: Walk
    spec: InputSpec | None
    preprocessed: bool
    usual_size: tuple[int, ...] | None
    rates_known: bool
    counted: bool
    forward: Forward
    rows_are_samples: bool
    seed: int

    def early_agreement(self, change: BatchChange | None = None) -> Agreement:
        """Measure the first layers, which normalise by their stored statistics.

        Preprocessing and colours show there, and it costs little.
        """
        return self._measure(change, early=True)

    def deep_agreement(self, change: BatchChange | None = None) -> Agreement:
        """Measure all layers, which normalise by batch statistics.

        The contents and the sizes of images show there.
        """
        return self._measure(change, early=False)

    def score_hypothesis(self, hypothesis: Hypothesis) -> ScoredHypothesis:
        """Measure the early score of the data as a hypothesis changes it."""
        score = None
        # The architecture may not take images of this size.
        with contextlib.suppress(ModelError):
            score = self.early_agreement(hypothesis.change).score
        score = 1.0 if score is None else score
        needed = score / hypothesis.max_ratio
        return ScoredHypothesis(hypothesis.title, hypothesis.advice, score, needed)

    @property
    def batch_tensors(self) -> list[Tensor]:
        """The inputs of all batches, if each is one tensor (N, C, …).

        Otherwise this is empty, and no change of the data can be tried.
        """
        inputs = [input_tensors(batch) for batch in self.batches]
        if any(len(tensors) != 1 or tensors[0].ndim < 2 for tensors in inputs):
            return []
        return [tensors[0] for tensors in inputs]

    @property
    def concatenated_inputs(self) -> Tensor:
        """All inputs that have the shape of the first one, in one batch."""
        tensors = self.batch_tensors
        shape = tensors[0].shape[1:]
        return torch.cat([tensor for tensor in tensors if tensor.shape[1:] == shape])

    @property
    def small_sample(self) -> Sample:
        """The first images alone, to rank hypotheses with."""
        return replace(self, batches=[self.concatenated_inputs[:_SMALL_SAMPLE_IMAGES]])

    def _measure(self, change: BatchChange | None, *, early: bool) -> Agreement:
        batches: Iterable[Batch] = self.batches
        if change is not None:
            # Every hypothesis and every call sees the same random change.
            with seed_temporarily(self.seed):
                batches = [change(tensor) for tensor in self.batch_tensors]
        return measure_agreement(
            self.model,
            batches,
            self.walk,
            rates_known=self.rates_known,
            forward=self.forward,
            layers=EARLY_LAYERS if early else None,
            normalise="stored" if early else "batch",
            counted=self.counted,
            rows_are_samples=self.rows_are_samples,
            seed=self.seed,
        )


def draw_sample(batches: Iterable[Batch], images: int) -> list[Batch]:
    """Return the first batches, with ``images`` samples in all, less those that are outliers.

    The last batch is cut. Of the iterable no more batches are taken than needed. A stream that says
    that the rows of its batches are not known to be samples has none cut: a batch with an outlier is
    left out as a whole, unless there is no other.
    """
    sample: list[Batch] = []
    left_out: list[Batch] = []
    may_cut = getattr(batches, "rows_are_samples", True)
    # A single outlier can move the moments of every layer.
    usual_inputs = InputFilter()
    for number, batch in enumerate(batches):
        if may_cut and batch_size(batch) > images:
            batch = slice_samples(batch, 0, images)
        size, usual = batch_size(batch), usual_inputs.remove_outliers(batch, number)
        if size and (may_cut or batch_size(usual) == size):
            sample.append(usual)
        elif size:
            left_out.append(batch)
        images -= size
        if images <= 0:
            break
    return sample or left_out[:1]
