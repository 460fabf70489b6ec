"""A sample of the data in front of a model, scored as it is or as some hypothesis changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ckpt_tools.diagnosis.agreement import Agreement, measure_agreement
from ckpt_tools.diagnosis.hypotheses import BatchChange, Hypothesis
from ckpt_tools.errors import ModelError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors, slice_samples
from ckpt_tools.model.calling import Forward
from ckpt_tools.model.randomness import seed_temporarily
from ckpt_tools.reestimate.outliers import InputFilter
from ckpt_tools.results import Walk

EARLY_LAYERS = 3
_FEW = 64  # images


@dataclass(frozen=True)
class ScoredHypothesis:
    """A hypothesis with its early score, 1 if the model cannot run on what it makes of the data.

    ``needed`` is what the data as given must score for the hypothesis to be believed.
    """

    title: str
    advice: str
    score: float
    needed: float


@dataclass(frozen=True)
class Sample:
    """A few batches, the model they go into, and how to run it."""

    model: nn.Module
    batches: Sequence[Batch]
    walk: Walk
    rates_known: bool
    counted: bool
    forward: Forward
    seed: int

    def early_agreement(self, change: BatchChange | None = None) -> Agreement:
        """The first layers, on stored statistics: preprocessing and colours show here, and it costs little."""
        return self._measure_changed(change, lambda batches: self._measure(batches, early=True))

    def deep_agreement(self, change: BatchChange | None = None) -> Agreement:
        """All layers, on batch statistics: contents and sizes show here."""
        return self._measure_changed(change, lambda batches: self._measure(batches, early=False))

    def score_hypothesis(self, hypothesis: Hypothesis) -> ScoredHypothesis:
        """The early score of a hypothesis."""
        try:
            score = self.early_agreement(hypothesis.change).score
        except ModelError:  # a size that this architecture does not take, say
            score = None
        score = 1.0 if score is None else score
        return ScoredHypothesis(hypothesis.title, hypothesis.advice, score, score / hypothesis.enough)

    @property
    def batch_tensors(self) -> list[Tensor]:
        """The inputs, if every batch is one tensor (N, C, …); else nothing, and nothing can be tried."""
        found = [input_tensors(batch) for batch in self.batches]
        return [one[0] for one in found] if all(len(one) == 1 and one[0].ndim > 1 for one in found) else []

    @property
    def concatenated_inputs(self) -> Tensor:
        """All inputs of the first one's shape in one batch."""
        tensors = self.batch_tensors
        return torch.cat([one for one in tensors if one.shape[1:] == tensors[0].shape[1:]])

    @property
    def small_sample(self) -> Sample:
        """The first images alone, to rank hypotheses with."""
        return replace(self, batches=[self.concatenated_inputs[:_FEW]])

    def _measure_changed(self, change: BatchChange | None, run: Callable[[Iterable[Batch]], Agreement]) -> Agreement:
        if change is None:
            return run(self.batches)
        with seed_temporarily(self.seed):
            changed = [change(tensor) for tensor in self.batch_tensors]
        return run(changed)

    def _measure(self, batches: Iterable[Batch], *, early: bool) -> Agreement:
        return measure_agreement(
            self.model,
            batches,
            self.walk,
            rates_known=self.rates_known,
            forward=self.forward,
            layers=EARLY_LAYERS if early else None,
            normalise="stored" if early else "batch",
            counted=self.counted,
            seed=self.seed,
        )


def draw_sample(batches: Iterable[Batch], images: int) -> list[Batch]:
    """The first batches until ``images`` samples are together, the last one cut, without outliers."""
    found: list[Batch] = []
    usual = InputFilter()
    for number, batch in enumerate(batches):
        size = batch_size(batch)
        if size:
            found.append(usual.remove_outliers(batch if size <= images else slice_samples(batch, 0, images), number))
        images -= size
        if images <= 0:
            break
    return found
