"""Batches on which an initialisation is verified: what it does to the signals of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.sample_order import Reading, balanced_batch_sizes
from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.init_results import LayerSignal
from ckpt_tools.initialize.verify import measure_signals
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.model.batch import batch_size, to_device
from ckpt_tools.walker.downstream import walk

HEALTHY_VARIANCES = (0.5, 2.0)  # the least and the greatest variance that counts as kept


@dataclass(frozen=True)
class VerificationBatches:
    """Batches on a device, and where they come from, in words."""

    batches: Sequence[object]
    inputs: str
    device: str

    @property
    def samples(self) -> int:
        """How many samples all batches hold together."""
        return sum(map(batch_size, self.batches))

    @property
    def batch_size(self) -> int:
        """How many samples the largest batch holds."""
        return max(map(batch_size, self.batches), default=0)

    def measure_layer_signals(self, model: nn.Module, seed: int) -> tuple[LayerSignal, ...]:
        """The signals of every weight layer in training mode.

        The model comes back to the CPU as it was.
        """
        try:
            return measure_signals(model.to(self.device), self.batches, seed=seed)
        finally:
            model.cpu()


def count_healthy_layers(signals: Sequence[LayerSignal]) -> int:
    """How many layers have an output variance between 0.5 and 2."""
    return sum(HEALTHY_VARIANCES[0] <= signal.variance <= HEALTHY_VARIANCES[1] for signal in signals)


def make_verification_batches(
    loaded: LoadedModel,
    example: object,
    spec: InputSpec | None,
    source: Source | None,
    *,
    samples: int,
    seed: int,
    device: str,
) -> VerificationBatches:
    """Standard normal inputs, or the first samples of the data if there is a source.

    The batches are of a size that fits into memory with gradients. Raises DataError for data that
    cannot be read, ModelError for a model that cannot be walked.
    """
    if samples < 2:
        raise UsageError(f"--samples is {samples}. Give at least 2: a variance of one sample says nothing.")
    size = min(samples, _size_with_gradients(loaded, example, device))
    if source is None:
        assert spec is not None
        generator = torch.Generator().manual_seed(seed)
        noise = [
            torch.randn(count, *spec.shape, generator=generator).to(device)
            for count in balanced_batch_sizes(samples, size)
        ]
        return VerificationBatches(noise, "N(0, 1)", device)
    stream = source.batches(spec, Reading(size, workers=0))
    batches = [to_device(batch, device) for batch in stream]
    return VerificationBatches(batches, f"{source.spec} ({stream.transform})", device)


def _size_with_gradients(loaded: LoadedModel, example: object, device: str) -> int:
    """How many samples fit into memory when all activations are kept for the backward pass."""
    model_walk = walk(loaded.model, example)
    # The walk tells the peak of a forward that keeps no activation.
    peaks = 1 + len(model_walk.weights) // 2
    size = fitting_batch_size(peaks * model_walk.bytes_per_sample, device)
    return max(3, size)  # of batches of 3 and more, none of a single sample is left over
