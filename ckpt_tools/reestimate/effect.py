"""What a correction changes in the outputs of a model, seen without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ckpt_tools.arguments import advise
from ckpt_tools.model.batch import Batch, batch_size, to_device
from ckpt_tools.model.calling import Forward, device_of
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.layer import Layer, MeanVariance, current_statistics
from ckpt_tools.results import Effect

MAX_IMAGES = 256
# A correction that moves more than this is worth a loud warning. A file of 48 crops of two
# photographs turned a network's mean confidence from 0.27 to 0.04.
_COLLAPSE = 0.5  # mean confidence after / before
_MANY_CHANGED = 0.5  # share of the predictions


def measure_effect(
    model: nn.Module,
    batches: Sequence[Batch],
    forward: Forward,
    layers: Mapping[str, Layer],
    statistics: Mapping[str, MeanVariance],
) -> Effect | None:
    """Compare the outputs with the stored statistics and with new ones.

    Args:
        model: in evaluation mode; its buffers stay as they are.
        batches: the inputs.
        forward: ``forward(model, batch)``.
        layers: the observed layers by name.
        statistics: the new ones, by layer name.

    Returns:
        None if the model returns no tensor, or nothing finite.
    """
    watched = [layers[name] for name in statistics]
    for layer in watched:
        layer.current = layer.stored
    before = _join(_outputs(model, batches, forward, watched))
    for layer in watched:
        layer.current = statistics[layer.name]
    after = _join(_outputs(model, batches, forward, watched))
    if before is None or after is None or before.shape != after.shape:
        return None
    return compare_outputs(before[:MAX_IMAGES], after[:MAX_IMAGES])


def compare_outputs(before: Tensor, after: Tensor) -> Effect | None:
    """Compare two outputs (N, …) for the same inputs; (N, K) with K ≥ 2 are those of a classifier.

    None if nothing is finite.
    """
    count = len(before)
    finite = (before.isfinite() & after.isfinite()).reshape(count, -1).all(1)
    before, after = before[finite].double(), after[finite].double()
    if not len(before):
        return None
    scale = before.square().mean().sqrt().clamp_min(1e-12)
    relative_change = float((after - before).square().mean().sqrt() / scale)
    if before.ndim != 2 or before.shape[1] < 2:
        return Effect(len(before), None, None, None, relative_change)
    first, second = _probabilities(before), _probabilities(after)
    changed = (first.argmax(1) != second.argmax(1)).double().mean()
    confidence_before, confidence_after = (float(rows.amax(1).mean()) for rows in (first, second))
    return Effect(len(before), float(changed), confidence_before, confidence_after, relative_change)


def effect_warning(effect: Effect | None) -> str:
    """Return why a correction looks like a collapse, as a sentence; empty if it does not."""
    if effect is None or effect.changed is None:
        return ""
    assert effect.confidence_before is not None
    assert effect.confidence_after is not None
    falls = effect.confidence_after < _COLLAPSE * effect.confidence_before
    if not falls and effect.changed <= _MANY_CHANGED:
        return ""
    return (
        f"the correction changes {effect.changed:.0%} of the predictions on {effect.images} inputs, and "
        f"the mean confidence from {effect.confidence_before:.2f} to {effect.confidence_after:.2f}; "
        f"judge it on labelled data{advise(' (--eval-data)', '')} before you use it"
    )


def _outputs(
    model: nn.Module, batches: Sequence[Batch], forward: Forward, watched: Sequence[Layer]
) -> Iterator[Tensor]:
    """Yield the first floating-point output tensor for each batch, with one row for each sample."""
    interception, device = Interception(), device_of(model)
    for layer in watched:
        layer.begin_pass(current_statistics)
    for batch in batches:
        images = batch_size(batch)
        interception.begin(images, watched, stop=False)
        with interception:
            output = forward(model, to_device(batch, device))
        for layer in watched:
            layer.discard_batch()
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and len(leaf) == images:
                yield leaf.float().cpu()
                break


def _join(outputs: Iterator[Tensor]) -> Tensor | None:
    parts = list(outputs)
    if not parts or any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        return None
    return torch.cat(parts)


def _probabilities(outputs: Tensor) -> Tensor:
    """The outputs if they are probabilities already, else their softmax."""
    are_probabilities = bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all())
    return outputs if are_probabilities else outputs.softmax(1)
