"""Finds architectures that share their keys and compute the same function.

Each is run once, on the same random weights and inputs. timm's and torchvision's `resnet50` agree;
`resnetaa50` and `resnetblur50` share their keys and differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.contract import Checkpoint, InputSpec
from ckpt_tools.identify.candidate import Candidate
from ckpt_tools.identify.file_name_hints import name_preference
from ckpt_tools.identify.skeleton import SkipRandomInitialisation

_SIDE = 96  # Pixels. A model that accepts one size only is run at that size.
_MAX_VALUES = 250_000_000  # Comparing larger models takes a minute, so they are not run.
# Relative difference of the outputs. Other padding or pooling gives 0.1 to 1.
_TOLERANCE = 1e-4


def merge_equivalent_candidates(
    checkpoint: Checkpoint, candidates: Iterable[Candidate]
) -> tuple[Candidate, ...]:
    """Merge the candidates that compute the same function into one, with the others as its `twins`.

    Equivalent candidates have the same output, and expect the same input shape, mean and standard
    deviation. The first of a group is the one that the file is named after, else timm's, else the
    one with the shortest name.
    """
    # Sorted first, so that each group begins with its preferred name.
    ordered = sorted(
        candidates, key=lambda candidate: name_preference(checkpoint.path, candidate.architecture)
    )
    if len(ordered) < 2:
        return tuple(ordered)
    groups: list[list[Candidate]] = []
    size = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    for spec, members in _group_by_input(ordered).items():
        groups += _group_by_output(members, spec if size <= _MAX_VALUES else None)
    return tuple(replace(first, twins=tuple(twin.architecture for twin in twins)) for first, *twins in groups)


def _group_by_input(candidates: Sequence[Candidate]) -> dict[InputSpec | None, list[Candidate]]:
    """Group candidates by the tensors they expect.

    How an image is resized and cropped does not make another function, so it does not count.
    """
    groups: dict[InputSpec | None, list[Candidate]] = {}
    for candidate in candidates:
        spec = candidate.input_spec
        key = InputSpec(spec.shape, spec.mean, spec.std) if spec else None
        groups.setdefault(key, []).append(candidate)
    return groups


def _group_by_output(candidates: Sequence[Candidate], spec: InputSpec | None) -> list[list[Candidate]]:
    """Group candidates of one input by their function; without a spec each stands alone."""
    if spec is None or len(candidates) == 1:
        return [[candidate] for candidate in candidates]
    models = ((item.architecture, repr(sorted(item.recipe.kwargs.items()))) for item in candidates)
    key = (spec, *models)
    if key not in _group_numbers:
        _group_numbers[key] = _number_functions(candidates, spec.shape)
    groups: dict[int, list[Candidate]] = {}
    for number, candidate in zip(_group_numbers[key], candidates, strict=True):
        groups.setdefault(number, []).append(candidate)
    return list(groups.values())


# Checkpoints of a sweep share their candidates, so a process compares them once.
_group_numbers: dict[object, list[int]] = {}


def _number_functions(candidates: Sequence[Candidate], shape: Sequence[int]) -> list[int]:
    """Return a number for each candidate; equal numbers stand for equal functions."""
    weights: dict[str, Tensor] = {}
    distinct: list[Tensor | None] = []
    numbers = []
    for candidate in candidates:
        output = output_on_random_input(candidate, shape, weights)
        equal = (i for i, previous in enumerate(distinct) if _agree(previous, output))
        number = next(equal, len(distinct))
        if number == len(distinct):
            distinct.append(output)
        numbers.append(number)
    return numbers


def output_on_random_input(
    candidate: Candidate, shape: Sequence[int], weights: dict[str, Tensor]
) -> Tensor | None:
    """Return the model's output for two random inputs under random weights, in one row.

    `weights` holds, by key, the random weights of earlier candidates, which are used again. Weights
    that it lacks are drawn and added to it. Returns None if the model cannot be run on such an
    input.
    """
    recipe = candidate.recipe
    # Constructors draw random numbers. The caller's generator must not advance by that.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        with SkipRandomInitialisation():
            model = candidate.adapter.build(recipe.name, recipe.kwargs).float().eval()
        _randomise(model, weights)
        # A small image is tried first, since its forward takes less time.
        small = (*shape[:-2], *(min(side, _SIDE) for side in shape[-2:]))
        for size in dict.fromkeys((small, tuple(shape))):
            # The same seed for every candidate, so that all see the same inputs.
            sample = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
            try:
                return _flatten_output(model(sample))
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
                continue  # The model accepts one size only, or no images at all.
    return None


def _randomise(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the model random weights that keep the scale of a signal from layer to layer.

    BN layers normalise by the batch, so that differences survive the depth of the model.
    """
    # The seed differs between models that add weights, so that no weights repeat earlier ones.
    generator = torch.Generator().manual_seed(len(weights))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, tensor in model.state_dict().items():
        if key in parameters and tensor.is_floating_point():
            if key not in weights or weights[key].shape != tensor.shape:
                weights[key] = _draw_weight(key, tensor, generator)
            tensor.copy_(weights[key])
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = True


def _draw_weight(key: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.dim() > 1:
        return noise.mul_(max(1, like[0].numel()) ** -0.5)
    # One-dimensional parameters: scales of normalisation layers lie around 1, biases around 0.
    return noise.mul_(0.1).add_(float(key.endswith("weight")))


def _flatten_output(output: object) -> Tensor | None:
    """Return every number of an output in one row, or None if they do not characterise the model.

    An output that is empty, constant or not finite tells no model from another.
    """
    row = torch.cat([torch.zeros(0), *_flat_tensors(output)])
    if not row.numel() or not row.isfinite().all() or row.std(correction=0) == 0:
        return None
    return row


def _flat_tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.float().reshape(-1)
    elif isinstance(output, Mapping):
        yield from _flat_tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _flat_tensors(value)


def _agree(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape:
        return False
    return float((first - second).norm()) <= _TOLERANCE * float(first.norm())
