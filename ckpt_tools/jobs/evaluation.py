"""Evaluation of a checkpoint, or of two on the same images: metrics and a gate, no output."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from ckpt_tools.contract import Checkpoint, LoadedModel
from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.labelled_stream import labelled_batches
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.evaluate.scores import Metrics, compute_metrics
from ckpt_tools.evaluate.validation import (
    EvaluationSettings,
    ModelEvaluation,
    Validation,
    open_validation,
    parse_evaluation_settings,
)
from ckpt_tools.jobs.recognition import recognise_architecture
from ckpt_tools.jobs.request import EvaluationOptions, ModelChoice, ReadingOptions
from ckpt_tools.location import Location
from ckpt_tools.machine.device import move_to_device, resolve_device
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.storage.provenance import recorded_correction
from ckpt_tools.storage.reading import checkpoint_sha256, read_checkpoint
from ckpt_tools.walker.downstream import walk

InputDecision = Literal["before", "after", "options", "data", "each"]
"""What two checkpoints are evaluated on: the input that one of them has, whatever the other says;
what the user's options say; preprocessed data as it is; or each its own.
"""


@dataclass(frozen=True)
class EvaluationRequest:
    """Everything the user asks of an evaluation.

    ``before``: a second checkpoint, to compare with.
    """

    checkpoint: Location
    data: str
    before: Location | None = None
    model: ModelChoice = field(default_factory=ModelChoice)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint in its model, with the data as this model takes it."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    validation: Validation


@dataclass(frozen=True)
class _Opened:
    """A checkpoint as it stands in its file and in its model, and the data for it."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    source: Source

    @property
    def is_output(self) -> bool:
        """Whether the checkpoint is what ``bn-reestimate`` wrote."""
        return bool(recorded_correction(self.checkpoint))


@dataclass(frozen=True)
class EvaluationPlan:
    """The checkpoints that are going to be evaluated, loaded and checked, and the device to run
    them on.

    ``input_decision`` says what the preprocessing of two checkpoints follows; None for a single one.
    """

    request: EvaluationRequest
    after: EvaluatedCheckpoint
    before: EvaluatedCheckpoint | None
    device: str
    input_decision: InputDecision | None = None

    @property
    def images(self) -> int | None:
        """How many images a pass reads; None if only a pass can tell."""
        return self.after.validation.stream.count


@dataclass(frozen=True)
class EvaluationOutcome:
    """The metrics, and what they were measured on.

    If a gate was not passed, ``metrics.failures`` says why.
    """

    plan: EvaluationPlan
    metrics: Metrics
    sha256: str
    before_sha256: str | None
    seconds: float


def prepare_evaluation(request: EvaluationRequest) -> EvaluationPlan:
    """Load and check everything that can be checked before an image is read.

    Raises any CkptToolsError.
    """
    options = request.evaluation
    settings = parse_evaluation_settings(
        request.data,
        options.class_map,
        options.calibrate,
        options.gate,
        compared=request.before is not None,
        labels=options.labels,
    )
    device = resolve_device(request.reading.device)
    if request.before is None:
        after = _load_for_evaluation(request.checkpoint, request)
        return EvaluationPlan(request, _open_for_evaluation(after, settings, request, device), None, device)
    before = _load_for_evaluation(request.before, request)
    after = _load_for_evaluation(request.checkpoint, request)
    before, after, decision = _share_input(before, after)
    opened_before = _open_for_evaluation(before, settings, request, device)
    opened_after = _open_for_evaluation(after, settings, request, device)
    return EvaluationPlan(request, opened_after, opened_before, device, decision)


def execute_evaluation(
    plan: EvaluationPlan, progress: Callable[[str, int], None] | None = None
) -> EvaluationOutcome:
    """Run the models on the labelled data.

    ``progress`` is called with the name of the model ("before", "after", or "evaluate" for a single
    one) and the number of images so far.
    """
    started = time.perf_counter()
    before = before_sha256 = None
    if plan.before is not None and plan.request.before is not None:
        before = _evaluate_checkpoint(plan.before, "before", plan.device, progress)
        before_sha256 = checkpoint_sha256(plan.request.before)
    name = "evaluate" if plan.before is None else "after"
    after = _evaluate_checkpoint(plan.after, name, plan.device, progress)
    return EvaluationOutcome(
        plan,
        compute_metrics(plan.after.validation, before, after),
        checkpoint_sha256(plan.request.checkpoint),
        before_sha256,
        time.perf_counter() - started,
    )


def _load_for_evaluation(location: Location, request: EvaluationRequest) -> _Opened:
    # Each checkpoint has a source of its own; with the same seed both see the same images.
    options = request.reading
    source = open_source(request.data, limit=options.limit, seed=options.seed, split="test")
    checkpoint = read_checkpoint(location, weights=request.model.weights, trust=request.model.trust)
    loaded = recognise_architecture(checkpoint, request.model, source, request.preprocessing).loaded
    return _Opened(checkpoint, loaded, source)


def _share_input(before: _Opened, after: _Opened) -> tuple[_Opened, _Opened, InputDecision]:
    """Give two checkpoints of one network the same input, and say which of them decides it.

    Otherwise a change between two inputs would look like one between the checkpoints. BEFORE
    decides, since it is the checkpoint as the framework saved it: an output has lost the words of
    its source, and one of an earlier version does not record the input. If BEFORE is the output and
    AFTER is not, AFTER decides. Networks of different shapes keep their own inputs, which each of
    them was trained for.
    """
    if after.source.is_preprocessed:
        return before, after, "data"
    assert before.loaded.checkpoint is not None
    assert after.loaded.checkpoint is not None
    if before.loaded.checkpoint.shapes != after.loaded.checkpoint.shapes:
        return before, after, "each"
    decides_after = before.is_output and not after.is_output
    first, second = (after, before) if decides_after else (before, after)
    if first.loaded.input_spec is None:
        decides_after = not decides_after
        first, second = second, first
    if first.loaded.input_spec is None:
        return before, after, "options"  # without them, opening the data raises
    spec = first.loaded.input_spec
    second = replace(second, loaded=replace(second.loaded, input_spec=spec))
    return (second, first, "after") if decides_after else (first, second, "before")


def _open_for_evaluation(
    opened: _Opened, settings: EvaluationSettings, request: EvaluationRequest, device: str
) -> EvaluatedCheckpoint:
    loaded, source, options = opened.loaded, opened.source, request.reading
    assert loaded.checkpoint is not None
    batch_size = options.batch_size
    if batch_size is None:
        example = _example_batch(source, settings, loaded, request.preprocessing)
        batch_size = fitting_batch_size(walk(loaded.model, example).bytes_per_sample, device)
    validation = open_validation(
        settings,
        source,
        loaded,
        request.preprocessing,
        Reading(batch_size, options.workers, device=device),
        seed=options.seed,
    )
    return EvaluatedCheckpoint(loaded.checkpoint, loaded, validation)


def _example_batch(
    source: Source,
    settings: EvaluationSettings,
    loaded: LoadedModel,
    preprocessing: Preprocessing,
) -> object:
    """A batch to walk the model with: zeros of the input's shape, else the first inputs of the
    data.
    """
    spec = resolve_input_spec(loaded.input_spec, preprocessing, source)
    if spec is not None:
        return example_input(spec, source)
    labelled = labelled_batches(source, None, Reading(2, workers=0), settings.class_map, settings.label_file)
    inputs, _ = next(iter(labelled))
    return inputs


def _evaluate_checkpoint(
    evaluated: EvaluatedCheckpoint,
    name: str,
    device: str,
    progress: Callable[[str, int], None] | None,
) -> ModelEvaluation:
    model = move_to_device(evaluated.loaded.model, device)
    return evaluated.validation.evaluate_model(model, name, progress)
