"""What is about to happen: a checkpoint loaded and walked, its data found, everything checked that can be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ckpt_tools.contract import Checkpoint, InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.preprocessing import resolve_input_spec
from ckpt_tools.data.sample_order import Share
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.distributed import ALONE, Ranks, Team
from ckpt_tools.evaluate.validation import EvaluationSettings, Validation, open_validation, parse_optional_settings
from ckpt_tools.identify.batch_norm_presence import require_batch_norm
from ckpt_tools.jobs.outputs import default_output_path, refuse_overwriting_data
from ckpt_tools.jobs.recognition import Recognition, recognise_architecture
from ckpt_tools.jobs.request import Request
from ckpt_tools.jobs.walk_cache import WalkCache
from ckpt_tools.location import Location
from ckpt_tools.machine.device import resolve_device
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.machine.precision import check_precision
from ckpt_tools.reestimate.choice import Choice, choose
from ckpt_tools.reestimate.run import check_method, check_team
from ckpt_tools.results import Walk
from ckpt_tools.storage.files.stamps import FileStamp
from ckpt_tools.storage.output.checkpoint_writer import check_output
from ckpt_tools.storage.reading import read_checkpoint

_LOOK = 64  # samples in a batch of the first look


@dataclass(frozen=True)
class Plan:
    """What is about to happen: shown before the first image is read."""

    request: Request
    recognised: Recognition
    checkpoint: Checkpoint
    walk: Walk
    choice: Choice
    source: Source
    stream: BatchStream
    input_spec: InputSpec | None
    batch_size: int
    device: str
    output: Location
    look: BatchStream  # the first samples, to see whether this is the training data
    team: Team = ALONE
    validation: Validation | None = None
    replaces: FileStamp | None = None  # a damaged output of an earlier run, in whose place the new one goes

    @property
    def labelled_images(self) -> int | None:
        """Images to judge the model on; None if there are none, or only a pass can tell."""
        return None if self.validation is None else self.validation.stream.count

    @property
    def loaded_model(self) -> LoadedModel:
        """The checkpoint in the model it belongs to."""
        return self.recognised.loaded


@dataclass(frozen=True)
class Sources:
    """The data, and the labelled data if there is any, found but not read."""

    data: Source
    labelled: Source | None = None

    @classmethod
    def from_request(cls, request: Request) -> Sources:
        """Raises UsageError, DataError, RemoteError."""
        data = open_source(request.data, limit=request.limit, seed=request.seed)
        if request.eval_data is None:
            return cls(data)
        return cls(data, open_source(request.eval_data, seed=request.seed, split="test"))


def prepare_reestimation(
    request: Request,
    sources: Sources | None = None,
    team: Team = ALONE,
    walks: WalkCache | None = None,
    replaces: FileStamp | None = None,
) -> Plan:
    """Load, walk and check everything that can be checked before data is read; on every rank of a team the same.

    ``sources``: the data, if it is open already. ``walks``: those of earlier checkpoints of this run. ``replaces``: a
    damaged output of an earlier run, which may be replaced. Raises any CkptToolsError, on all ranks if on one; nothing
    is written.
    """
    plan = team.each(lambda: _prepare_on_rank(request, sources, team, walks or WalkCache(), replaces))
    size = team.first(lambda: plan.batch_size)
    if size == plan.batch_size:
        return plan
    return replace(
        plan, batch_size=size, stream=_stream(request, plan.source, plan.input_spec, size, plan.device, team)
    )


def check_request(request: Request) -> EvaluationSettings | None:
    """What is asked of the labelled data, after all that can be said of a request without its files.

    Raises UsageError, DataError for a class map that cannot be read, CkptToolsError if torchmetrics is missing.
    """
    check_method(
        request.estimator, request.layers, request.statistics, request.tolerance, request.momentum, request.epochs
    )
    return parse_optional_settings(request.eval_data, request.class_map, request.calibrate, request.gate)


def choose_device(request: Request, ranks: Ranks = Ranks()) -> str:  # noqa: B008 - frozen
    """The device of a rank. Raises UsageError, ModelError if it is not there or cannot compute as was asked."""
    device = resolve_device(request.device, ranks)
    check_precision(request.precision, torch.device(device))
    return device


def _prepare_on_rank(
    request: Request, sources: Sources | None, team: Team, walks: WalkCache, replaces: FileStamp | None
) -> Plan:
    output = request.output or default_output_path(request.checkpoint, "bn")
    if team.speaks:
        check_output(output, request.checkpoint, overwrite=request.overwrite or replaces is not None)
    refuse_overwriting_data(output, request.data)
    refuse_overwriting_data(output, request.eval_data or request.data, "labelled")
    asked = check_request(request)
    check_team(request.estimator, team)
    ranks = Ranks() if team.alone else Ranks.from_environment()
    device = choose_device(request, ranks)
    sources = sources or Sources.from_request(request)
    source = sources.data
    checkpoint = read_checkpoint(request.checkpoint, weights=request.weights, trust=request.trust)
    require_batch_norm(checkpoint)
    recognised = recognise_architecture(
        checkpoint, request.architecture, request.model_kwargs, source, request.preprocessing
    )
    loaded = recognised.loaded
    assert loaded.checkpoint is not None
    spec = resolve_input_spec(loaded.input_spec, request.preprocessing, source)
    found = walks.walk_for(loaded, spec, source)
    choice = choose(found, request.layers, rates=loaded.rates, statistics=request.statistics)
    sharing = ranks.local_world if device == "cpu" else 1
    size = request.batch_size or fitting_batch_size(found.bytes_per_sample, device, sharing)
    stream = _stream(request, source, spec, size, device, team)
    look = source.batches(spec, batch_size=_LOOK, workers=0, cached=True)
    plan = Plan(
        request, recognised, loaded.checkpoint, found, choice, source, stream, spec, size, device, output, look, team,
        replaces=replaces,
    )  # fmt: skip
    if asked is None or sources.labelled is None:
        return plan
    return replace(plan, validation=_validation(plan, asked, sources.labelled))


def _stream(
    request: Request, source: Source, spec: InputSpec | None, size: int, device: str, team: Team
) -> BatchStream:
    return source.batches(
        spec,
        batch_size=size,
        workers=request.workers,
        cached=request.estimator == "exact" or request.epochs > 1,
        device=device,
        share=Share(team.rank, team.world),
    )


def _validation(plan: Plan, asked: EvaluationSettings, labelled: Source) -> Validation:
    request = plan.request
    return open_validation(
        asked,
        labelled,
        plan.loaded_model,
        request.preprocessing,
        batch_size=plan.batch_size,
        workers=request.workers,
        device=plan.device,
        seed=request.seed,
        cached=True,
    )
