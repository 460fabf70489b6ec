"""Fitting a state dict to a model: a common prefix, missing and unexpected keys, shapes, numbers."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, CheckpointError
from ckpt_tools.identify.shape_digest import BATCH_COUNTER, Shapes, top_attribute

_VARIANCE = "running_var"
_SHOWN = 3  # differences of a kind in a message


def common_prefix(wanted: Iterable[str], keys: Iterable[str]) -> str:
    """``model.`` where most of a model's keys stand under that attribute, "" where they stand as they are."""
    names = {key for key in wanted if not key.endswith(BATCH_COUNTER)}
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


@dataclass(frozen=True)
class Differences:
    """Where a state dict departs from the shapes that an architecture wants, by key."""

    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them; empty for a state dict that fits."""
        return (*self.reshaped, *self.missing, *self.unexpected)

    def only_under(self, attributes: Collection[str]) -> bool:
        """Whether all of them lie under these top attributes, no BatchNorm among them."""
        return all(top_attribute(key) in attributes and not key.endswith(_VARIANCE) for key in self.keys)

    def touches(self, attribute: str) -> bool:
        """Whether one of them lies under this top attribute."""
        return any(top_attribute(key) == attribute for key in self.keys)


def has_counters(checkpoint: Checkpoint) -> bool:
    """Whether the file says how many batches its BN layers have seen; if not, a model's zeros say nothing."""
    return any(key.endswith(BATCH_COUNTER) for key in checkpoint.tensors)


def unsaved_buffer_keys(model: nn.Module) -> frozenset[str]:
    """Keys of the buffers that a model computes for itself and does not save; TorchScript archives hold them."""
    own = model.state_dict()
    return frozenset(name for name, _ in model.named_buffers(remove_duplicate=False) if name not in own)


def compare_shapes(wanted: Shapes, shapes: Shapes, spare: Collection[str] = ()) -> Differences:
    """Compare key by key. What a state dict may lack, it may lack: counters; ``spare`` keys it may have."""
    return Differences(
        tuple(key for key, shape in wanted.items() if key in shapes and shapes[key] != shape),
        tuple(key for key in wanted if key not in shapes and not key.endswith(BATCH_COUNTER)),
        tuple(key for key in shapes if key not in wanted and key not in spare),
    )


def misfit_error(found: Differences, wanted: Shapes, checkpoint: Checkpoint, architecture: str) -> ArchitectureError:
    """The error that names the first differences of each kind."""
    shapes = checkpoint.shapes
    expects = {key: f"{key}: {architecture} expects {shape}" for key, shape in wanted.items()}
    lines = [
        *_first(
            [f"{expects[key]}, the checkpoint holds {shapes[key]}" for key in found.reshaped],
            f"of {len(wanted)} tensors have another shape",
        ),
        *_first(
            [f"{expects[key]}, the checkpoint lacks it" for key in found.missing],
            f"of {len(wanted)} tensors are missing",
        ),
        *_first(
            [f"{k}: {architecture} has no such tensor, the checkpoint holds {shapes[k]}" for k in found.unexpected],
            f"of the checkpoint's {len(shapes)} tensors are unexpected",
        ),
    ]
    return ArchitectureError(
        f"{checkpoint.shown_path} does not fit {architecture}:\n  " + "\n  ".join(lines) + "\n"
        "Try another --arch, or --model-kwargs name=value if the model was built with arguments of its own."
    )


def fill_model(model: nn.Module, checkpoint: Checkpoint, architecture: str, as_built: Collection[str] = ()) -> None:
    """Load every tensor, in the model's own precision. Raises ArchitectureError or CheckpointError.

    Strict, but for what differs under the top attributes ``as_built``: a head of somebody's own.
    """
    own = model.state_dict()
    wanted = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    found = compare_shapes(shapes, checkpoint.shapes, unsaved_buffer_keys(model))
    if not found.only_under(as_built):
        raise misfit_error(found, shapes, checkpoint, architecture)
    where = f"{checkpoint.shown_path}: "
    left = {*found.reshaped, *(key for key in checkpoint.tensors if key not in wanted)}
    state = {key: _cast(where + key, t, wanted[key].dtype) for key, t in checkpoint.tensors.items() if key not in left}
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
        raise ArchitectureError(f"{checkpoint.shown_path} does not fit {architecture}: {error}") from error


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
