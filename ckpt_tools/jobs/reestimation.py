"""Re-estimation from file to file: checkpoint and training data in, a safetensors file out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.data.unreadable_samples import SkippedSample, refuse_unreadable
from ckpt_tools.diagnosis.data_check import DataVerdict, refuse_unlike_training_data
from ckpt_tools.evaluate.scores import Metrics, compute_gated_metrics
from ckpt_tools.evaluate.validation import ModelEvaluation
from ckpt_tools.jobs.drop_rates import describe_rates
from ckpt_tools.jobs.estimated_rates import estimate_unknown_rates
from ckpt_tools.jobs.first_samples import check_first_samples
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.jobs.recognition import recorded_input
from ckpt_tools.machine.device import move_to_device
from ckpt_tools.machine.precision import deterministic_kernels
from ckpt_tools.reestimate.method_run import run_method
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Verdict
from ckpt_tools.storage.output.checkpoint_writer import OutputDigests, replace_tensors


@dataclass(frozen=True)
class ReestimationOutcome:
    """The result of a re-estimation: the verdict on the data, the new statistics, the file that was
    written.

    The two digests tie the output to its source; they and the size are None of a dry run, which
    writes nothing.
    """

    plan: Plan
    verdict: DataVerdict
    result: Reestimation
    skipped: tuple[SkippedSample, ...]
    source_sha256: str | None
    output_sha256: str | None
    output_bytes: int | None
    metrics: Metrics | None = None


def execute_reestimation(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    evaluated: Callable[[str, int], None] | None = None,
) -> ReestimationOutcome:
    """Run the passes and write the output.

    Of a team, rank 0 looks at the data, judges and writes, and the others wait. ``evaluated`` is
    called while the labelled data is read, with "before" or "after" and the number of images so
    far. Raises any CkptToolsError, on all ranks if on one; then no output is left behind.
    """
    if not plan.request.deterministic:
        return _run_and_write(plan, progress, evaluated)
    with deterministic_kernels(torch.device(plan.device)):
        return _run_and_write(plan, progress, evaluated)


def _run_and_write(
    plan: Plan,
    progress: Callable[[Progress], None] | None,
    evaluated: Callable[[str, int], None] | None,
) -> ReestimationOutcome:
    method, team = plan.request.method, plan.team
    team.each(lambda: move_to_device(plan.loaded_model.model, plan.device))
    verdict = team.first(lambda: _judge_data(plan))
    if not method.force and plan.depends_on_data:
        refuse_unlike_training_data(verdict)
    if verdict.verdict in ("agree", "doubt"):  # on other data the fit would mean nothing
        plan = estimate_unknown_rates(plan)
    model = plan.loaded_model.model

    def evaluate(name: str) -> ModelEvaluation | None:
        if plan.validation is None:
            return None
        return plan.validation.evaluate_model(model, name, evaluated)

    # The model is changed in place, so it is judged once before and once after.
    before = team.first(lambda: evaluate("before"))
    result = run_method(
        model,
        plan.stream,
        method,
        rates=plan.loaded_model.rates,
        walk=plan.walk,
        progress=progress,
        distributed=not team.alone,
        synthetic=plan.request.data is None,
        verdict=_known_verdict(verdict),
        seed=plan.request.reading.seed,
    )
    after = team.first(lambda: evaluate("after"))
    # A gate that is not passed raises here, before anything is written.
    metrics = compute_gated_metrics(plan.validation, before, after)
    skipped = _collect_skipped(plan)
    # The model was corrected all the same, so that metrics and gate are those of a real run.
    if plan.request.dry_run:
        return ReestimationOutcome(plan, verdict, result, skipped, None, None, None, metrics)
    digests = team.first(lambda: _write_output(plan, result, metrics))
    return ReestimationOutcome(
        plan, verdict, result, skipped, digests.source, digests.output, digests.size, metrics
    )


def _collect_skipped(plan: Plan) -> tuple[SkippedSample, ...]:
    """The samples that no rank could read, of all ranks.

    Raises DataError if they are too many. A single rank cannot tell, since it sees its share alone.
    """
    by_rank = plan.team.all(lambda: plan.stream.skipped_samples)
    skipped = tuple(sample for samples in by_rank for sample in samples)
    if plan.stream.count is not None and plan.request.data is not None:
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


def _judge_data(plan: Plan) -> DataVerdict:
    """Compare the first samples of the pass with what the checkpoint remembers of its training."""
    if plan.request.data is None:
        return DataVerdict("none", "there is no data, the inputs are made up")
    if plan.request.method.statistics != "variance":
        # The stored statistics, which would judge the data, are what is replaced.
        return DataVerdict("none", "mean and variance are those of the data, whatever is stored")
    return check_first_samples(plan.loaded_model, plan.look, plan.walk, plan.source, plan.input_spec)


def _known_verdict(verdict: DataVerdict) -> Verdict | None:
    """What the check of the data has found, if it speaks against the data."""
    if verdict.verdict not in ("doubt", "refuse"):
        return None
    return Verdict(verdict.verdict, verdict.cause, images=verdict.images)


def _replacements(plan: Plan, result: Reestimation) -> dict[str, Tensor]:
    """The new buffers by key of the state dict.

    A layer that the model holds under several names has its buffers under each of them in the file.
    """
    aliases = {layer.name: layer.aliases for layer in plan.walk.batch_norms}
    modules = dict(plan.loaded_model.model.named_modules())
    buffers = ["running_var"]
    if plan.request.method.statistics == "mean+variance":
        buffers.append("running_mean")
    replacements = {}
    for layer in result.rewritten:
        for name in (layer.name, *aliases[layer.name]):
            for buffer in buffers:
                key = f"{name}.{buffer}" if name else buffer
                if key in plan.checkpoint.tensors:
                    replacements[key] = getattr(modules[layer.name], buffer).cpu()
    return replacements


def _provenance(plan: Plan, result: Reestimation) -> dict[str, object]:
    """What the output says about itself: enough to repeat it, and no wall-clock time.

    Without a time, the same run gives the same bytes.
    """
    request = plan.request
    provenance: dict[str, object] = {
        "architecture": plan.loaded_model.recipe.architecture,
        "model_kwargs": dict(plan.loaded_model.recipe.kwargs),
        "rates": describe_rates(plan.loaded_model, plan.rate_fit),
        "estimator": result.estimator,
        "estimator_reason": result.estimator_reason,
        "statistics": result.statistics,
        "layers": request.method.layers,
        "why": result.why,
        "images": result.images,
        "batch_size": plan.batch_size,
        "precision": result.precision,
        "seed": request.reading.seed,
        "torch": torch.__version__,
        "settings": request.settings_digest(),
        "rewritten": [layer.name for layer in result.rewritten],
        **recorded_input(plan.checkpoint, plan.loaded_model, request.preprocessing),
    }
    if result.outliers:
        provenance["outliers"] = [dataclasses.asdict(outlier) for outlier in result.outliers]
    return provenance
