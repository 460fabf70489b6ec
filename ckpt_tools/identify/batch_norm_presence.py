"""Checkpoints without BatchNorm statistics, and why they have none."""

from __future__ import annotations

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, NothingToDo
from ckpt_tools.identify.architecture_index import load_shipped_index
from ckpt_tools.identify.recipe import recipe_without_arguments
from ckpt_tools.identify.skeleton import build_skeleton, state_dict_shapes
from ckpt_tools.storage.contents.quantized import missing_batch_norm

_VARIANCE = "running_var"
_NONE = "no BatchNorm statistics in it (no key ends in running_var): nothing to do."


def require_batch_norm(checkpoint: Checkpoint) -> None:
    """Raise NothingToDo, in one sentence, for a checkpoint that holds no running variance."""
    if any(key.endswith(_VARIANCE) for key in checkpoint.tensors):
        return
    why = missing_batch_norm(checkpoint.tensors) or _describe_folded(checkpoint) or _NONE
    raise NothingToDo(f"{checkpoint.shown_path}: {why}")


def _describe_folded(checkpoint: Checkpoint) -> str | None:
    for match in load_shipped_index().find_matches(checkpoint.shapes):
        name = next((name for name in match.architectures if _has_batch_norm(name)), None)
        if name is not None:
            return (
                f"looks like {name} with its BatchNorm folded into the convolutions: nothing is left to re-estimate. "
                "Take the checkpoint from before."
            )
    return None


def _has_batch_norm(architecture: str) -> bool:
    try:
        adapter, recipe = recipe_without_arguments(architecture)
        return any(key.endswith(_VARIANCE) for key in state_dict_shapes(build_skeleton(adapter, recipe.name, {})))
    except ArchitectureError:
        return False
