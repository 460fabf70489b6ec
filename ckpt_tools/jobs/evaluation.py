"""Evaluation of one checkpoint, or of two on the same images: metrics and a gate, nothing written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckpt_tools.contract import Checkpoint, LoadedModel
from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.labelled_stream import labelled_batches
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.data.stream import Batch
from ckpt_tools.evaluate.scores import Metrics, compute_metrics
from ckpt_tools.evaluate.validation import (
    EvaluationSettings,
    ModelEvaluation,
    Validation,
    open_validation,
    parse_evaluation_settings,
)
from ckpt_tools.jobs.recognition import recognise_architecture
from ckpt_tools.location import Location
from ckpt_tools.machine.device import move_to_device, resolve_device
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.storage.reading import checkpoint_sha256, read_checkpoint
from ckpt_tools.walker.downstream import walk


@dataclass(frozen=True)
class EvaluationRequest:
    """Everything the user asks for. ``before``: a second checkpoint, to compare with."""

    checkpoint: Location
    data: str
    before: Location | None = None
    class_map: Location | None = None
    calibrate: bool = False
    gate: str | None = None
    architecture: str | None = None
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    weights: str = "auto"
    trust: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    limit: int | None = None
    seed: int = 0
    device: str = "auto"  # CUDA if there is one, else the CPU
    batch_size: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint in its model, with the data as this model takes it."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    validation: Validation


@dataclass(frozen=True)
class EvaluationPlan:
    """What is about to be evaluated."""

    request: EvaluationRequest
    after: EvaluatedCheckpoint
    before: EvaluatedCheckpoint | None
    device: str

    @property
    def images(self) -> int | None:
        """Images that a pass reads; None if only a pass can tell."""
        return self.after.validation.stream.count


@dataclass(frozen=True)
class EvaluationOutcome:
    """The metrics, and what they were measured on. A gate that is not passed is told by ``metrics.failures``."""

    plan: EvaluationPlan
    metrics: Metrics
    sha256: str
    before_sha256: str | None
    seconds: float


def prepare_evaluation(request: EvaluationRequest) -> EvaluationPlan:
    """Load and check everything that can be checked before an image is read. Raises any CkptToolsError."""
    compared = request.before is not None
    asked = parse_evaluation_settings(
        request.data, request.class_map, request.calibrate, request.gate, compared=compared
    )
    device = resolve_device(request.device)
    before = None if request.before is None else _contestant(request.before, asked, request, device)
    return EvaluationPlan(request, _contestant(request.checkpoint, asked, request, device), before, device)


def execute_evaluation(plan: EvaluationPlan, progress: Callable[[str, int], None] | None = None) -> EvaluationOutcome:
    """Run the models. ``progress`` is called with which one and the number of images so far."""
    started = time.perf_counter()
    before = None if plan.before is None else _evaluate_checkpoint(plan.before, "before", plan.device, progress)
    after = _evaluate_checkpoint(plan.after, "after" if plan.before else "evaluate", plan.device, progress)
    return EvaluationOutcome(
        plan,
        compute_metrics(plan.after.validation, before, after),
        checkpoint_sha256(plan.request.checkpoint),
        None if plan.request.before is None else checkpoint_sha256(plan.request.before),
        time.perf_counter() - started,
    )


def _contestant(
    location: Location, asked: EvaluationSettings, request: EvaluationRequest, device: str
) -> EvaluatedCheckpoint:
    source = open_source(request.data, limit=request.limit, seed=request.seed, split="test")
    checkpoint = read_checkpoint(location, weights=request.weights, trust=request.trust)
    loaded = recognise_architecture(
        checkpoint, request.architecture, request.model_kwargs, source, request.preprocessing
    ).loaded
    assert loaded.checkpoint is not None
    batch_size = request.batch_size
    if batch_size is None:
        spec = resolve_input_spec(loaded.input_spec, request.preprocessing, source)
        example = example_input(spec, source) if spec is not None else _first_unlabelled_batch(source, asked)
        batch_size = fitting_batch_size(walk(loaded.model, example).bytes_per_sample, device)
    validation = open_validation(
        asked,
        source,
        loaded,
        request.preprocessing,
        batch_size=batch_size,
        workers=request.workers,
        device=device,
        seed=request.seed,
    )
    return EvaluatedCheckpoint(loaded.checkpoint, loaded, validation)


def _first_unlabelled_batch(source: Source, asked: EvaluationSettings) -> Batch:
    """The first input of the data, for a model that takes it as it is."""
    return next(iter(labelled_batches(source, None, class_map=asked.class_map, batch_size=2, workers=0)))[0]


def _evaluate_checkpoint(
    contestant: EvaluatedCheckpoint, name: str, device: str, progress: Callable[[str, int], None] | None
) -> ModelEvaluation:
    return contestant.validation.evaluate_model(move_to_device(contestant.loaded.model, device), name, progress)
