"""Compares a state dict with a model key by key, and loads it where it fits."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, CheckpointError
from ckpt_tools.identify.shape_digest import BATCH_COUNTER, Shapes, top_attribute
from ckpt_tools.identify.stored_forms import shapes_as_model, tensors_as_model

_VARIANCE = "running_var"
_MAX_LINES = 3  # Differences of one kind that a message lists.


def common_prefix(expected: Iterable[str], keys: Iterable[str]) -> str:
    """Return the prefix, such as `model.`, under which most of a model's `expected` keys stand in
    `keys`.

    Returns "" if the keys stand there without a prefix, or if less than half of them stand under
    any one.
    """
    names = {key for key in expected if not key.endswith(BATCH_COUNTER)}
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        # Any suffix of a key may be a key of the model. What stands before it may be the prefix.
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in names:
                counts[".".join(parts[:depth])] += 1
    if not counts:
        return ""
    prefix, count = counts.most_common(1)[0]
    if counts[""] >= count or 2 * count < len(names):
        return ""
    return f"{prefix}."


@dataclass(frozen=True)
class Differences:
    """Keys by which a state dict differs from the shapes that an architecture expects.

    `reshaped` have another shape, `missing` are absent from the state dict, `unexpected` are not
    the architecture's.
    """

    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that differ; none for a state dict that fits."""
        return (*self.reshaped, *self.missing, *self.unexpected)

    def only_under(self, attributes: Collection[str]) -> bool:
        """Whether all differences lie under these top attributes, and none of them is a running
        variance.

        A running variance that does not fit could not be corrected, so it is never accepted.
        """
        return all(top_attribute(key) in attributes and not key.endswith(_VARIANCE) for key in self.keys)

    def touches(self, attribute: str) -> bool:
        """Whether a difference lies under this top attribute."""
        return any(top_attribute(key) == attribute for key in self.keys)


def has_counters(checkpoint: Checkpoint) -> bool:
    """Whether the file says how many batches its BN layers have seen: one counter is above 0.

    Where the counters are absent, or all are 0 as in files that were converted from a library
    without counters, a model may be trained all the same. Its statistics then tell.
    """
    return any(
        key.endswith(BATCH_COUNTER) and bool(tensor.any()) for key, tensor in checkpoint.tensors.items()
    )


def unsaved_buffer_keys(model: nn.Module) -> frozenset[str]:
    """Return the keys of the buffers that a model computes for itself and does not save.

    TorchScript archives hold them all the same.
    """
    saved_keys = model.state_dict().keys()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return frozenset(buffers.keys() - saved_keys)


def compare_shapes(expected: Shapes, shapes: Shapes, optional: Collection[str] = ()) -> Differences:
    """Compare the shapes of a state dict with those that an architecture expects.

    A state dict may lack the counters of batches, which old files do not have, and it may have the
    `optional` keys.
    """
    return Differences(
        tuple(key for key, shape in expected.items() if key in shapes and shapes[key] != shape),
        tuple(key for key in expected if key not in shapes and not key.endswith(BATCH_COUNTER)),
        tuple(key for key in shapes if key not in expected and key not in optional),
    )


def misfit_error(
    differences: Differences, expected: Shapes, checkpoint: Checkpoint, shapes: Shapes, architecture: str
) -> ArchitectureError:
    """Return the error that names the first differences of each kind.

    `shapes` are those of the checkpoint, as the model has them.
    """
    expects = {key: f"{key}: {architecture} expects {shape}" for key, shape in expected.items()}
    reshaped = [f"{expects[key]}, the checkpoint holds {shapes[key]}" for key in differences.reshaped]
    missing = [f"{expects[key]}, the checkpoint lacks it" for key in differences.missing]
    unexpected = [
        f"{key}: {architecture} has no such tensor, the checkpoint holds {shapes[key]}"
        for key in differences.unexpected
    ]
    lines = [
        *_shorten(reshaped, f"of {len(expected)} tensors have another shape"),
        *_shorten(missing, f"of {len(expected)} tensors are missing"),
        *_shorten(unexpected, f"of the checkpoint's {len(shapes)} tensors are unexpected"),
    ]
    return ArchitectureError(
        f"{checkpoint.shown_path} does not fit {architecture}:\n  " + "\n  ".join(lines) + "\n"
        "Try another --arch, or --model-kwargs name=value if the model was built with arguments of "
        "its own."
    )


def fill_model(
    model: nn.Module, checkpoint: Checkpoint, architecture: str, as_built: Collection[str] = ()
) -> None:
    """Load every tensor of the checkpoint into the model, in the model's own precision.

    All keys and shapes must agree, except under the top attributes `as_built`: tensors that differ
    there are left as the model was built. Raises ArchitectureError if the tensors do not fit, and
    CheckpointError for tensors of integers where the model has floating-point numbers, or with NaN
    or infinities.
    """
    built_state = model.state_dict()
    built = {key: value for key, value in built_state.items() if isinstance(value, Tensor)}
    shapes = {key: tuple(tensor.shape) for key, tensor in built.items()}
    present = shapes_as_model(checkpoint, model)
    differences = compare_shapes(shapes, present, unsaved_buffer_keys(model))
    if not differences.only_under(as_built):
        raise misfit_error(differences, shapes, checkpoint, present, architecture)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, object] = {}
    for key, tensor in tensors_as_model(checkpoint, model).items():
        if key not in built or key in differences.reshaped:
            continue
        converted = _cast(f"{checkpoint.shown_path}: {key}", tensor, built[key].dtype)
        # Other buffers may hold infinities on purpose: attention masks do.
        if key in parameters or key.endswith(("running_mean", "running_var")):
            _require_finite(f"{checkpoint.shown_path}: {key}", converted)
        state[key] = converted
    # `load_state_dict` is strict. So what a checkpoint may lack is added from the model as built:
    # counters, extra state, and in `_metadata` the versions of the modules, without which torch
    # takes the state for an old one.
    complete = OrderedDict({**built_state, **state})
    complete._metadata = getattr(built_state, "_metadata", {})  # type: ignore[attr-defined]
    try:
        model.load_state_dict(complete, strict=True)
    except RuntimeError as error:
        raise ArchitectureError(f"{checkpoint.shown_path} does not fit {architecture}: {error}") from error


def _shorten(lines: list[str], summary: str) -> list[str]:
    if len(lines) <= _MAX_LINES:
        return lines
    return [*lines[:_MAX_LINES], f"… {len(lines)} {summary}"]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point and tensor.is_complex():
        raise CheckpointError(
            f"{name}: expected real numbers, the checkpoint holds complex ones ({tensor.dtype}). "
            "Give an architecture whose parameter is complex, too."
        )
    if dtype.is_floating_point and not tensor.is_floating_point():
        raise CheckpointError(
            f"{name}: expected floating-point numbers, the checkpoint holds {tensor.dtype}. "
            "Take a checkpoint from before quantisation or conversion."
        )
    # `load_state_dict` converts integers, such as counters, while it copies them.
    return tensor.to(dtype) if dtype.is_floating_point else tensor


def _require_finite(name: str, tensor: Tensor) -> None:
    count = tensor.numel() - int(tensor.isfinite().sum())
    if count:
        raise CheckpointError(
            f"{name}: expected finite numbers, found {count} NaN or infinite of {tensor.numel()}. "
            "The training run had diverged; take an earlier checkpoint."
        )
