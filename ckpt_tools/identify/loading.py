"""Builds the model that a checkpoint file belongs to, and loads the file's weights into it.

The result also has the model's input specification and its drop rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.contract import Checkpoint, LoadedModel, Recipe
from ckpt_tools.errors import UsageError
from ckpt_tools.identify import plugins
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
    """Read a checkpoint and build the model it belongs to, on the CPU in float32 and evaluation
    mode.

    `architecture` (`timm:resnet50`, `package.module:factory`) may be None if the file names its
    architecture, or if the keys and shapes of its tensors show it. `model_kwargs` override what the
    file says. `weights` chooses between raw and averaged weights. `trust` allows the file's pickle
    to run code.

    Raises CheckpointError for a file that cannot be read, ArchitectureError for one that does not
    fit, and AmbiguousArchitecture for one that fits several architectures.
    """
    if not isinstance(path, (str, Path)):
        raise UsageError(f"path is a {type(path).__name__}; expected the path of a checkpoint.")
    return identify_model(read_checkpoint(path, weights=weights, trust=trust), architecture, model_kwargs)


def identify_model(
    checkpoint: Checkpoint,
    architecture: str | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> LoadedModel:
    """Build the model that a checkpoint belongs to.

    Keys and shapes decide where the file's own description leaves a choice, and where it is wrong.
    Raises ArchitectureError, or its subclass AmbiguousArchitecture.
    """
    candidates = find_candidates(checkpoint, architecture, model_kwargs)
    return load_candidate(checkpoint, require_single_candidate(checkpoint, candidates))


def load_architecture(architecture: str, model_kwargs: Mapping[str, object] | None = None) -> LoadedModel:
    """Build an architecture without a checkpoint, with the library's own initialisation.

    The drop rates are those of the model as it is built.
    """
    adapter, name = plugins.resolve(architecture)
    return load_recipe(adapter, Recipe(adapter.prefix, name, dict(model_kwargs or {}), "model"))
