"""The file that an initialisation leaves: new weights, zero biases, everything else as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.contract import LoadedModel
from ckpt_tools.initialize.init_results import InitRewrite
from ckpt_tools.storage.provenance import output_metadata
from ckpt_tools.storage.write import Digests, replace_tensors, write_safetensors
from ckpt_tools.walker.call import unwrap


def write_initialized(output: Path, loaded: LoadedModel, result: InitRewrite, *, overwrite: bool = False) -> Digests:
    """Write a model whose weights were rewritten; the source's digest is empty if there is none. Raises OutputError.

    With a checkpoint, its tensors with the new ones in their place, in its dtypes; else the state dict as it stands.
    """
    state = {key: value for key, value in unwrap(loaded.model).state_dict().items() if isinstance(value, Tensor)}
    rewritten = _every_name(state, [layer.parameter for layer in result.rewritten])
    zeroed = _every_name(state, [layer.bias for layer in result.rewritten if layer.bias])
    said = _provenance(loaded, result) | {"rewritten": rewritten, "zeroed": zeroed}
    if loaded.checkpoint is None:
        return write_safetensors(output, state, metadata=output_metadata(None, said), overwrite=overwrite)
    new = {key: state[key] for key in (*rewritten, *zeroed)}
    return replace_tensors(output, loaded.checkpoint, new, provenance=said, overwrite=overwrite)


def _every_name(state: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    """These keys and those of tied tensors, which hold the same numbers under another name."""
    memory = {_memory(state[key]) for key in keys}
    return [key for key, tensor in state.items() if _memory(tensor) in memory]


def _memory(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _provenance(loaded: LoadedModel, result: InitRewrite) -> dict[str, object]:
    """What the output says about itself: enough to repeat it, and no wall-clock time."""
    return {
        "expect": "init",
        "architecture": loaded.recipe.architecture,
        "model_kwargs": dict(loaded.recipe.kwargs),
        "scheme": result.scheme,
        "rule": result.rule,
        "backward_term": result.backward_term,
        "backward_factor": result.backward_factor,
        "seed": result.seed,
        "torch": torch.__version__,
    }
