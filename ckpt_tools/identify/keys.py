"""Fitting a state dict to a model: a common prefix, missing and unexpected keys, shapes, numbers."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, CheckpointError

_COUNTER = "num_batches_tracked"  # not saved before PyTorch 1.0
_SHOWN = 3  # differences of a kind in a message


def common_prefix(wanted: Iterable[str], keys: Iterable[str]) -> str:
    """``model.`` where most of a model's keys stand under that attribute, "" where they stand as they are."""
    names = {key for key in wanted if not key.endswith(_COUNTER)}
    hits: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in names:
                hits[".".join(parts[:depth])] += 1
    if not hits:
        return ""
    prefix, count = hits.most_common(1)[0]
    if hits[""] >= count or 2 * count < len(names):
        return ""
    return f"{prefix}."


def fill(model: nn.Module, checkpoint: Checkpoint, architecture: str) -> None:
    """Load every tensor, strictly, in the model's own precision. Raises ArchitectureError or CheckpointError."""
    own = model.state_dict()
    wanted = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    differences = _differences(wanted, checkpoint, architecture)
    if differences:
        raise ArchitectureError(
            f"{checkpoint.path} does not fit {architecture}:\n  " + "\n  ".join(differences) + "\n"
            "Try another --arch, or --model-kwargs name=value if the model was built with arguments of its own."
        )
    where = f"{checkpoint.path}: "
    state = {key: _cast(where + key, t, wanted[key].dtype) for key, t in checkpoint.tensors.items()}
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, tensor in state.items():
        # Other buffers may hold infinities on purpose: attention masks do.
        if key in weights or key.endswith(("running_mean", "running_var")):
            _require_finite(where + key, tensor)
    # What a checkpoint may lack stays as built: counters, extra state, and the versions of the modules.
    complete = OrderedDict({key: value for key, value in own.items() if key not in state} | state)
    complete._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]
    try:
        model.load_state_dict(complete, strict=True)
    except RuntimeError as error:
        raise ArchitectureError(f"{checkpoint.path} does not fit {architecture}: {error}") from error


def _differences(wanted: Mapping[str, Tensor], checkpoint: Checkpoint, architecture: str) -> list[str]:
    shapes = checkpoint.shapes
    expected = {key: f"{key}: {architecture} expects {tuple(tensor.shape)}" for key, tensor in wanted.items()}
    reshaped = [
        f"{expected[key]}, the checkpoint holds {shapes[key]}"
        for key, tensor in wanted.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
    missing = [
        f"{said}, the checkpoint lacks it"
        for key, said in expected.items()
        if key not in shapes and not key.endswith(_COUNTER)
    ]
    unexpected = [
        f"{key}: {architecture} has no such tensor, the checkpoint holds {shape}"
        for key, shape in shapes.items()
        if key not in wanted
    ]
    return [
        *_first(reshaped, f"of {len(wanted)} tensors have another shape"),
        *_first(missing, f"of {len(wanted)} tensors are missing"),
        *_first(unexpected, f"of the checkpoint's {len(shapes)} tensors are unexpected"),
    ]


def _first(lines: list[str], what: str) -> list[str]:
    rest = [f"… {len(lines)} {what}"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + rest


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point and not tensor.is_floating_point():
        raise CheckpointError(
            f"{name}: expected floating-point numbers, the checkpoint holds {tensor.dtype}. "
            "Take a checkpoint from before quantisation or conversion."
        )
    return tensor.to(dtype) if dtype.is_floating_point else tensor


def _require_finite(name: str, tensor: Tensor) -> None:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise CheckpointError(
            f"{name}: expected finite numbers, found {bad} NaN or infinite of {tensor.numel()}. "
            "The training run had diverged; take an earlier checkpoint."
        )
