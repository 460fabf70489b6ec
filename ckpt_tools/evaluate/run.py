"""A classifier and labelled batches: the outcome of every image, and the logits where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.evaluate.outcomes import Outcomes
from ckpt_tools.model.preserving import evaluating
from ckpt_tools.reestimate.interception import Interception
from ckpt_tools.reestimate.running import Runner
from ckpt_tools.reestimate.training import seeded
from ckpt_tools.walker.call import Batch, Forward, call, eager, unwrap


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model made of labelled images. ``classes``: outputs of its head. ``logits`` (N, C) float32, if kept."""

    outcomes: Outcomes
    labels: Tensor
    classes: int
    logits: Tensor | None = None


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Tensor]],
    *,
    check: Callable[[Tensor, int], None] | None = None,
    keep_logits: bool = False,
    forward: Forward = call,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run the model in evaluation mode, without gradients, on the device it is on; it comes back as it came.

    Args:
        model: a classifier: logits (N, C) as a tensor, first in a tuple, or under ``logits``; probabilities are taken
            as softmax of their logarithms.
        batches: pairs of what the model takes and labels (N,) int64.
        check: called with the labels of every batch and the number of outputs; may raise.
        keep_logits: a temperature needs them. Without, a few numbers an image are all that is kept.
        forward: ``forward(model, batch)``.
        seed: for models that draw random numbers even now.
        progress: called with the number of images so far after every batch.

    Raises:
        DataError: no image.
        ModelError: no logits, NaN among them, or a model that cannot be run.
    """
    model = unwrap(model)
    outputs = _Outputs(forward)
    runner = Runner(model, outputs, Interception(dropout=True))
    parts: list[Outcomes] = []
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    classes = done = 0
    with evaluating(model, forward), seeded(seed), torch.no_grad(), eager():
        for number, (inputs, wanted) in enumerate(batches):
            for _ in runner.run(inputs, number, []):
                pass
            found = outputs.taken(len(wanted), number)
            classes = found.shape[1]
            if check is not None:
                check(wanted, classes)
            parts.append(Outcomes.of(found, wanted))
            labels.append(wanted)
            if keep_logits:
                logits.append(found.float().cpu())
            done += len(wanted)
            if progress is not None:
                progress(done)
    if not done:
        raise DataError("no image to evaluate on; expected at least one.")
    kept = torch.cat(logits) if keep_logits else None
    return Evaluation(Outcomes.joined(parts), torch.cat(labels), classes, kept)


class _Outputs:
    """A forward that keeps what the model returns: a batch for which memory was short arrives in parts."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._parts: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Batch) -> None:
        self._parts.append(_logits(self._forward(model, batch)))

    def taken(self, count: int, number: int) -> Tensor:
        """The logits (count, C) of the batch that was run last."""
        found = torch.cat(self._parts)
        self._parts = []
        if len(found) != count:
            raise ModelError(f"batch {number}: {count} labels, and the model returned {len(found)} rows of logits.")
        if not bool(torch.isfinite(found).all()):
            raise ModelError(f"batch {number}: the model's logits hold NaN or infinity. Look for NaN in its weights.")
        return found


def _logits(output: object) -> Tensor:
    found: object = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor) and found.ndim > 2 and found.shape[2:].numel() == 1:
        found = found.flatten(1)  # a convolution as the head
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] < 2 or not found.is_floating_point():
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise ModelError(f"the model returned {shape}; expected logits (N, classes), as of a classifier.")
    return _log(found) if _is_softmax(found) else found


def _is_softmax(found: Tensor) -> bool:
    slack = max(1e-3, torch.finfo(found.dtype).eps)  # probabilities in bfloat16 add up to 1 so far only
    return bool((found >= 0).all()) and bool(((found.double().sum(1) - 1).abs() < slack).all())


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
