"""A sample of the data in front of a model, scored as it is or as some hypothesis changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ckpt_tools.contract import Walk
from ckpt_tools.errors import ModelError
from ckpt_tools.jobs.hypotheses import Change, Hypothesis
from ckpt_tools.reestimate.agreement import Agreement, measure
from ckpt_tools.reestimate.outliers import InputFilter
from ckpt_tools.reestimate.training import seeded
from ckpt_tools.walker.call import Batch, Forward, batch_size, input_tensors, samples

EARLY_LAYERS = 3
_FEW = 64  # images


@dataclass(frozen=True)
class Tried:
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

    def early(self, change: Change | None = None) -> Agreement:
        """The first layers, on stored statistics: preprocessing and colours show here, and it costs little."""
        return self._measured(change, lambda batches: self._measure(batches, early=True))

    def deep(self, change: Change | None = None) -> Agreement:
        """All layers, on batch statistics: contents and sizes show here."""
        return self._measured(change, lambda batches: self._measure(batches, early=False))

    def tried(self, hypothesis: Hypothesis) -> Tried:
        """The early score of a hypothesis."""
        try:
            score = self.early(hypothesis.change).score
        except ModelError:  # a size that this architecture does not take, say
            score = None
        score = 1.0 if score is None else score
        return Tried(hypothesis.title, hypothesis.advice, score, score / hypothesis.enough)

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs, if every batch is one tensor (N, C, …); else nothing, and nothing can be tried."""
        found = [input_tensors(batch) for batch in self.batches]
        return [one[0] for one in found] if all(len(one) == 1 and one[0].ndim > 1 for one in found) else []

    @property
    def together(self) -> Tensor:
        """All inputs of the first one's shape in one batch."""
        tensors = self.tensors
        return torch.cat([one for one in tensors if one.shape[1:] == tensors[0].shape[1:]])

    @property
    def few(self) -> Sample:
        """The first images alone, to rank hypotheses with."""
        return replace(self, batches=[self.together[:_FEW]])

    def _measured(self, change: Change | None, run: Callable[[Iterable[Batch]], Agreement]) -> Agreement:
        if change is None:
            return run(self.batches)
        with seeded(self.seed):
            changed = [change(tensor) for tensor in self.tensors]
        return run(changed)

    def _measure(self, batches: Iterable[Batch], *, early: bool) -> Agreement:
        return measure(
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


def drawn(batches: Iterable[Batch], images: int) -> list[Batch]:
    """The first batches until ``images`` samples are together, the last one cut, without outliers."""
    found: list[Batch] = []
    usual = InputFilter()
    for number, batch in enumerate(batches):
        size = batch_size(batch)
        if size:
            found.append(usual.remove_outliers(batch if size <= images else samples(batch, 0, images), number))
        images -= size
        if images <= 0:
            break
    return found
