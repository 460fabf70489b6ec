"""Tensors of a model that a file holds in another form: pruned, parametrized, or under another name.

The file stays as it is, and so does the output that is made from it. Here the state dict is seen as
the plain model has it:

- `weight_orig` and `weight_mask` of a pruned model (`torch.nn.utils.prune`) are `weight`;
- so are direction and length of weight normalisation, and a weight with the vectors of spectral
  normalisation, whether the hooks or the parametrizations of torch wrote them;
- a module that stands at two places has its tensors under both names. `safetensors.torch.save_model`
  keeps one of them, and names the other in the metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.identify.shape_digest import Shape, Shapes

__all__ = ["keys_at_two_places", "shapes_as_model", "tensors_as_model"]

_VARIANCE = "running_var"


@dataclass(frozen=True)
class _Form:
    """The keys of one tensor's parts, as suffixes, and what makes the tensor of the parts.

    In the suffixes `{name}` is the tensor's own name. The shape is that of the part `largest`.
    """

    suffixes: tuple[str, ...]
    largest: int
    combine: Callable[[Sequence[Tensor]], Tensor]


def _apply_mask(parts: Sequence[Tensor]) -> Tensor:
    weight, mask = parts
    return weight * mask.to(weight.dtype)


def _apply_length(parts: Sequence[Tensor]) -> Tensor:
    length, direction = (part.float() for part in parts)
    squares = direction.square()
    # The length has the size of the direction along the axis that is kept, and 1 along the others;
    # a single number is the length of the whole.
    for axis, size in enumerate(length.shape or (1,) * direction.dim()):
        if size == 1:
            squares = squares.sum(axis, keepdim=True)
    return direction * (length / squares.sqrt())


def _divide_by_norm(parts: Sequence[Tensor]) -> Tensor:
    weight, left, right = (part.float() for part in parts)
    # The matrix is the weight with one axis in front: that of the outputs, which is the second one
    # of transposed convolutions.
    matrix = weight if weight.shape[0] == left.numel() else weight.transpose(0, 1)
    return weight / (left @ matrix.reshape(matrix.shape[0], -1) @ right)


# The first form whose parts are all there counts.
_FORMS = (
    _Form(("{name}_orig", "{name}_mask"), 0, _apply_mask),
    _Form(("{name}_orig", "{name}_u", "{name}_v"), 0, _divide_by_norm),
    _Form(("{name}_g", "{name}_v"), 1, _apply_length),
    _Form(
        tuple(f"parametrizations.{{name}}.{part}" for part in ("original", "0._u", "0._v")),
        0,
        _divide_by_norm,
    ),
    _Form(tuple(f"parametrizations.{{name}}.original{number}" for number in (0, 1)), 1, _apply_length),
)
_FIRST_ENDINGS = ("_orig", "_g", ".original", ".original0")
_FIRST_PART = re.compile(
    r"(?P<stem>(?:.*\.)?)(?:(?P<plain>[^.]+)_(?:orig|g)|parametrizations\.(?P<new>[^.]+)\.original0?)"
)


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of the model by the keys of its parts in the file."""

    parts: tuple[str, ...]
    shape: Shape
    combine: Callable[[Sequence[Tensor]], Tensor]


def shapes_as_model(checkpoint: Checkpoint, model: nn.Module | None = None) -> dict[str, Shape]:
    """Return the shapes of the checkpoint as the model has them.

    Without a model every part is taken for what it would be in a plain one.
    """
    stored = _find_stored_tensors(checkpoint, model)
    used = {part for tensor in stored.values() if len(tensor.parts) > 1 for part in tensor.parts}
    shapes = {key: shape for key, shape in checkpoint.shapes.items() if key not in used}
    return shapes | {key: tensor.shape for key, tensor in stored.items()}


def tensors_as_model(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint as the model has them."""
    stored = _find_stored_tensors(checkpoint, model)
    used = {part for tensor in stored.values() if len(tensor.parts) > 1 for part in tensor.parts}
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in used}
    for key, tensor in stored.items():
        tensors[key] = tensor.combine([checkpoint.tensors[part] for part in tensor.parts])
    return tensors


def keys_at_two_places(model: nn.Module) -> list[set[str]]:
    """Return the keys of each tensor that stands at several places of a model."""
    groups: dict[int, set[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for key, tensor in named:
        groups.setdefault(id(tensor), set()).add(key)
    return [keys for keys in groups.values() if len(keys) > 1]


def _find_stored_tensors(checkpoint: Checkpoint, model: nn.Module | None) -> dict[str, _StoredTensor]:
    shapes = checkpoint.shapes
    expected = None if model is None else model.state_dict().keys()
    stored = {
        key: tensor
        for key, tensor in _find_combined(shapes).items()
        if expected is None or (key in expected and expected.isdisjoint(tensor.parts))
    }
    available = shapes | {key: tensor.shape for key, tensor in stored.items()}
    for key, other in _find_other_names(checkpoint, model, available.keys()).items():
        stored[key] = stored.get(other) or _StoredTensor((other,), available[other], _take_first)
    return stored


def _take_first(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _find_combined(shapes: Shapes) -> dict[str, _StoredTensor]:
    """Return the tensors whose parts are in a file, by the key that a plain model has for them."""
    stored: dict[str, _StoredTensor] = {}
    for key in shapes:
        match = _FIRST_PART.fullmatch(key) if key.endswith(_FIRST_ENDINGS) else None
        name = match and (match["plain"] or match["new"])
        if match is None or not name or match["stem"] + name in shapes:
            continue
        for form in _FORMS:
            parts = tuple(match["stem"] + suffix.format(name=name) for suffix in form.suffixes)
            if key == parts[0] and all(part in shapes for part in parts) and _agree(form, parts, shapes):
                stored[match["stem"] + name] = _StoredTensor(parts, shapes[parts[form.largest]], form.combine)
                break
    return stored


def _agree(form: _Form, parts: Sequence[str], shapes: Shapes) -> bool:
    """Return whether the shapes of a tensor's parts belong together."""
    sizes = [shapes[part] for part in parts]
    if form.combine is _apply_mask:
        return sizes[0] == sizes[1]
    if form.combine is _apply_length:
        length, direction = sizes
        if not length:
            return True
        return len(length) == len(direction) and all(
            size in (1, full) for size, full in zip(length, direction, strict=True)
        )
    weight, left, right = sizes
    return (
        len(weight) > 1
        and len(left) == len(right) == 1
        and left[0] in weight[:2]
        and left[0] * right[0] == torch.Size(weight).numel()
    )


def _find_other_names(
    checkpoint: Checkpoint, model: nn.Module | None, keys: Collection[str]
) -> dict[str, str]:
    """Return the names that a file leaves out, each with the name under which it has the tensor."""
    prefix = checkpoint.prefix
    names = {
        other.removeprefix(prefix): kept.removeprefix(prefix)
        for other, kept in checkpoint.metadata.items()
        if other.startswith(prefix) and kept.startswith(prefix)
    }
    names = {other: kept for other, kept in names.items() if kept in keys and other not in keys}
    if model is None:
        return names
    shared: dict[str, str] = {}
    for group in keys_at_two_places(model):
        if present := sorted(group.intersection(keys)):
            shared |= dict.fromkeys(group.difference(keys), present[0])
    # Two BN layers of their own cannot both be corrected in one tensor.
    expected = model.state_dict().keys()
    return {k: v for k, v in names.items() if k in expected and not k.endswith(_VARIANCE)} | shared
