"""Choose input shape and preprocessing: by the user's options, else by checkpoint and library."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """The user's options for the input. None leaves a value to the checkpoint and the library."""

    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    # Not in the repr, of which digests of earlier outputs are made
    crop_mode: str | None = field(default=None, repr=False)

    @property
    def transform_options(self) -> dict[str, Any]:
        """The options that concern how images become inputs, and that the user gave."""
        options = dataclasses.asdict(self)
        return {name: value for name, value in options.items() if value is not None and name != "input_size"}


def resolve_input_spec(
    model_spec: InputSpec | None, options: Preprocessing, source: Source | None
) -> InputSpec | None:
    """Return the input shape and preprocessing to use.

    The user's ``options`` override ``model_spec``, which comes from the checkpoint and the library.
    Returns None for preprocessed data of an unknown architecture, which need no InputSpec.

    Raises UsageError if the shape is unknown, or if options would change data that is preprocessed.
    """
    shape = options.input_size or (model_spec.shape if model_spec else None)
    # Preprocessed samples cannot be resized, so their own shape counts, whatever else is known.
    if source is not None and source.sample_shape is not None and (source.is_preprocessed or shape is None):
        shape = source.sample_shape
    if shape is None:
        if source is not None and source.is_preprocessed:
            return None
        raise UsageError(
            "the input size of this architecture is not known. "
            "Give the shape of one sample, for example --input-size 3,224,224."
        )
    changes = options.transform_options
    if changes and source is not None and source.is_preprocessed:
        option = f"--{next(iter(changes)).replace('_', '-')}"
        raise UsageError(f"{option}: {source.spec} is taken as preprocessed already.")
    base = model_spec or InputSpec(shape)
    if options.input_size or changes:
        changes["origin"] = f"{base.origin}, changed by options" if model_spec else "options"
    return dataclasses.replace(base, shape=shape, **changes)


def example_input(spec: InputSpec | None, source: Source | None) -> object:
    """Return a batch for a trial run of the model: zeros of the input's shape, else data.

    Without ``spec``, the first batch of ``source`` is read.
    """
    if spec is not None:
        return torch.zeros(2, *spec.shape)
    assert source is not None
    return next(iter(source.batches(None, Reading(2, workers=0))))
