"""How far the variances of a faster precision are from those of float32, on the first images."""

from __future__ import annotations

from torch import Tensor

from ckpt_tools.contract import Precision
from ckpt_tools.machine.precision import relative_deviation
from ckpt_tools.model.batch import Batch, slice_samples
from ckpt_tools.observation.finite import check_activations, check_input
from ckpt_tools.observation.layer import batch_variance
from ckpt_tools.observation.outliers import InputFilter
from ckpt_tools.reestimate.batches import no_batch_error
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.results import Spread

_COMPARED_IMAGES = 64


def precision_deviation(context: PassContext) -> Spread:
    """The relative deviation of variances in the runner's precision from those in fp32.

    It is measured on the first 64 images, or on the first batch if it cannot be cut, of the first
    process that has any. Raises DataError if there is no batch.
    """
    for spread in context.team.all(lambda: _local_deviation(context)):
        if spread is not None:
            return spread
    raise no_batch_error()


def _local_deviation(context: PassContext) -> Spread | None:
    ahead = context.batches.ahead(1)
    if not ahead:
        return None
    batch = ahead[0]
    if context.screening.rows_are_samples:
        batch = InputFilter().remove_outliers(slice_samples(batch, 0, _COMPARED_IMAGES), 0)
    check_input(batch, 0)
    # fp32 comes first, so that the runner ends in the precision that the passes need.
    precision = context.runner.precision
    exact = _variances(context, batch, "fp32")
    return relative_deviation(exact, _variances(context, batch, precision))


def _variances(context: PassContext, batch: Batch, precision: Precision) -> dict[str, Tensor]:
    """Variance (C,) by name of the layers to rewrite; leaves the runner in this precision."""
    context.runner.precision = precision
    layers = context.layers
    for layer in layers.values():
        layer.begin_pass(batch_variance)
    for _ in context.runner.run(batch, 0, list(layers.values())):
        moments = {name: layer.end_batch() for name, layer in layers.items()}
        check_activations(context.model, moments, 0)
    moments = {layer.name: layer.moments for layer in layers.values() if layer.rewritten}
    return {name: item.variance() for name, item in moments.items() if item and item.count > 1}
