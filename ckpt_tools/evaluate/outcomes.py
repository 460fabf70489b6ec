"""The few numbers of every image from which all metrics are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Tensors of shape (N,) on the CPU: an entry for each image, in the order of reading.

    ``correct``: whether the logit of the label is the largest. ``among_five``: whether it is one of
    the five largest; None for heads with fewer than six outputs. ``nll`` (in nats) and
    ``confidence``, the probability of the largest logit, are float64.
    """

    correct: Tensor
    among_five: Tensor | None
    nll: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Outcomes:
        """Compute the outcomes from logits (N, C) on any device and labels (N,) int64."""
        labels = labels.to(logits.device)
        log_p = logits.double().log_softmax(1)
        # Comparing with the label's own logit would call a network whose logits are all equal
        # always right; topk and argmax pick one of equal logits.
        five = logits.topk(TOP, 1).indices if logits.shape[1] > TOP else None
        return cls(
            correct=(logits.argmax(1) == labels).cpu(),
            among_five=None if five is None else (five == labels[:, None]).any(1).cpu(),
            nll=-log_p.gather(1, labels[:, None])[:, 0].cpu(),
            confidence=log_p.amax(1).exp().cpu(),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """Return the outcomes of several batches as one."""
        fives = [part.among_five for part in parts if part.among_five is not None]
        return cls(
            correct=torch.cat([part.correct for part in parts]),
            among_five=torch.cat(fives) if fives else None,
            nll=torch.cat([part.nll for part in parts]),
            confidence=torch.cat([part.confidence for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.correct)
