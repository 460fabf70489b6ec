"""Run a classifier on labelled batches: the outcome of every image, and the logits on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.evaluate.outcomes import Outcomes
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, force_eager, unwrap_model
from ckpt_tools.model.preserving import preserved_evaluation_mode
from ckpt_tools.model.randomness import seed_temporarily
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.running import Runner


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcomes of N labelled images.

    ``classes`` is the number of outputs of the model. ``logits`` has shape (N, C) and float32; None
    if not kept.
    """

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
    forward: Forward = call_model,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run the model in eval mode, without gradients, on the device it is on.

    It comes back as it came.

    Args:
        model: a classifier: logits (N, C) as a tensor, first in a tuple, or under ``logits``;
            probabilities are taken as softmax of their logarithms.
        batches: pairs of what the model takes and labels (N,) int64.
        check: called with the labels of every batch and the number of outputs; may raise.
        keep_logits: keep all logits, which a temperature needs; otherwise only a few numbers an
            image are kept.
        forward: ``forward(model, batch)``.
        seed: of random numbers, which some models draw in eval mode, too.
        progress: called with the number of images so far after every batch.

    Raises:
        DataError: there is no image.
        ModelError: the model returns no logits, or NaN among them, or cannot be run.
    """
    model = unwrap_model(model)
    outputs = _Outputs(forward)
    runner = Runner(model, outputs, Interception(dropout=True), rows_are_samples=True)
    parts: list[Outcomes] = []
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    classes = done = 0
    with preserved_evaluation_mode(model, forward), seed_temporarily(seed), torch.no_grad(), force_eager():
        for number, (inputs, batch_labels) in enumerate(batches):
            for _ in runner.run(inputs, number, []):
                pass
            batch_logits = outputs.take_logits(len(batch_labels), number)
            classes = batch_logits.shape[1]
            if check is not None:
                check(batch_labels, classes)
            parts.append(Outcomes.of(batch_logits, batch_labels))
            labels.append(batch_labels)
            if keep_logits:
                logits.append(batch_logits.float().cpu())
            done += len(batch_labels)
            if progress is not None:
                progress(done)
    if not done:
        raise DataError("no image to evaluate on; expected at least one.")
    all_logits = torch.cat(logits) if keep_logits else None
    return Evaluation(Outcomes.concatenate(parts), torch.cat(labels), classes, all_logits)


class _Outputs:
    """A forward that keeps what the model returns.

    A batch for which memory was short arrives in several parts.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._parts: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Batch) -> None:
        self._parts.append(_logits(self._forward(model, batch)))

    def take_logits(self, count: int, number: int) -> Tensor:
        """Return the logits (count, C) of the batch that was run last, and forget them."""
        logits = torch.cat(self._parts)
        self._parts = []
        if len(logits) != count:
            raise ModelError(
                f"batch {number}: {count} labels, and the model returned {len(logits)} rows of logits."
            )
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(
                f"batch {number}: the model's logits hold NaN or infinity. Look for NaN in its weights."
            )
        return logits


def _logits(output: object) -> Tensor:
    """Find the logits (N, C) in what a model returned.

    Probabilities are turned into their logarithms.
    """
    logits: object = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if isinstance(logits, Tensor) and logits.ndim > 2 and logits.shape[2:].numel() == 1:
        logits = logits.flatten(1)  # from a head that is a convolution
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != 2
        or logits.shape[1] < 2
        or not logits.is_floating_point()
    ):
        shape = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(f"the model returned {shape}; expected logits (N, classes), as of a classifier.")
    return _log(logits) if _is_softmax(logits) else logits


def _is_softmax(logits: Tensor) -> bool:
    # Probabilities in bfloat16 add up to 1 no better than that
    slack = max(1e-3, torch.finfo(logits.dtype).eps)
    return bool((logits >= 0).all()) and bool(((logits.double().sum(1) - 1).abs() < slack).all())


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
