"""The plan of a re-estimation: a checkpoint loaded and walked, its data found, all that can be
checked in advance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ckpt_tools.contract import Checkpoint, InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.preprocessing import resolve_input_spec
from ckpt_tools.data.sample_order import Reading, Share
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.data.synthetic_source import SyntheticSource
from ckpt_tools.diagnosis.rate_fit import RateFit
from ckpt_tools.distributed import ALONE, Ranks, Team
from ckpt_tools.errors import AmbiguousArchitecture, ModelError, UsageError
from ckpt_tools.evaluate.validation import (
    EvaluationSettings,
    Validation,
    open_validation,
    parse_optional_settings,
)
from ckpt_tools.identify.batch_norm_presence import require_batch_norm
from ckpt_tools.jobs.earlier_output import refuse_second_correction
from ckpt_tools.jobs.first_samples import open_first_samples
from ckpt_tools.jobs.outputs import default_output_path, refuse_overwriting_data
from ckpt_tools.jobs.recognition import Recognition, recognise_architecture
from ckpt_tools.jobs.request import Request
from ckpt_tools.jobs.walk_cache import WalkCache
from ckpt_tools.jobs.without_data import data_needed_error, require_known_rates
from ckpt_tools.location import Location
from ckpt_tools.machine.device import resolve_device
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.machine.precision import check_precision
from ckpt_tools.method import Method
from ckpt_tools.model.forward_cost import count_affordable_inputs
from ckpt_tools.model.random_inputs import DEFAULT_COUNT
from ckpt_tools.reestimate.choice import Choice, choose
from ckpt_tools.reestimate.frozen import frozen_layers
from ckpt_tools.reestimate.method_run import check_team
from ckpt_tools.reestimate.selection import SYNTHETIC_REPEATS
from ckpt_tools.results import Walk
from ckpt_tools.storage.files.stamps import FileStamp
from ckpt_tools.storage.output.checkpoint_writer import check_output
from ckpt_tools.storage.reading import read_checkpoint

_PAIRED_BATCH, _FEWEST_OF_A_BATCH, _MOST_OF_A_BATCH = 128, 16, 512


@dataclass(frozen=True)
class Plan:
    """What a re-estimation is going to do; it is shown before the first image is read.

    ``look`` reads the first samples only, to see whether this is the training data. ``replaces`` is
    a damaged output of an earlier run, in whose place the new one goes. ``rate_fit`` is what the data
    has shown of drop rates that are not recorded.
    """

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
    look: BatchStream
    team: Team = ALONE
    validation: Validation | None = None
    replaces: FileStamp | None = None
    rate_fit: RateFit | None = None

    @property
    def labelled_images(self) -> int | None:
        """How many images the model is judged on.

        None if there are none, or only a pass can tell.
        """
        return None if self.validation is None else self.validation.stream.count

    @property
    def depends_on_data(self) -> bool:
        """Whether the result is right only if the data is that of the training."""
        method = self.request.method
        if method.estimator == "auto":
            return self.loaded_model.rates == "unknown" and method.statistics == "variance"
        return method.estimator != "ratio" and method.statistics == "variance"

    @property
    def loaded_model(self) -> LoadedModel:
        """The checkpoint in the model it belongs to."""
        return self.recognised.loaded


@dataclass(frozen=True)
class Sources:
    """The data, and the labelled data if there is any: opened and counted, but not read yet."""

    data: Source
    labelled: Source | None = None

    @classmethod
    def from_request(cls, request: Request) -> Sources:
        """Open what a request names, or make inputs up. Raises UsageError, DataError, RemoteError."""
        seed, limit = request.reading.seed, request.reading.limit
        if request.data is None:
            data: Source = SyntheticSource(count=limit or DEFAULT_COUNT, seed=seed)
        else:
            data = open_source(request.data, limit=limit, seed=seed)
        if request.eval_data is None:
            return cls(data)
        # The limit is for the training data; the labelled data counts as a whole.
        return cls(data, open_source(request.eval_data, seed=seed, split="test"))


def prepare_reestimation(
    request: Request,
    sources: Sources | None = None,
    team: Team = ALONE,
    walks: WalkCache | None = None,
    replaces: FileStamp | None = None,
) -> Plan:
    """Load, walk and check everything that can be checked before data is read.

    Every rank of a team gets the same plan. ``sources``: the data, if it is open already.
    ``walks``: those of earlier checkpoints of this run. ``replaces``: a damaged output of an
    earlier run, which may be replaced. Raises any CkptToolsError, on all ranks if on one; nothing
    is written.
    """
    plan = team.each(lambda: _prepare_on_rank(request, sources, team, walks or WalkCache(), replaces))
    # Free memory may differ from rank to rank, but the shares of the data follow from one size.
    batch_size = team.first(lambda: plan.batch_size)
    if batch_size == plan.batch_size:
        return plan
    stream = _open_stream(request, plan.source, plan.input_spec, batch_size, plan.device, team)
    return replace(plan, batch_size=batch_size, stream=stream)


def parse_evaluation_request(request: Request) -> EvaluationSettings | None:
    """What is asked of the labelled data, checked without reading it; None if there is no such
    data.

    Raises UsageError, DataError for a class map or label file that cannot be read, CkptToolsError if
    torchmetrics is missing.
    """
    options = request.evaluation
    return parse_optional_settings(
        request.eval_data, options.class_map, options.calibrate, options.gate, options.labels
    )


def choose_layers(loaded: LoadedModel, walk: Walk, method: Method) -> Choice:
    """Choose which layers of a loaded model to rewrite. Raises NothingToDo, UsageError."""
    return choose(
        walk,
        method.layers,
        rates=loaded.rates,
        statistics=method.statistics,
        only=method.only,
        keep=method.keep,
        frozen=frozen_layers(loaded.model, walk),
    )


def choose_device(request: Request, ranks: Ranks = Ranks()) -> str:  # noqa: B008 - frozen
    """The device of a rank.

    Raises UsageError, or ModelError if it is not there or cannot compute in the precision of the
    method.
    """
    device = resolve_device(request.reading.device, ranks)
    check_precision(request.method.precision, torch.device(device))
    return device


def _prepare_on_rank(
    request: Request,
    sources: Sources | None,
    team: Team,
    walks: WalkCache,
    replaces: FileStamp | None,
) -> Plan:
    # The cheap checks come first: loading a model may take minutes.
    output = request.output or default_output_path(request.checkpoint, "bn")
    if team.is_main_process and not request.dry_run:
        may_replace = request.overwrite or replaces is not None
        check_output(output, request.checkpoint, overwrite=may_replace)
    for data, kind in ((request.data, "training"), (request.eval_data, "labelled")):
        if data is not None:
            refuse_overwriting_data(output, data, kind)
    evaluation = parse_evaluation_request(request)
    method = request.method
    if request.data is None:
        method.require_no_data()
    check_team(method.estimator, team)
    ranks = Ranks() if team.alone else Ranks.from_environment()
    device = choose_device(request, ranks)
    sources = sources or Sources.from_request(request)
    source = sources.data
    checkpoint = read_checkpoint(request.checkpoint, weights=request.model.weights, trust=request.model.trust)
    if not request.again:
        refuse_second_correction(checkpoint)
    require_batch_norm(checkpoint)  # before the architecture, which is of no interest without
    recognition = _recognise(checkpoint, request, source)
    loaded = recognition.loaded
    assert loaded.checkpoint is not None
    spec = resolve_input_spec(loaded.input_spec, request.preprocessing, source)
    if isinstance(source, SyntheticSource) and spec is not None and request.reading.limit is None:
        count = count_affordable_inputs(loaded.model, spec.shape, 1 + SYNTHETIC_REPEATS, source.count)
        source = replace(source, count=count)
    try:
        walk = walks.walk_for(loaded, spec, source)
    except ModelError as error:
        if request.data is not None:
            raise
        raise data_needed_error(loaded, error) from error
    choice = choose_layers(loaded, walk, method)
    if request.data is None:
        require_known_rates(loaded)
    batch_size = request.reading.batch_size
    if batch_size is None:
        # The processes of a machine share its memory, but each has a GPU of its own.
        sharing = ranks.local_world if device == "cpu" else 1
        batch_size = fitting_batch_size(walk.bytes_per_sample, device, sharing)
        if request.data is None or method.estimator == "ratio":
            # The pass may stop after any batch, and batches like those of the training are best.
            batch_size = min(batch_size, _training_batch_size(loaded.checkpoint) or _PAIRED_BATCH)
    plan = Plan(
        request=request,
        recognised=recognition,
        checkpoint=loaded.checkpoint,
        walk=walk,
        choice=choice,
        source=source,
        stream=_open_stream(request, source, spec, batch_size, device, team),
        input_spec=spec,
        batch_size=batch_size,
        device=device,
        output=output,
        look=open_first_samples(source, spec),
        team=team,
        replaces=replaces,
    )
    if evaluation is None or sources.labelled is None:
        return plan
    return replace(plan, validation=_open_validation(plan, evaluation, sources.labelled))


def _training_batch_size(checkpoint: Checkpoint) -> int | None:
    """The batch size that a checkpoint's arguments record, as those of timm and torchvision do."""
    arguments = checkpoint.words.get("args")
    size = arguments.get("batch_size") if isinstance(arguments, Mapping) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < _FEWEST_OF_A_BATCH:
        return None
    return min(size, _MOST_OF_A_BATCH)


def _recognise(checkpoint: Checkpoint, request: Request, source: Source) -> Recognition:
    if request.data is not None:
        return recognise_architecture(checkpoint, request.model, source, request.preprocessing)
    try:
        return recognise_architecture(checkpoint, request.model, None, request.preprocessing)
    except AmbiguousArchitecture as error:
        if request.model.model_kwargs:
            raise
        raise UsageError(
            f"{error} Without data the drop rates of the training are needed, too, for example "
            "--model-kwargs drop_rate=0.2. Or give the training data (--data)."
        ) from error


def _open_stream(
    request: Request,
    source: Source,
    spec: InputSpec | None,
    batch_size: int,
    device: str,
    team: Team,
) -> BatchStream:
    reading = Reading(
        batch_size,
        request.reading.workers,
        cached=request.method.reads_data_repeatedly,
        device=device,
        share=Share(team.rank, team.world),
    )
    return source.batches(spec, reading)


def _open_validation(plan: Plan, evaluation: EvaluationSettings, labelled: Source) -> Validation:
    options = plan.request.reading
    # The data is read twice: before and after.
    reading = Reading(plan.batch_size, options.workers, cached=True, device=plan.device)
    return open_validation(
        evaluation,
        labelled,
        plan.loaded_model,
        plan.request.preprocessing,
        reading,
        seed=options.seed,
    )
