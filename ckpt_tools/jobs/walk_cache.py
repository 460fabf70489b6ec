"""One walk for all checkpoints of a run that hold the same architecture: a sweep has many of one."""

from __future__ import annotations

from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.preprocessing import example_input
from ckpt_tools.results import Walk
from ckpt_tools.walker.downstream import walk

__all__ = ["WalkCache"]


class WalkCache:
    """What is known of the architectures that were walked so far, on the data of one run."""

    def __init__(self) -> None:
        self._known: dict[object, Walk] = {}

    def walk_for(self, loaded: LoadedModel, spec: InputSpec | None, source: Source) -> Walk:
        """The walk of a model, done now or for an earlier one. Raises ModelError."""
        key = _key(loaded, spec)
        if key in self._known:
            return self._known[key]
        found = walk(loaded.model, example_input(spec, source), probe=loaded.probe)
        if key is not None:
            self._known[key] = found
        return found


def _key(loaded: LoadedModel, spec: InputSpec | None) -> object:
    """Equal for equal walks. None where a checkpoint brings what its recipe does not tell: its own module or rates."""
    recipe = loaded.recipe
    if recipe.adapter == "module" or recipe.rates == "recorded":
        return None
    # Rates inside functional calls stand in the arguments only, sizes of changed heads in the modules only.
    return recipe.architecture, repr(sorted(recipe.kwargs.items())), repr(loaded.model), spec
