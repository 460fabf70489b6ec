"""Batches that show what an initialisation does to a model's signals, and what they showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.sample_order import balanced_batch_sizes
from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.init_results import LayerSignal
from ckpt_tools.initialize.verify import measure_signals
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.model.batch import batch_size, to_device
from ckpt_tools.walker.downstream import walk

HEALTHY_VARIANCES = (0.5, 2.0)  # a variance between these counts as kept


@dataclass(frozen=True)
class VerificationBatches:
    """What a model is tried on: batches on a device, and where they come from, in words."""

    batches: Sequence[object]
    inputs: str
    device: str

    @property
    def samples(self) -> int:
        """How many samples all batches hold together."""
        return sum(map(batch_size, self.batches))

    @property
    def batch_size(self) -> int:
        """How many the largest batch holds."""
        return max(map(batch_size, self.batches), default=0)

    def measure_layer_signals(self, model: nn.Module, seed: int) -> tuple[LayerSignal, ...]:
        """The signals of every weight layer in training mode; the model comes back to the CPU as it was."""
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
    """Standard normal inputs, or the first samples of the data, in batches that fit into memory with gradients.

    Raises DataError for data that cannot be read, ModelError for a model that cannot be walked.
    """
    if samples < 2:
        raise UsageError(f"--samples is {samples}. Give at least 2: a variance of one sample says nothing.")
    size = min(samples, _size_with_gradients(loaded, example, device))
    if source is None:
        assert spec is not None
        g = torch.Generator().manual_seed(seed)
        made = [torch.randn(count, *spec.shape, generator=g) for count in balanced_batch_sizes(samples, size)]
        return VerificationBatches([batch.to(device) for batch in made], "N(0, 1)", device)
    stream = source.batches(spec, batch_size=size, workers=0)
    return VerificationBatches(
        [to_device(batch, device) for batch in stream], f"{source.spec} ({stream.transform})", device
    )


def _size_with_gradients(loaded: LoadedModel, example: object, device: str) -> int:
    """Samples whose activations fit into memory when all of them are kept for the backward pass."""
    found = walk(loaded.model, example)
    kept = 1 + len(found.weights) // 2  # times the peak of a forward that keeps none
    return max(3, fitting_batch_size(kept * found.bytes_per_sample, device))  # 3: no batch of 1 is left over
