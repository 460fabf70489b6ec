"""The check that a checkpoint holds BatchNorm statistics, and the reason where it does not."""

from __future__ import annotations

import re

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, NothingToDo
from ckpt_tools.identify.architecture_index import load_shipped_index
from ckpt_tools.identify.recipe import recipe_without_arguments
from ckpt_tools.identify.shape_digest import Shapes
from ckpt_tools.identify.skeleton import build_skeleton, state_dict_shapes
from ckpt_tools.identify.stored_forms import shapes_as_model
from ckpt_tools.storage.contents.quantized import missing_batch_norm

_VARIANCE = "running_var"
_NO_STATISTICS = "no BatchNorm statistics in it (no key ends in running_var): nothing to do."

_UNTRACKED = (
    "its normalisation layers track no statistics ({}), as with track_running_stats=False or GroupNorm: "
    "nothing to re-estimate."
)
_BATCH_NORM = re.compile(r"(?i)(^|[._])(bn|batch_?norm|norm_?bn)(_?\d+[a-z]?)?$")


def require_batch_norm(checkpoint: Checkpoint) -> None:
    """Raise NothingToDo for a checkpoint that holds no running variance.

    The message says why it holds none: the model is quantised, its BatchNorm was folded into the
    convolutions, or it never had any.
    """
    if any(key.endswith(_VARIANCE) for key in checkpoint.tensors):
        return
    reason = (
        missing_batch_norm(checkpoint.tensors)
        or _describe_untracked(checkpoint.shapes)
        or _describe_folding(checkpoint)
    )
    raise NothingToDo(f"{checkpoint.shown_path}: {reason or _NO_STATISTICS}")


def _describe_untracked(shapes: Shapes) -> str | None:
    """Name a BN layer that has weights but no statistics, by its key; None where there is none."""
    for key, shape in shapes.items():
        stem = key.removesuffix(".weight")
        is_norm = key != stem and _BATCH_NORM.search(stem) and shapes.get(f"{stem}.bias") == shape
        if is_norm and len(shape) == 1:
            return _UNTRACKED.format(f"{key} is there, {stem}.running_var is not")
    return None


def _describe_folding(checkpoint: Checkpoint) -> str | None:
    """Name the architecture whose BatchNorm was folded, or return None if no architecture fits.

    Folding removes the BN tensors and adds biases, but keeps the shapes of the convolutions. The
    index has a digest of those alone (`ModelPart.frame_digest`).
    """
    for match in load_shipped_index().find_matches(shapes_as_model(checkpoint)):
        for architecture in match.architectures:
            layers = _list_batch_norms(architecture)
            # Folding removes the weights of the BN layers. Where they are, nothing was folded.
            weights = [f"{match.prefix}{layer}weight" for layer in layers]
            if present := [key for key in weights if key in checkpoint.shapes]:
                return _UNTRACKED.format(f"{present[0]} is there, running_var is not")
            if layers:
                return (
                    f"looks like {architecture} with its BatchNorm folded into the convolutions: "
                    "nothing is left to re-estimate. Take the checkpoint from before."
                )
    return None


def _list_batch_norms(architecture: str) -> list[str]:
    """Return the names of an architecture's BN layers, each with a dot behind it."""
    try:
        adapter, recipe = recipe_without_arguments(architecture)
        shapes = state_dict_shapes(build_skeleton(adapter, recipe.name, {}))
    except ArchitectureError:
        # The index may name an architecture that the installed library no longer has.
        return []
    return [key.removesuffix(_VARIANCE) for key in shapes if key.endswith(_VARIANCE)]
