"""Looking at a checkpoint or an architecture: what is in it, what a re-estimation would do, and
with data, why the model is worse in eval mode than in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint, InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.diagnosis.rate_fit import BATCH_SIZE as FIT_BATCH_SIZE
from ckpt_tools.diagnosis.rate_fit import RateFit
from ckpt_tools.errors import ArchitectureError, CkptToolsError, NothingToDo, UsageError
from ckpt_tools.identify.batch_norm_presence import require_batch_norm
from ckpt_tools.identify.loading import identify_model, load_architecture
from ckpt_tools.jobs.drop_rates import apply_estimate, estimate_drop_rates
from ckpt_tools.jobs.earlier_output import refuse_second_correction
from ckpt_tools.jobs.explanation import MAX_SAMPLES, Explanation, explain_difference
from ckpt_tools.jobs.recognition import recognise_architecture
from ckpt_tools.jobs.request import ModelChoice, ReadingOptions
from ckpt_tools.location import Location
from ckpt_tools.model.calling import unwrap_model
from ckpt_tools.observation.training_history import moved_from_start
from ckpt_tools.reestimate.choice import choose
from ckpt_tools.reestimate.frozen import frozen_layers
from ckpt_tools.results import Walk
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.provenance import Correction, read_correction
from ckpt_tools.storage.reading import read_checkpoint
from ckpt_tools.walker.downstream import walk

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class InspectRequest:
    """What the user asks for: a checkpoint, an architecture, or both; and data to compare with.

    ``preprocessing`` has the input size that the walk takes; with ``data``, of which ``reading``
    says how much is read, the rest of it counts, too.
    """

    checkpoint: Location | None = None
    model: ModelChoice = field(default_factory=ModelChoice)
    data: str | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    reading: ReadingOptions = field(default_factory=ReadingOptions)


@dataclass(frozen=True)
class TensorTotals:
    """How many tensors of one type there are, the numbers in them, and their size in bytes."""

    tensors: int = 0
    numbers: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Prospect:
    """What ``bn-reestimate`` would do: the layers that it would rewrite, its control layers, and
    why.

    If there is nothing to rewrite, it would end with exit code 3, for the reason in ``why``.
    """

    rewrite: tuple[str, ...]
    controls: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint or an architecture is, as far as it could be told.

    ``loaded``, ``walk`` and ``prospect`` are None where ``error`` says why they are not known.
    ``steps``: how many batches each BN layer has counted, by its name; None where the file does not
    say. ``candidates``: the architectures, where several fit. ``correction``: what
    ``bn-reestimate`` did, if the file is one of its outputs. ``explanation``: what makes the
    stored statistics differ from those of the data, None without data. ``rate_fit``: the drop rates
    that the statistics fit, where nobody recorded them; if clear, the model is built with them.
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
    explanation: Explanation | None = None
    candidates: tuple[str, ...] = ()
    correction: Correction | None = None
    rate_fit: RateFit | None = None
    error: CkptToolsError | None = None


def inspect_checkpoint(request: InspectRequest) -> Inspection:
    """Read, identify and walk as far as that goes; what stops it is in the result, not raised.

    Raises CheckpointError for a file that cannot be read at all; UsageError and ArchitectureError
    where there is no file, and so nothing to show.
    """
    if request.checkpoint is None:
        if request.data is not None:
            raise UsageError("--data is compared with a checkpoint's statistics. Give a checkpoint, too.")
        return _inspect_architecture(request)
    source = _open_data(request)
    inspection = _inspect_file(request, request.checkpoint)
    try:
        inspection = _add_loaded_model(inspection, source)
        inspection = _add_walk(inspection, source)
        return inspection if source is None else _add_explanation(inspection, source)
    except CkptToolsError as error:
        return _add_error(inspection, error)


def _open_data(request: InspectRequest) -> Source | None:
    """Open the data, of which a sample is enough. Raises UsageError, DataError, RemoteError."""
    if request.data is None:
        return None
    limit = min(request.reading.limit or MAX_SAMPLES, MAX_SAMPLES)
    return open_source(request.data, limit=limit, seed=request.reading.seed)


def _inspect_architecture(request: InspectRequest) -> Inspection:
    if request.model.architecture is None:
        raise UsageError("Give a checkpoint, or an architecture with --arch.")
    loaded = load_architecture(request.model.architecture, request.model.model_kwargs)
    loaded = request.model.declare_dropout(loaded)
    state = loaded.model.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    parameters = _count_parameters(loaded.model)
    return _add_walk(Inspection(request, None, None, _total_by_type(tensors), parameters, loaded))


def _inspect_file(request: InspectRequest, location: Location) -> Inspection:
    checkpoint = read_checkpoint(location, weights=request.model.weights, trust=request.model.trust)
    # Without an architecture nothing tells parameters from buffers: all floats but running
    # statistics.
    parameters = sum(
        tensor.numel()
        for key, tensor in checkpoint.tensors.items()
        if tensor.is_floating_point() and not key.endswith(_STATISTICS)
    )
    # A checkpoint may be several files: shards and their index.
    size = sum(file.stat().st_size for file in find_checkpoint_files(checkpoint.path).files)
    totals = _total_by_type(checkpoint.tensors)
    correction = read_correction(checkpoint)
    return Inspection(request, checkpoint, size, totals, parameters, correction=correction)


def _add_loaded_model(inspection: Inspection, source: Source | None) -> Inspection:
    """Load the checkpoint into its architecture; where several fit it, data can decide."""
    assert inspection.checkpoint is not None
    request = inspection.request
    choice = request.model
    if source is None:
        loaded = identify_model(inspection.checkpoint, choice.architecture, choice.model_kwargs)
        loaded = choice.declare_dropout(loaded)
    else:
        checkpoint, preprocessing = inspection.checkpoint, request.preprocessing
        loaded = recognise_architecture(checkpoint, choice, source, preprocessing).loaded
        assert loaded.checkpoint is not None
    return replace(
        inspection,
        checkpoint=loaded.checkpoint,
        loaded=loaded,
        input_spec=loaded.input_spec,
        parameters=_count_parameters(loaded.model),
    )


def _add_explanation(inspection: Inspection, source: Source) -> Inspection:
    """Compare the stored statistics with those of the data, if there are BN layers to compare."""
    assert inspection.loaded is not None
    assert inspection.walk is not None
    if not any(layer.reached for layer in inspection.walk.batch_norms):
        return inspection
    loaded, explained = inspection.loaded, _explain(inspection, source)
    # On data that the preprocessing has made another one, a fit of the rates would mean nothing.
    if loaded.rates != "unknown" or explained.preprocessing:
        return replace(inspection, explanation=explained)
    batches = source.batches(inspection.input_spec, Reading(FIT_BATCH_SIZE))
    fit = estimate_drop_rates(loaded, inspection.walk, batches)
    inspection = replace(inspection, rate_fit=fit, explanation=explained)
    if fit is None or not fit.is_clear:
        return inspection
    inspection = _add_walk(replace(inspection, loaded=apply_estimate(loaded, fit)), source)
    return replace(inspection, explanation=_explain(inspection, source))


def _explain(inspection: Inspection, source: Source) -> Explanation:
    assert inspection.loaded is not None
    assert inspection.walk is not None
    return explain_difference(
        inspection.loaded, inspection.walk, source, inspection.input_spec, inspection.request.reading
    )


def _add_walk(inspection: Inspection, source: Source | None = None) -> Inspection:
    loaded = inspection.loaded
    assert loaded is not None
    spec = resolve_input_spec(loaded.input_spec, inspection.request.preprocessing, source)
    example = example_input(spec, source)
    model_walk = walk(loaded.model, example, probe=loaded.probe, dropout=loaded.dropout)
    steps = _count_steps(model_walk, loaded)
    inspection = replace(inspection, input_spec=spec, walk=model_walk, steps=steps)
    if loaded.checkpoint is None:
        return inspection
    return replace(inspection, prospect=_predict_reestimation(model_walk, loaded.checkpoint, loaded))


def _add_error(inspection: Inspection, error: CkptToolsError) -> Inspection:
    """Record what stopped an inspection.

    Where no architecture was found for a file without BatchNorm, that is no error: there is nothing
    to do, whatever the architecture is.
    """
    checkpoint = inspection.checkpoint
    assert checkpoint is not None
    inspection = replace(inspection, candidates=tuple(getattr(error, "candidates", ())))
    if isinstance(error, ArchitectureError) and inspection.request.model.architecture is None:
        try:
            require_batch_norm(checkpoint)
        except NothingToDo as reason:
            return replace(inspection, prospect=Prospect((), (), str(reason)))
    return replace(inspection, error=error)


def _predict_reestimation(model_walk: Walk, checkpoint: Checkpoint, loaded: LoadedModel) -> Prospect:
    try:
        refuse_second_correction(checkpoint)
        require_batch_norm(checkpoint)
        frozen = frozen_layers(loaded.model, model_walk)
        choice = choose(model_walk, "auto", rates=loaded.rates, statistics="variance", frozen=frozen)
    except NothingToDo as error:
        return Prospect((), (), str(error))
    in_order = [layer.name for layer in model_walk.batch_norms]
    rewrite = tuple(name for name in in_order if name in choice.rewrite)
    controls = tuple(name for name in in_order if name in choice.controls)
    return Prospect(rewrite, controls, choice.why)


def _count_steps(model_walk: Walk, loaded: LoadedModel) -> dict[str, int | None]:
    """How many batches each BN layer has counted; None where the file does not say.

    Without a counter, or with one of 0, the statistics tell whether a layer has seen any batch.
    Converted files have counters of 0 beside the statistics of a training.
    """
    if loaded.checkpoint is None:
        return {}
    tensors = loaded.checkpoint.tensors
    steps: dict[str, int | None] = {}
    for layer in model_walk.batch_norms:
        stem = f"{layer.name}." if layer.name else ""
        counter = tensors.get(f"{stem}num_batches_tracked")
        mean, variance = (tensors.get(f"{stem}{name}") for name in _STATISTICS)
        count = int(counter) if counter is not None and counter.numel() == 1 else 0
        is_untold = not count and (mean is None or moved_from_start(mean, variance))
        steps[layer.name] = None if is_untold else count
    return steps


def _total_by_type(tensors: Mapping[str, Tensor]) -> dict[str, TensorTotals]:
    """The totals of each dtype, that with the most bytes first."""
    totals: dict[str, TensorTotals] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        total = totals.get(name, TensorTotals())
        totals[name] = TensorTotals(
            total.tensors + 1, total.numbers + tensor.numel(), total.bytes + tensor.nbytes
        )
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unwrap_model(model).parameters())
