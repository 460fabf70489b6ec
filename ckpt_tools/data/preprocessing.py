"""What a model is fed with: the user's word, then the checkpoint's, then the library's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """What the user says about the input; None leaves it to the checkpoint and the library."""

    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None

    @property
    def transform_options(self) -> dict[str, Any]:
        """What was said about turning images into inputs."""
        said = dataclasses.asdict(self)
        return {name: value for name, value in said.items() if value is not None and name != "input_size"}


def resolve_input_spec(known: InputSpec | None, said: Preprocessing, source: Source | None) -> InputSpec | None:
    """Input shape and preprocessing in force: the user's word, then the checkpoint's and the library's.

    None for preprocessed data of unknown architectures: samples go to the model as they are.
    """
    shape = said.input_size or (known.shape if known else None)
    if source is not None and source.sample_shape is not None and (source.is_preprocessed or shape is None):
        shape = source.sample_shape
    if shape is None:
        if source is not None and source.is_preprocessed:
            return None
        raise UsageError(
            "the input size of this architecture is not known. Give one sample's shape, e.g. --input-size 3,224,224."
        )
    changes = said.transform_options
    if changes and source is not None and source.is_preprocessed:
        raise UsageError(f"--{next(iter(changes)).replace('_', '-')}: {source.spec} is taken as preprocessed already.")
    base = known or InputSpec(shape)
    if said.input_size or changes:
        changes["origin"] = f"{base.origin}, changed by options" if known else "options"
    return dataclasses.replace(base, shape=shape, **changes)


def example_input(spec: InputSpec | None, source: Source | None) -> object:
    """A batch to walk with: zeros of the input's shape, else the first batch of the data."""
    if spec is not None:
        return torch.zeros(2, *spec.shape)
    assert source is not None
    return next(iter(source.batches(None, Reading(2, workers=0))))
