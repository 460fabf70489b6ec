"""The results of the jobs as plain dicts and lists, ready for ``json.dumps``.

Programs read these keys: a key may be added, but none is renamed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ckpt_tools.contract import Checkpoint
from ckpt_tools.data.data_source import count_other_files
from ckpt_tools.evaluate.scores import Metrics
from ckpt_tools.jobs.conversion import Conversion
from ckpt_tools.jobs.drop_rates import describe_rates
from ckpt_tools.jobs.evaluation import EvaluatedCheckpoint, EvaluationOutcome
from ckpt_tools.jobs.inspection import Inspection
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.jobs.reestimation import ReestimationOutcome
from ckpt_tools.redaction import without_secrets
from ckpt_tools.reestimate.concerns import is_synthetic, result_warnings
from ckpt_tools.report.records.metrics_json import metrics_json
from ckpt_tools.report.records.plain_values import TOOL, dataclass_to_dict, library_versions, to_plain_values
from ckpt_tools.report.repeat_command import repeating_command
from ckpt_tools.report.text.explanation_text import explanation_command, explanation_paragraph
from ckpt_tools.report.text.suggested_command import reestimate_command
from ckpt_tools.results import BatchNormLayer, Controls, DropoutSite, LayerResult, Measured, Walk
from ckpt_tools.storage.compare import Comparison


def outcome_json(outcome: ReestimationOutcome) -> dict[str, object]:
    """Return all about a finished ``bn-reestimate``: settings, layers, controls, output.

    Reports and the lines of a manifest are made of this dict.
    """
    plan, result = outcome.plan, outcome.result
    return {
        "tool": TOOL,
        "libraries": library_versions(),
        "checkpoint": {**checkpoint_json(plan.checkpoint), "sha256": outcome.source_sha256},
        "architecture": plan.loaded_model.recipe.architecture,
        "model_kwargs": to_plain_values(plan.loaded_model.recipe.kwargs),
        "recognised_by": plan.loaded_model.recognised_by,
        "twins": list(plan.loaded_model.twins),
        "scores": dict(plan.recognised.scores),
        "rates": describe_rates(plan.loaded_model, plan.rate_fit),
        "data": {
            "spec": without_secrets(plan.source.spec),  # a URL may hold a password
            "kind": plan.source.kind,
            "images": result.images,
            "batches": result.batches,
            "batch_size": plan.batch_size,
            "cut_to": result.cut_to,  # where memory was too short for whole batches
            "transform": plan.stream.transform,
            "input": plan.input_spec and dataclass_to_dict(plan.input_spec),
            "skipped": [dataclasses.asdict(item) for item in outcome.skipped],
            "other_files": count_other_files(plan.source),  # by extension, not read
            "agreement": dataclass_to_dict(outcome.verdict),
        },
        "estimator": result.estimator,
        "estimator_reason": result.estimator_reason,
        "verdict": result.verdict and dataclass_to_dict(result.verdict),
        "effect": result.effect and dataclass_to_dict(result.effect),
        "warnings": list(result_warnings(result)),
        "statistics": result.statistics,
        "passes": result.passes,
        "residual": result.residual,
        "stopped_early": result.stopped_early,
        "precision": result.precision,
        "deviation": result.deviation and dataclasses.asdict(result.deviation),
        "why": result.why,
        "layers": [_layer(layer, made_up=is_synthetic(result)) for layer in result.layers],
        "controls": _controls(result.controls),
        "outliers": [dataclass_to_dict(outlier) for outlier in result.outliers],
        "kept_outliers": [dataclass_to_dict(outlier) for outlier in result.kept_outliers],
        "batch_spread": result.batch_spread and dataclass_to_dict(result.batch_spread),
        "common_outliers": list(result.common),
        "left_alone": [dataclasses.asdict(item) for item in result.left_alone],
        # Operations that drew random numbers with dropout off, too
        "noise_left_on": [dataclasses.asdict(site) for site in result.noise_left_on],
        "dropout_sites": [_site(site, plan.walk) for site in plan.walk.dropout_sites],
        "metrics": outcome.metrics and metrics_json(outcome.metrics),
        "output": _output(outcome),
        "command": repeating_command(plan),
        "containers_trained": plan.walk.containers_trained,
        "device": result.device,
        "processes": result.processes,
        "seconds": round(result.seconds, 3),  # more digits would be noise
    }


def _output(outcome: ReestimationOutcome) -> dict[str, object] | None:
    """Return the file that was written; None of a dry run."""
    if outcome.output_sha256 is None:
        return None
    return {"path": str(outcome.plan.output), "sha256": outcome.output_sha256}


def refusal_json(plan: Plan, metrics: Metrics) -> dict[str, object]:
    """Return the metrics of a ``bn-reestimate`` without an output: its gate was not passed."""
    return {
        "tool": TOOL,
        "libraries": library_versions(),
        "checkpoint": checkpoint_json(plan.checkpoint),
        "architecture": plan.loaded_model.recipe.architecture,
        "model_kwargs": to_plain_values(plan.loaded_model.recipe.kwargs),
        "metrics": metrics_json(metrics),
        "output": None,
        "device": plan.device,
    }


def evaluation_json(outcome: EvaluationOutcome) -> dict[str, object]:
    """Return all about a finished ``evaluate``: the checkpoints, the metrics, the gate.

    ``before`` is null where a single checkpoint was evaluated.
    """
    plan = outcome.plan
    return {
        "tool": TOOL,
        "libraries": library_versions(),
        "checkpoint": _evaluated_checkpoint(plan.after, outcome.sha256),
        "before": plan.before and _evaluated_checkpoint(plan.before, outcome.before_sha256),
        # before, after, options, data or each; null for a single checkpoint
        "input_decided_by": plan.input_decision,
        "metrics": metrics_json(outcome.metrics),
        "device": plan.device,
        "seconds": round(outcome.seconds, 3),
    }


def _evaluated_checkpoint(evaluated: EvaluatedCheckpoint, sha256: str | None) -> dict[str, object]:
    return {
        **checkpoint_json(evaluated.checkpoint),
        "sha256": sha256,
        "architecture": evaluated.loaded.recipe.architecture,
        "model_kwargs": to_plain_values(evaluated.loaded.recipe.kwargs),
        "transform": evaluated.validation.stream.transform,
    }


def inspection_json(inspection: Inspection) -> dict[str, object]:
    """Return all that ``inspect_checkpoint`` learned.

    What it could not learn is null or empty, and ``error`` says why.
    """
    loaded, walk = inspection.loaded, inspection.walk
    return {
        "architecture": loaded and loaded.recipe.architecture,
        "model_kwargs": loaded and to_plain_values(loaded.recipe.kwargs),
        "recognised_by": loaded and loaded.recognised_by,
        "twins": list(loaded.twins) if loaded else [],
        "candidates": list(inspection.candidates),
        "error": inspection.error and str(inspection.error),
        "rates": loaded and loaded.rates,
        "checkpoint": inspection.checkpoint
        and _inspected_checkpoint_json(inspection.checkpoint, inspection.size),
        # What bn-reestimate did, if the file is one of its outputs
        "correction": inspection.correction and dataclass_to_dict(inspection.correction),
        "parameters": inspection.parameters,
        "tensors": sum(tally.tensors for tally in inspection.types.values()),
        "dtypes": {name: dataclasses.asdict(tally) for name, tally in inspection.types.items()},
        "input": inspection.input_spec and dataclass_to_dict(inspection.input_spec),
        "batch_norms": [_batch_norm(layer, inspection.steps) for layer in walk.batch_norms] if walk else [],
        "dropout_sites": [dataclasses.asdict(site) for site in walk.dropout_sites] if walk else [],
        "left_alone": [dataclasses.asdict(item) for item in walk.left_alone] if walk else [],
        "containers_trained": walk and walk.containers_trained,
        "plan": _plan(inspection),
        "explanation": _explanation(inspection),
    }


def _explanation(inspection: Inspection) -> dict[str, object] | None:
    """Return what makes the stored statistics differ from those of the data; None without data."""
    explanation = inspection.explanation
    if explanation is None:
        return None
    return {
        "cause": explanation.cause,
        "dropout_shifts": explanation.dropout_shifts,
        "dropout_on": explanation.dropout_on,
        "rates_known": explanation.rates_known,
        "skipped": [dataclasses.asdict(item) for item in explanation.skipped],
        "other_files": dict(explanation.other_files),
        "rate_fit": inspection.rate_fit and dataclass_to_dict(inspection.rate_fit),
        "verdict": dataclass_to_dict(explanation.verdict),
        "preprocessing": explanation.preprocessing,
        "images": explanation.images,
        "noise_left_on": [dataclasses.asdict(site) for site in explanation.noise_left_on],
        "layers": [
            {
                "name": layer.name,
                "mismatch": _measured(layer.mismatch),
                "dropout_shift": _measured(layer.dropout_shift),
            }
            for layer in explanation.layers
        ],
        "text": explanation_paragraph(explanation, inspection),
        "command": explanation_command(explanation, inspection),
    }


def _inspected_checkpoint_json(checkpoint: Checkpoint, size: int | None) -> dict[str, object]:
    return {**checkpoint_json(checkpoint), "bytes": size, "words": to_plain_values(checkpoint.words)}


def _batch_norm(layer: BatchNormLayer, steps: Mapping[str, int | None]) -> dict[str, object]:
    """``batches`` is how many the layer counted in training, null where the file has no counter."""
    return {**dataclasses.asdict(layer), "batches": steps.get(layer.name)}


def _plan(inspection: Inspection) -> dict[str, object] | None:
    prospect = inspection.prospect
    if prospect is None:
        return None
    return {
        "nothing_to_do": not prospect.rewrite,
        "why": prospect.why,
        "rewrite": list(prospect.rewrite),
        "controls": list(prospect.controls),
        # The same command as in the text, so that a program can run it.
        "command": reestimate_command(inspection) if prospect.rewrite else None,
    }


def conversion_json(conversion: Conversion) -> dict[str, object]:
    """Return the checkpoint that was converted, its tensors that shared memory, and the output."""
    return {
        "tool": TOOL,
        "checkpoint": {**checkpoint_json(conversion.checkpoint), "sha256": conversion.source_sha256},
        "shared": [list(group) for group in conversion.shared],
        "output": {"path": str(conversion.output), "sha256": conversion.output_sha256},
    }


def comparison_json(comparison: Comparison, expect: str, violations: tuple[str, ...]) -> dict[str, object]:
    """Return the differences between two checkpoints, and those that were not expected."""
    return {
        **dataclass_to_dict(comparison),
        "expect": expect,
        "unexpected": list(violations),
        "ok": not violations,
    }


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, object]:
    """Return where in a file the state dict stood, and which entries beside it were left out.

    ``weights`` is the entry that was taken, ``prefix`` the prefix that was removed from every key.
    """
    return {
        "path": checkpoint.shown_path,
        "format": checkpoint.format,
        "weights": checkpoint.weights,
        "prefix": checkpoint.prefix,
        "tensors": len(checkpoint.tensors),
        "left_out": list(checkpoint.left_out),
    }


def _layer(layer: LayerResult, *, made_up: bool) -> dict[str, object]:
    """Return what was measured of a layer; on inputs that were made up a mismatch means nothing."""
    fields = dataclass_to_dict(layer)
    ratio, error = fields.pop("ratio"), fields.pop("error")
    return {
        **fields,
        "mismatch": None if made_up else _measured(layer.mismatch),
        "dropout_shift": _measured(layer.dropout_shift),
        "ratio": ratio and {"median": ratio["median"], "min": ratio["low"], "max": ratio["high"]},
        "relative_standard_error": error and {"median": error["median"], "max": error["high"]},
    }


def _measured(value: Measured | None) -> dict[str, object] | None:
    """Return a measured quantity under the names that ``ratio`` has, with its standard error."""
    if value is None:
        return None
    fields = dataclass_to_dict(value)
    return {
        "median": fields["median"],
        "min": fields["low"],
        "max": fields["high"],
        "standard_error": fields["error"],
    }


def _controls(controls: Controls) -> dict[str, object]:
    return {**dataclass_to_dict(controls), "worst_ratio": _measured(controls.worst_ratio)}


def _site(site: DropoutSite, walk: Walk) -> dict[str, object]:
    """Return a dropout site with its ``depth``.

    That is the number of BN layers that run before the first one that the site reaches, null if it
    reaches none.
    """
    reached = (
        depth
        for depth, layer in enumerate(walk.batch_norms)
        if site.name in (*layer.downstream_of, *layer.potentially_downstream_of)
    )
    return {**dataclasses.asdict(site), "active": site.active, "depth": next(reached, None)}
