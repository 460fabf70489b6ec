"""What became of every image: the few numbers that all metrics are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5


@dataclass(frozen=True, eq=False)
class Outcomes:
    """One entry an image, each (N,), on the CPU, in the order in which the images were read.

    ``correct``: the largest logit is that of the label. ``among_five``: it is one of the five largest; None for heads
    with fewer than six outputs. ``nll`` in nats and ``confidence``, the probability of the largest, are float64.
    """

    correct: Tensor
    among_five: Tensor | None
    nll: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Outcomes:
        """From logits (N, C) on any device and labels (N,) int64."""
        labels = labels.to(logits.device)
        log_p = logits.double().log_softmax(1)
        # topk and argmax pick one of equal logits, so that a network that is always undecided is not always right
        five = logits.topk(TOP, 1).indices if logits.shape[1] > TOP else None
        return cls(
            correct=(logits.argmax(1) == labels).cpu(),
            among_five=None if five is None else (five == labels[:, None]).any(1).cpu(),
            nll=-log_p.gather(1, labels[:, None])[:, 0].cpu(),
            confidence=log_p.amax(1).exp().cpu(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """The outcomes of several batches as one."""
        fives = [part.among_five for part in parts if part.among_five is not None]
        return cls(
            correct=torch.cat([part.correct for part in parts]),
            among_five=torch.cat(fives) if fives else None,
            nll=torch.cat([part.nll for part in parts]),
            confidence=torch.cat([part.confidence for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.correct)
