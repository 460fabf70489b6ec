"""Looking at a checkpoint or an architecture without data: what is in it, and what a re-estimation would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint, InputSpec, LoadedModel
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.errors import ArchitectureError, CkptToolsError, NothingToDo, UsageError
from ckpt_tools.identify.batch_norm_presence import require_batch_norm
from ckpt_tools.identify.loading import identify_model, load_architecture
from ckpt_tools.location import Location
from ckpt_tools.model.calling import unwrap_model
from ckpt_tools.reestimate.choice import choose
from ckpt_tools.results import Walk
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.reading import read_checkpoint
from ckpt_tools.walker.downstream import walk

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class InspectRequest:
    """What the user asks for: a checkpoint, an architecture, or both."""

    checkpoint: Location | None = None
    architecture: str | None = None
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    weights: str = "auto"
    trust: bool = False
    input_size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorTotals:
    """How many tensors of one type there are, the numbers in them, and their size in bytes."""

    tensors: int = 0
    numbers: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Prospect:
    """What ``bn-reestimate`` would do: the layers it would rewrite, those it would control with, and why.

    Nothing to rewrite means that it would end with exit code 3, for the reason in ``why``.
    """

    rewrite: tuple[str, ...]
    controls: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Inspection:
    """What was found. ``loaded``, ``walk`` and ``prospect`` are None where ``error`` says why they are not known.

    ``steps``: batches that each BN layer has counted, by its name; None where the file does not say.
    """

    request: InspectRequest
    checkpoint: Checkpoint | None
    size: int | None  # of the checkpoint's files in bytes
    types: Mapping[str, TensorTotals]
    parameters: int
    loaded: LoadedModel | None = None
    input_spec: InputSpec | None = None
    walk: Walk | None = None
    steps: Mapping[str, int | None] = field(default_factory=dict)
    prospect: Prospect | None = None
    candidates: tuple[str, ...] = ()  # architectures, where several fit
    error: CkptToolsError | None = None


def inspect_checkpoint(request: InspectRequest) -> Inspection:
    """Read, identify and walk as far as that goes; what stops it is in the result, not raised.

    Raises CheckpointError for a file that cannot be read at all; UsageError and ArchitectureError where there is
    no file, and so nothing to show.
    """
    if request.checkpoint is None:
        return _architecture(request)
    found = _file(request)
    try:
        found = _add_loaded_model(found)
        return _add_walk(found)
    except CkptToolsError as error:
        return _add_error(found, error)


def _architecture(request: InspectRequest) -> Inspection:
    if request.architecture is None:
        raise UsageError("Give a checkpoint, or an architecture with --arch.")
    loaded = load_architecture(request.architecture, request.model_kwargs)
    state = {key: value for key, value in loaded.model.state_dict().items() if isinstance(value, Tensor)}
    return _add_walk(Inspection(request, None, None, _types(state), _count(loaded.model), loaded))


def _file(request: InspectRequest) -> Inspection:
    assert request.checkpoint is not None
    checkpoint = read_checkpoint(request.checkpoint, weights=request.weights, trust=request.trust)
    numbers = sum(
        tensor.numel()
        for key, tensor in checkpoint.tensors.items()
        if tensor.is_floating_point() and not key.endswith(_STATISTICS)
    )
    size = sum(file.stat().st_size for file in find_checkpoint_files(checkpoint.path).files)
    return Inspection(request, checkpoint, size, _types(checkpoint.tensors), numbers)


def _add_loaded_model(found: Inspection) -> Inspection:
    assert found.checkpoint is not None
    loaded = identify_model(found.checkpoint, found.request.architecture, found.request.model_kwargs)
    known = replace(found, checkpoint=loaded.checkpoint, loaded=loaded, input_spec=loaded.input_spec)
    return replace(known, parameters=_count(loaded.model))


def _add_walk(found: Inspection) -> Inspection:
    loaded = found.loaded
    assert loaded is not None
    spec = resolve_input_spec(loaded.input_spec, Preprocessing(input_size=found.request.input_size), None)
    seen = walk(loaded.model, example_input(spec, None), probe=loaded.probe)
    found = replace(found, input_spec=spec, walk=seen, steps=_steps(seen, loaded))
    return found if loaded.checkpoint is None else replace(found, prospect=_prospect(seen, loaded))


def _add_error(found: Inspection, error: CkptToolsError) -> Inspection:
    """A file without BatchNorm needs no architecture to be told that there is nothing to do."""
    checkpoint = found.checkpoint
    assert checkpoint is not None
    found = replace(found, candidates=tuple(getattr(error, "candidates", ())))
    if isinstance(error, ArchitectureError) and found.request.architecture is None:
        try:
            require_batch_norm(checkpoint)
        except NothingToDo as reason:
            return replace(found, prospect=Prospect((), (), str(reason)))
    return replace(found, error=error)


def _prospect(seen: Walk, loaded: LoadedModel) -> Prospect:
    assert loaded.checkpoint is not None
    try:
        require_batch_norm(loaded.checkpoint)
        choice = choose(seen, "auto", rates=loaded.rates, statistics="variance")
    except NothingToDo as error:
        return Prospect((), (), str(error))
    in_order = [layer.name for layer in seen.batch_norms]
    rewrite, controls = (tuple(n for n in in_order if n in names) for names in (choice.rewrite, choice.controls))
    return Prospect(rewrite, controls, choice.why)


def _steps(seen: Walk, loaded: LoadedModel) -> dict[str, int | None]:
    """Where the file has no counters, running means that are all zero tell of a layer that saw nothing."""
    if loaded.checkpoint is None:
        return {}
    tensors = loaded.checkpoint.tensors
    steps: dict[str, int | None] = {}
    for layer in seen.batch_norms:
        stem = f"{layer.name}." if layer.name else ""
        counter, mean = tensors.get(f"{stem}num_batches_tracked"), tensors.get(f"{stem}running_mean")
        if counter is not None and counter.numel() == 1:
            steps[layer.name] = int(counter)
        else:
            steps[layer.name] = 0 if mean is not None and not bool(mean.any()) else None
    return steps


def _types(tensors: Mapping[str, Tensor]) -> dict[str, TensorTotals]:
    found: dict[str, TensorTotals] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        old = found.get(name, TensorTotals())
        found[name] = TensorTotals(old.tensors + 1, old.numbers + tensor.numel(), old.bytes + tensor.nbytes)
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unwrap_model(model).parameters())
