"""Re-estimation from file to file: one checkpoint, one source of training data, one new safetensors file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.contract import (
    Reestimation,
)
from ckpt_tools.data.stream import Skipped, refuse_unreadable
from ckpt_tools.identify.keys import has_counters
from ckpt_tools.jobs.data_check import DataVerdict, check_data, refuse
from ckpt_tools.jobs.places import placed
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.jobs.scores import Metrics, compared
from ckpt_tools.reestimate.correction import reestimate_bn
from ckpt_tools.reestimate.precision import deterministic
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.storage.write import Digests, replace_tensors


@dataclass(frozen=True)
class Outcome:
    """What happened: the look at the data, the re-estimation, the file, the digests that tie it to its source."""

    plan: Plan
    verdict: DataVerdict
    result: Reestimation
    skipped: tuple[Skipped, ...]
    source_sha256: str
    output_sha256: str
    output_bytes: int
    metrics: Metrics | None = None


def execute(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    evaluated: Callable[[str, int], None] | None = None,
) -> Outcome:
    """Run the pass and write the output; of a team, rank 0 looks at the data, judges and writes, and the others wait.

    Raises any CkptToolsError, on all ranks if on one; then no output is left behind.
    ``evaluated`` is called while the labelled data is read, with "before" or "after" and the number of images so far.
    """
    exact = deterministic(torch.device(plan.device)) if plan.request.deterministic else contextlib.nullcontext()
    with exact:
        return _executed(plan, progress, evaluated)


def _executed(
    plan: Plan,
    progress: Callable[[Progress], None] | None,
    evaluated: Callable[[str, int], None] | None,
) -> Outcome:
    request, team = plan.request, plan.team
    model = team.each(lambda: placed(plan.loaded.model, plan.device))
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
    return Outcome(plan, verdict, result, skipped, digests.source, digests.output, digests.size, metrics)


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
        replaces=plan.replaces,
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
