"""One walk for all checkpoints of a run that hold the same architecture, as those of a sweep do."""

from __future__ import annotations

from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.preprocessing import example_input
from ckpt_tools.results import Walk
from ckpt_tools.walker.downstream import walk

__all__ = ["WalkCache"]


class WalkCache:
    """The walks of the architectures that a run has met so far.

    They hold for the data of that run.
    """

    def __init__(self) -> None:
        self._walks: dict[object, Walk] = {}

    def walk_for(self, loaded: LoadedModel, spec: InputSpec | None, source: Source) -> Walk:
        """The walk of a model, done now or for an earlier one. Raises ModelError."""
        key = _cache_key(loaded, spec)
        if key in self._walks:
            return self._walks[key]
        example = example_input(spec, source)
        model_walk = walk(loaded.model, example, probe=loaded.probe, dropout=loaded.dropout)
        if key is not None:
            self._walks[key] = model_walk
        return model_walk


def _cache_key(loaded: LoadedModel, spec: InputSpec | None) -> object:
    """A key that is equal for equal walks.

    None where a checkpoint brings something that its recipe does not tell: its own module, or its
    rates.
    """
    recipe = loaded.recipe
    if recipe.adapter == "module" or recipe.rates == "recorded":
        return None
    # The rates of functional calls stand in the arguments only, the sizes of changed heads in the
    # modules only: so both are part of the key.
    arguments, dropout = sorted(recipe.kwargs.items()), [*loaded.dropout.items()]
    return recipe.architecture, repr(arguments), repr(loaded.model), repr(dropout), spec
