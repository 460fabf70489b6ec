"""From a file to the model it holds, with its weights, its input and its drop rates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt_tools import plugins
from ckpt_tools.contract import Checkpoint, LoadedModel, Recipe
from ckpt_tools.identify.candidate import load_candidate, load_recipe
from ckpt_tools.identify.resolution import find_candidates, require_single_candidate
from ckpt_tools.storage.reading import read_checkpoint


def load(
    path: str | Path,
    architecture: str | None = None,
    *,
    model_kwargs: Mapping[str, object] | None = None,
    weights: str = "auto",
    trust: bool = False,
) -> LoadedModel:
    """Read a checkpoint and build the model it belongs to, on the CPU in float32 and evaluation mode.

    ``architecture`` (``timm:resnet50``, ``package.module:factory``) may be None if the file names it itself, or if
    its tensors' names and shapes tell. ``model_kwargs`` go before whatever the file says. ``weights`` chooses between
    raw and averaged weights. Raises CheckpointError for a file that cannot be read, ArchitectureError for one that
    does not fit, AmbiguousArchitecture for one that fits several.
    """
    return identify_model(read_checkpoint(path, weights=weights, trust=trust), architecture, model_kwargs)


def identify_model(
    checkpoint: Checkpoint,
    architecture: str | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> LoadedModel:
    """The model a checkpoint belongs to; the keys decide where its words leave a choice, and where they are wrong.

    Raises ArchitectureError, and its subclass AmbiguousArchitecture.
    """
    found = find_candidates(checkpoint, architecture, model_kwargs)
    return load_candidate(checkpoint, require_single_candidate(checkpoint, found))


def load_architecture(architecture: str, model_kwargs: Mapping[str, object] | None = None) -> LoadedModel:
    """An architecture without a checkpoint: the library's own initialisation, the model's own drop rates."""
    adapter, name = plugins.resolve(architecture)
    return load_recipe(adapter, Recipe(adapter.prefix, name, dict(model_kwargs or {}), "model"))
