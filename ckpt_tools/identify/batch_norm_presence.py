"""The check that a checkpoint holds BatchNorm statistics, and the reason where it does not."""

from __future__ import annotations

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, NothingToDo
from ckpt_tools.identify.architecture_index import load_shipped_index
from ckpt_tools.identify.recipe import recipe_without_arguments
from ckpt_tools.identify.skeleton import build_skeleton, state_dict_shapes
from ckpt_tools.identify.stored_forms import shapes_as_model
from ckpt_tools.storage.contents.quantized import missing_batch_norm

_VARIANCE = "running_var"
_NO_STATISTICS = "no BatchNorm statistics in it (no key ends in running_var): nothing to do."


def require_batch_norm(checkpoint: Checkpoint) -> None:
    """Raise NothingToDo for a checkpoint that holds no running variance.

    The message says why it holds none: the model is quantised, its BatchNorm was folded into the
    convolutions, or it never had any.
    """
    if any(key.endswith(_VARIANCE) for key in checkpoint.tensors):
        return
    reason = missing_batch_norm(checkpoint.tensors) or _describe_folding(checkpoint)
    raise NothingToDo(f"{checkpoint.shown_path}: {reason or _NO_STATISTICS}")


def _describe_folding(checkpoint: Checkpoint) -> str | None:
    """Name the architecture whose BatchNorm was folded, or return None if no architecture fits.

    Folding removes the BN tensors and adds biases, but keeps the shapes of the convolutions. The
    index has a digest of those alone (`ModelPart.frame_digest`).
    """
    for match in load_shipped_index().find_matches(shapes_as_model(checkpoint)):
        for architecture in match.architectures:
            if _has_batch_norm(architecture):
                return (
                    f"looks like {architecture} with its BatchNorm folded into the convolutions: "
                    "nothing is left to re-estimate. Take the checkpoint from before."
                )
    return None


def _has_batch_norm(architecture: str) -> bool:
    try:
        adapter, recipe = recipe_without_arguments(architecture)
        shapes = state_dict_shapes(build_skeleton(adapter, recipe.name, {}))
    except ArchitectureError:
        # The index may name an architecture that the installed library no longer has.
        return False
    return any(key.endswith(_VARIANCE) for key in shapes)
