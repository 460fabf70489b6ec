"""Re-estimation from file to file: one checkpoint, one source of training data, one new safetensors file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.contract import (
    Checkpoint,
    Estimator,
    InputSpec,
    LayerChoice,
    LoadedModel,
    Precision,
    Reestimation,
    Statistics,
    Walk,
)
from ckpt_tools.data.order import Share
from ckpt_tools.data.source import Source, open_source
from ckpt_tools.data.stream import BatchStream, Skipped, refuse_unreadable
from ckpt_tools.distributed import ALONE, Ranks, Team
from ckpt_tools.identify.keys import has_counters
from ckpt_tools.identify.normless import require_batch_norm
from ckpt_tools.jobs.data_check import DataVerdict, check_data, refuse
from ckpt_tools.jobs.inputs import Preprocessing, input_spec_for
from ckpt_tools.jobs.places import default_output, refuse_data, usable_device
from ckpt_tools.jobs.recognition import Recognised, recognise
from ckpt_tools.jobs.scores import Metrics, compared
from ckpt_tools.jobs.validation import Question, Validation, open_validation, optional_question
from ckpt_tools.jobs.walks import Walks
from ckpt_tools.redaction import without_secrets
from ckpt_tools.reestimate.capacity import fitting_batch_size
from ckpt_tools.reestimate.choice import Choice, choose
from ckpt_tools.reestimate.precision import check_precision
from ckpt_tools.reestimate.run import check_method, check_team, reestimate_bn
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.remote.mirror import as_urls
from ckpt_tools.storage.read import read_checkpoint
from ckpt_tools.storage.write import Digests, check_output, replace_tensors

_LOOK = 64  # samples in a batch of the first look


@dataclass(frozen=True)
class Request:
    """Everything the user asks for. ``batch_size`` None: as large as memory allows, up to 512."""

    checkpoint: Path
    data: str
    output: Path | None = None
    architecture: str | None = None
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    weights: str = "auto"
    trust: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    estimator: Estimator = "pooled"
    layers: LayerChoice = "auto"
    statistics: Statistics = "variance"
    tolerance: float | None = None
    momentum: float = 0.1
    epochs: int = 1
    limit: int | None = None
    seed: int = 0
    precision: Precision = "fp32"
    compile: bool = False
    keep_outliers: bool = False
    device: str = "auto"  # CUDA if there is one, else the CPU
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False
    force: bool = False
    eval_data: str | None = None  # labelled, to judge the model on before and after
    class_map: Path | None = None
    calibrate: bool = False
    gate: str | None = None

    def settings(self) -> str:
        """A digest of all that decides what comes out, but for the checkpoint: equal for equal results."""
        said = {name: value for name, value in vars(self).items() if name not in _BESIDE}
        said["data"] = str(Path(self.data).absolute()) if Path(self.data).exists() else without_secrets(self.data)
        text = as_urls(json.dumps(said, sort_keys=True, default=repr))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# What a result does not depend on; how a convolution is computed may change its last bits.
_BESIDE = frozenset({"checkpoint", "output", "trust", "device", "compile", "workers", "overwrite", "force"})


@dataclass(frozen=True)
class Plan:
    """What is about to happen: shown before the first image is read."""

    request: Request
    recognised: Recognised
    checkpoint: Checkpoint
    walk: Walk
    choice: Choice
    source: Source
    stream: BatchStream
    input_spec: InputSpec | None
    batch_size: int
    device: str
    output: Path
    look: BatchStream  # the first samples, to see whether this is the training data
    team: Team = ALONE
    validation: Validation | None = None

    @property
    def labelled_images(self) -> int | None:
        """Images to judge the model on; None if there are none, or only a pass can tell."""
        return None if self.validation is None else self.validation.stream.count

    @property
    def loaded(self) -> LoadedModel:
        """The checkpoint in the model it belongs to."""
        return self.recognised.loaded


@dataclass(frozen=True)
class Outcome:
    """What happened: the look at the data, the re-estimation, the file, the digests that tie it to its source."""

    plan: Plan
    verdict: DataVerdict
    result: Reestimation
    skipped: tuple[Skipped, ...]
    source_sha256: str
    output_sha256: str
    metrics: Metrics | None = None


def prepare(request: Request, source: Source | None = None, team: Team = ALONE, walks: Walks | None = None) -> Plan:
    """Load, walk and check everything that can be checked before data is read; on every rank of a team the same.

    ``source``: the data, if it is open already. ``walks``: those of earlier checkpoints of this run. Raises any
    CkptToolsError, on all ranks if on one; nothing is written.
    """
    plan = team.each(lambda: _prepared(request, source, team, walks or Walks()))
    size = team.first(lambda: plan.batch_size)
    if size == plan.batch_size:
        return plan
    return replace(
        plan, batch_size=size, stream=_stream(request, plan.source, plan.input_spec, size, plan.device, team)
    )


def _prepared(request: Request, source: Source | None, team: Team, walks: Walks) -> Plan:
    output = request.output or default_output(request.checkpoint, "bn")
    if team.speaks:
        check_output(output, request.checkpoint, overwrite=request.overwrite)
    refuse_data(output, request.data)
    refuse_data(output, request.eval_data or request.data, "labelled")
    check_method(
        request.estimator, request.layers, request.statistics, request.tolerance, request.momentum, request.epochs
    )
    check_team(request.estimator, team)
    ranks = Ranks() if team.alone else Ranks.from_environment()
    device = usable_device(request.device, ranks)
    check_precision(request.precision, torch.device(device))
    asked = optional_question(request.eval_data, request.class_map, request.calibrate, request.gate)
    source = source or open_source(request.data, limit=request.limit, seed=request.seed)
    checkpoint = read_checkpoint(request.checkpoint, weights=request.weights, trust=request.trust)
    require_batch_norm(checkpoint)
    recognised = recognise(checkpoint, request.architecture, request.model_kwargs, source, request.preprocessing)
    loaded = recognised.loaded
    assert loaded.checkpoint is not None
    spec = input_spec_for(loaded.input_spec, request.preprocessing, source)
    found = walks.of(loaded, spec, source)
    choice = choose(found, request.layers, rates=loaded.rates, statistics=request.statistics)
    sharing = ranks.local_world if device == "cpu" else 1
    size = request.batch_size or fitting_batch_size(found.bytes_per_sample, device, sharing)
    stream = _stream(request, source, spec, size, device, team)
    look = source.batches(spec, batch_size=_LOOK, workers=0, cached=True)
    plan = Plan(
        request, recognised, loaded.checkpoint, found, choice, source, stream, spec, size, device, output, look, team
    )
    return plan if asked is None else replace(plan, validation=_validation(plan, asked))


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


def _validation(plan: Plan, asked: Question) -> Validation:
    request = plan.request
    return open_validation(
        asked,
        open_source(asked.data, seed=request.seed, split="test"),
        plan.loaded,
        request.preprocessing,
        batch_size=plan.batch_size,
        workers=request.workers,
        device=plan.device,
        seed=request.seed,
        cached=True,
    )


def execute(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    evaluated: Callable[[str, int], None] | None = None,
) -> Outcome:
    """Run the pass and write the output; of a team, rank 0 looks at the data, judges and writes, and the others wait.

    Raises any CkptToolsError, on all ranks if on one; then no output is left behind.
    ``evaluated`` is called while the labelled data is read, with "before" or "after" and the number of images so far.
    """
    request, team = plan.request, plan.team
    model = team.each(lambda: plan.loaded.model.to(plan.device).to(memory_format=torch.channels_last))
    verdict = team.first(lambda: _looked_at(plan))
    if not request.force:
        refuse(verdict)
    validation = plan.validation
    before = None if validation is None else team.first(lambda: validation.judge(model, "before", evaluated))
    result = reestimate_bn(
        model,
        plan.stream,
        estimator=request.estimator,
        layers=request.layers,
        statistics=request.statistics,
        tolerance=request.tolerance,
        precision=request.precision,
        compile=request.compile,
        momentum=request.momentum,
        epochs=request.epochs,
        rates=plan.loaded.rates,
        walk=plan.walk,
        force=request.force,
        progress=progress,
        distributed=not team.alone,
        keep_outliers=request.keep_outliers,
    )
    after = None if validation is None else team.first(lambda: validation.judge(model, "after", evaluated))
    metrics = compared(validation, before, after)
    skipped = _skipped(plan)
    digests = team.first(lambda: _written(plan, result, metrics))
    return Outcome(plan, verdict, result, skipped, digests.source, digests.output, metrics)


def _skipped(plan: Plan) -> tuple[Skipped, ...]:
    """What no rank could read. Raises DataError if it is too much of the data, which a share cannot tell."""
    lists = plan.team.all(lambda: plan.stream.skipped)
    skipped = tuple(item for one in lists for item in one)
    if plan.stream.count is not None:
        refuse_unreadable(plan.request.data, skipped, plan.stream.count)
    return skipped


def _written(plan: Plan, result: Reestimation, metrics: Metrics | None) -> Digests:
    return replace_tensors(
        plan.output,
        plan.checkpoint,
        _replacements(plan, result),
        provenance=_provenance(plan, result) | (metrics.provenance if metrics else {}),
        overwrite=plan.request.overwrite,
    )


def _looked_at(plan: Plan) -> DataVerdict:
    """The first samples, in the order of the pass, against what the checkpoint remembers of its training."""
    known = plan.loaded.input_spec
    return check_data(
        plan.loaded.model,
        plan.look,
        plan.walk,
        plan.input_spec,
        preprocessed=plan.source.preprocessed,
        rates_known=plan.loaded.rates != "unknown",
        counted=has_counters(plan.checkpoint),
        usual_size=known.shape if known else None,
    )


def _replacements(plan: Plan, result: Reestimation) -> dict[str, Tensor]:
    """New buffers by key of the state dict, under every name that a layer has."""
    aliases = {layer.name: layer.aliases for layer in plan.walk.batch_norms}
    modules = dict(plan.loaded.model.named_modules())
    buffers = ("running_var", "running_mean")[: 1 if plan.request.statistics == "variance" else 2]
    replacements = {}
    for layer in result.rewritten:
        for name in (layer.name, *aliases[layer.name]):
            for buffer in buffers:
                key = f"{name}.{buffer}" if name else buffer
                if key in plan.checkpoint.tensors:
                    replacements[key] = getattr(modules[layer.name], buffer).cpu()
    return replacements


def _provenance(plan: Plan, result: Reestimation) -> dict[str, object]:
    """What the output says about itself: enough to repeat it, and no wall-clock time."""
    request = plan.request
    return {
        "architecture": plan.loaded.recipe.architecture,
        "model_kwargs": dict(plan.loaded.recipe.kwargs),
        "estimator": result.estimator,
        "statistics": result.statistics,
        "layers": request.layers,
        "why": result.why,
        "images": result.images,
        "batch_size": plan.batch_size,
        "precision": result.precision,
        "seed": request.seed,
        "torch": torch.__version__,
        "settings": request.settings(),
        "rewritten": [layer.name for layer in result.rewritten],
        **({"outliers": [dataclasses.asdict(one) for one in result.outliers]} if result.outliers else {}),
    }
