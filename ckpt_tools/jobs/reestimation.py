"""Re-estimation from file to file: one checkpoint, one source of training data, one new safetensors file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.data.unreadable_samples import SkippedSample, refuse_unreadable
from ckpt_tools.diagnosis.data_check import DataVerdict, check_data, refuse_unlike_training_data
from ckpt_tools.evaluate.scores import Metrics, compute_gated_metrics
from ckpt_tools.identify.key_matching import has_counters
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.machine.device import move_to_device
from ckpt_tools.machine.precision import deterministic_kernels
from ckpt_tools.reestimate.correction import reestimate_bn
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation
from ckpt_tools.storage.output.checkpoint_writer import OutputDigests, replace_tensors


@dataclass(frozen=True)
class ReestimationOutcome:
    """What happened: the look at the data, the re-estimation, the file, the digests that tie it to its source."""

    plan: Plan
    verdict: DataVerdict
    result: Reestimation
    skipped: tuple[SkippedSample, ...]
    source_sha256: str
    output_sha256: str
    output_bytes: int
    metrics: Metrics | None = None


def execute_reestimation(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    evaluated: Callable[[str, int], None] | None = None,
) -> ReestimationOutcome:
    """Run the pass and write the output; of a team, rank 0 looks at the data, judges and writes, and the others wait.

    Raises any CkptToolsError, on all ranks if on one; then no output is left behind.
    ``evaluated`` is called while the labelled data is read, with "before" or "after" and the number of images so far.
    """
    exact = deterministic_kernels(torch.device(plan.device)) if plan.request.deterministic else contextlib.nullcontext()
    with exact:
        return _run_and_write(plan, progress, evaluated)


def _run_and_write(
    plan: Plan,
    progress: Callable[[Progress], None] | None,
    evaluated: Callable[[str, int], None] | None,
) -> ReestimationOutcome:
    request, team = plan.request, plan.team
    model = team.each(lambda: move_to_device(plan.loaded_model.model, plan.device))
    verdict = team.first(lambda: _check_first_samples(plan))
    if not request.force:
        refuse_unlike_training_data(verdict)
    validation = plan.validation
    before = None if validation is None else team.first(lambda: validation.evaluate_model(model, "before", evaluated))
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
        rates=plan.loaded_model.rates,
        walk=plan.walk,
        force=request.force,
        progress=progress,
        distributed=not team.alone,
        keep_outliers=request.keep_outliers,
    )
    after = None if validation is None else team.first(lambda: validation.evaluate_model(model, "after", evaluated))
    metrics = compute_gated_metrics(validation, before, after)
    skipped = _collect_skipped(plan)
    digests = team.first(lambda: _write_output(plan, result, metrics))
    return ReestimationOutcome(plan, verdict, result, skipped, digests.source, digests.output, digests.size, metrics)


def _collect_skipped(plan: Plan) -> tuple[SkippedSample, ...]:
    """What no rank could read. Raises DataError if it is too much of the data, which a share cannot tell."""
    lists = plan.team.all(lambda: plan.stream.skipped_samples)
    skipped = tuple(item for one in lists for item in one)
    if plan.stream.count is not None:
        refuse_unreadable(plan.request.data, skipped, plan.stream.count)
    return skipped


def _write_output(plan: Plan, result: Reestimation, metrics: Metrics | None) -> OutputDigests:
    return replace_tensors(
        plan.output,
        plan.checkpoint,
        _replacements(plan, result),
        provenance=_provenance(plan, result) | (metrics.provenance if metrics else {}),
        overwrite=plan.request.overwrite,
        replaces=plan.replaces,
    )


def _check_first_samples(plan: Plan) -> DataVerdict:
    """The first samples, in the order of the pass, against what the checkpoint remembers of its training."""
    known = plan.loaded_model.input_spec
    return check_data(
        plan.loaded_model.model,
        plan.look,
        plan.walk,
        plan.input_spec,
        preprocessed=plan.source.is_preprocessed,
        rates_known=plan.loaded_model.rates != "unknown",
        counted=has_counters(plan.checkpoint),
        usual_size=known.shape if known else None,
    )


def _replacements(plan: Plan, result: Reestimation) -> dict[str, Tensor]:
    """New buffers by key of the state dict, under every name that a layer has."""
    aliases = {layer.name: layer.aliases for layer in plan.walk.batch_norms}
    modules = dict(plan.loaded_model.model.named_modules())
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
        "architecture": plan.loaded_model.recipe.architecture,
        "model_kwargs": dict(plan.loaded_model.recipe.kwargs),
        "estimator": result.estimator,
        "statistics": result.statistics,
        "layers": request.layers,
        "why": result.why,
        "images": result.images,
        "batch_size": plan.batch_size,
        "precision": result.precision,
        "seed": request.seed,
        "torch": torch.__version__,
        "settings": request.settings_digest(),
        "rewritten": [layer.name for layer in result.rewritten],
        **({"outliers": [dataclasses.asdict(one) for one in result.outliers]} if result.outliers else {}),
    }
