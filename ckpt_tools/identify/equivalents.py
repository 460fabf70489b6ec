"""Which architectures of the same keys compute the same function: one forward of each on the same random weights."""

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

_SIDE = 96  # pixels; models of a fixed size are run at theirs
_LARGEST = 250_000_000  # values; a larger model is not run to be told from its like: that takes a minute
_SAME = 1e-4  # relative difference of the outputs; other padding or pooling gives 0.1 to 1


def merge_equivalent_candidates(checkpoint: Checkpoint, candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """One candidate a function, the others as its ``twins``: same output, same input shape, mean and deviation.

    The first is what the file is called after, else timm's, else the one with the shortest name.
    """
    ordered = sorted(candidates, key=lambda one: name_preference(checkpoint.path, one.architecture))
    if len(ordered) < 2:
        return tuple(ordered)
    groups: list[list[Candidate]] = []
    small = sum(tensor.numel() for tensor in checkpoint.tensors.values()) <= _LARGEST
    for spec, members in _by_input(ordered).items():
        groups += _by_response(members, spec if small else None)
    return tuple(replace(first, twins=tuple(one.architecture for one in others)) for first, *others in groups)


def _by_input(candidates: Sequence[Candidate]) -> dict[InputSpec | None, list[Candidate]]:
    """Candidates by what they eat; how an image is resized and cropped makes no other function."""
    found: dict[InputSpec | None, list[Candidate]] = {}
    for candidate in candidates:
        spec = candidate.input_spec
        found.setdefault(InputSpec(spec.shape, spec.mean, spec.std) if spec else None, []).append(candidate)
    return found


def _by_response(candidates: Sequence[Candidate], spec: InputSpec | None) -> list[list[Candidate]]:
    """Candidates of one input by function; a process that meets the same ones again remembers."""
    if spec is None or len(candidates) == 1:
        return [[one] for one in candidates]
    key = (spec, *((one.architecture, repr(sorted(one.recipe.kwargs.items()))) for one in candidates))
    if key not in _known:
        _known[key] = _functions(candidates, spec.shape)
    groups: dict[int, list[Candidate]] = {}
    for number, candidate in zip(_known[key], candidates, strict=True):
        groups.setdefault(number, []).append(candidate)
    return list(groups.values())


_known: dict[object, list[int]] = {}


def _functions(candidates: Sequence[Candidate], shape: Sequence[int]) -> list[int]:
    """A number for each candidate, equal for equal functions."""
    weights: dict[str, Tensor] = {}
    distinct: list[Tensor | None] = []
    numbers = []
    for candidate in candidates:
        answer = output_on_random_input(candidate, shape, weights)
        number = next((number for number, known in enumerate(distinct) if _same(known, answer)), len(distinct))
        if number == len(distinct):
            distinct.append(answer)
        numbers.append(number)
    return numbers


def output_on_random_input(candidate: Candidate, shape: Sequence[int], weights: dict[str, Tensor]) -> Tensor | None:
    """The model's output, flattened, for two random inputs under random weights; None if it cannot be run.

    ``weights`` by key are what earlier candidates were given; what is missing there is drawn and added.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        with SkipRandomInitialisation():
            model = candidate.adapter.build(candidate.recipe.name, candidate.recipe.kwargs).float().eval()
        _randomise(model, weights)
        small = (*shape[:-2], *(min(side, _SIDE) for side in shape[-2:]))
        for size in dict.fromkeys((small, tuple(shape))):
            sample = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
            try:
                return _flat(model(sample))
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
                continue  # of a fixed size, or it wants something else than an image
    return None


def _randomise(model: nn.Module, known: dict[str, Tensor]) -> None:
    """Weights that keep a signal's size; BatchNorm normalises by the batch, so that depth hides no difference."""
    generator = torch.Generator().manual_seed(len(known))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, tensor in model.state_dict().items():
        if key in parameters and tensor.is_floating_point():
            drawn = known.get(key)
            if drawn is None or drawn.shape != tensor.shape:
                drawn = known[key] = _random_weight(key, tensor, generator)
            tensor.copy_(drawn)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = True


def _random_weight(key: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.dim() > 1:
        return noise.mul_(max(1, like[0].numel()) ** -0.5)
    return noise.mul_(0.1).add_(float(key.endswith("weight")))


def _flat(output: object) -> Tensor | None:
    """Every number of an output in one row; None where there is none to compare."""
    found = list(_tensors(output))
    row = torch.cat(found) if found else torch.zeros(0)
    return row if row.numel() and bool(row.isfinite().all()) and float(row.std(correction=0)) > 0 else None


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.float().reshape(-1)
    elif isinstance(output, Mapping):
        yield from (row for value in output.values() for row in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (row for value in output for row in _tensors(value))


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape:
        return False
    return float((first - second).norm()) <= _SAME * float(first.norm())
