"""Results as JSON: plain dicts and lists, ready for ``json.dumps``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ckpt_tools.contract import Checkpoint, InputSpec
from ckpt_tools.evaluate.scores import Metrics
from ckpt_tools.jobs.conversion import Conversion
from ckpt_tools.jobs.evaluation import EvaluatedCheckpoint, EvaluationOutcome
from ckpt_tools.jobs.inspection import Inspection
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.jobs.reestimation import ReestimationOutcome
from ckpt_tools.plain_text import LONGEST_VALUE, shorten
from ckpt_tools.redaction import without_secrets
from ckpt_tools.report.records.metrics_json import metrics_json
from ckpt_tools.report.repeat_command import repeating_command
from ckpt_tools.report.text.inspection_text import reestimate_command
from ckpt_tools.results import BatchNormLayer, DropoutSite, LayerResult, Walk
from ckpt_tools.storage.compare import Comparison
from ckpt_tools.version import VERSION


def outcome_json(outcome: ReestimationOutcome) -> dict[str, object]:
    """The whole of a ``bn-reestimate``: what was in force, every layer, the controls, the output."""
    plan, result = outcome.plan, outcome.result
    return {
        "tool": {"name": "ckpt-tools", "version": VERSION},
        "libraries": library_versions(),
        "checkpoint": {**checkpoint_json(plan.checkpoint), "sha256": outcome.source_sha256},
        "architecture": plan.loaded_model.recipe.architecture,
        "model_kwargs": to_plain_values(plan.loaded_model.recipe.kwargs),
        "recognised_by": plan.loaded_model.recognised_by,
        "twins": list(plan.loaded_model.twins),
        "scores": dict(plan.recognised.scores),
        "rates": plan.loaded_model.rates,
        "data": {
            "spec": without_secrets(plan.request.data),
            "kind": plan.source.kind,
            "images": result.images,
            "batches": result.batches,
            "batch_size": plan.batch_size,
            "cut_to": result.cut_to,
            "transform": plan.stream.transform,
            "input": _input(plan.input_spec),
            "skipped": [dataclasses.asdict(item) for item in outcome.skipped],
            "agreement": dataclass_to_dict(outcome.verdict),
        },
        "estimator": result.estimator,
        "statistics": result.statistics,
        "passes": result.passes,
        "residual": result.residual,
        "stopped_early": result.stopped_early,
        "precision": result.precision,
        "deviation": result.deviation and dataclasses.asdict(result.deviation),
        "why": result.why,
        "layers": [_layer(layer) for layer in result.layers],
        "controls": dataclass_to_dict(result.controls),
        "outliers": [dataclass_to_dict(one) for one in result.outliers],
        "common_outliers": list(result.common),
        "left_alone": [dataclasses.asdict(item) for item in result.left_alone],
        "dropout_sites": [_site(site, plan.walk) for site in plan.walk.dropout_sites],
        "metrics": outcome.metrics and metrics_json(outcome.metrics),
        "output": {"path": str(plan.output), "sha256": outcome.output_sha256},
        "command": repeating_command(plan),
        "containers_trained": plan.walk.containers_trained,
        "device": result.device,
        "processes": result.processes,
        "seconds": round(result.seconds, 3),
    }


def refusal_json(plan: Plan, metrics: Metrics) -> dict[str, object]:
    """What is left of a ``bn-reestimate`` whose gate said no: the metrics, and no output."""
    return {
        "tool": {"name": "ckpt-tools", "version": VERSION},
        "libraries": library_versions(),
        "checkpoint": checkpoint_json(plan.checkpoint),
        "architecture": plan.loaded_model.recipe.architecture,
        "model_kwargs": to_plain_values(plan.loaded_model.recipe.kwargs),
        "metrics": metrics_json(metrics),
        "output": None,
        "device": plan.device,
    }


def evaluation_json(outcome: EvaluationOutcome) -> dict[str, object]:
    """The whole of an ``evaluate``: the checkpoints, the metrics, the gate."""
    plan = outcome.plan
    return {
        "tool": {"name": "ckpt-tools", "version": VERSION},
        "libraries": library_versions(),
        "checkpoint": _contestant(plan.after, outcome.sha256),
        "before": plan.before and _contestant(plan.before, outcome.before_sha256),
        "metrics": metrics_json(outcome.metrics),
        "device": plan.device,
        "seconds": round(outcome.seconds, 3),
    }


def _contestant(contestant: EvaluatedCheckpoint, sha256: str | None) -> dict[str, object]:
    return {
        **checkpoint_json(contestant.checkpoint),
        "sha256": sha256,
        "architecture": contestant.loaded.recipe.architecture,
        "model_kwargs": to_plain_values(contestant.loaded.recipe.kwargs),
        "transform": contestant.validation.stream.transform,
    }


def inspection_json(found: Inspection) -> dict[str, object]:
    """All that ``inspect_checkpoint`` found; what it could not find out is null, with the error that says why."""
    loaded, walk = found.loaded, found.walk
    return {
        "architecture": loaded and loaded.recipe.architecture,
        "model_kwargs": loaded and to_plain_values(loaded.recipe.kwargs),
        "recognised_by": loaded and loaded.recognised_by,
        "twins": list(loaded.twins) if loaded else [],
        "candidates": list(found.candidates),
        "error": found.error and str(found.error),
        "rates": loaded and loaded.rates,
        "checkpoint": found.checkpoint and _inspected_checkpoint_json(found.checkpoint, found.size),
        "parameters": found.parameters,
        "tensors": sum(tally.tensors for tally in found.types.values()),
        "dtypes": {name: dataclasses.asdict(tally) for name, tally in found.types.items()},
        "input": _input(found.input_spec),
        "batch_norms": [_batch_norm(layer, found.steps) for layer in walk.batch_norms] if walk else [],
        "dropout_sites": [dataclasses.asdict(site) for site in walk.dropout_sites] if walk else [],
        "left_alone": [dataclasses.asdict(item) for item in walk.left_alone] if walk else [],
        "containers_trained": walk and walk.containers_trained,
        "plan": _plan(found),
    }


def _inspected_checkpoint_json(checkpoint: Checkpoint, size: int | None) -> dict[str, object]:
    return {**checkpoint_json(checkpoint), "bytes": size, "words": to_plain_values(checkpoint.words)}


def _batch_norm(layer: BatchNormLayer, steps: Mapping[str, int | None]) -> dict[str, object]:
    """``batches``: how many the layer has counted in training, null where nobody knows."""
    return {**dataclasses.asdict(layer), "batches": steps.get(layer.name)}


def _plan(found: Inspection) -> dict[str, object] | None:
    prospect = found.prospect
    if prospect is None:
        return None
    return {
        "nothing_to_do": not prospect.rewrite,
        "why": prospect.why,
        "rewrite": list(prospect.rewrite),
        "controls": list(prospect.controls),
        "command": reestimate_command(found) if prospect.rewrite else None,
    }


def conversion_json(conversion: Conversion) -> dict[str, object]:
    """What ``convert_checkpoint`` read and wrote."""
    return {
        "tool": {"name": "ckpt-tools", "version": VERSION},
        "checkpoint": {**checkpoint_json(conversion.checkpoint), "sha256": conversion.source_sha256},
        "shared": [list(group) for group in conversion.shared],
        "output": {"path": str(conversion.output), "sha256": conversion.output_sha256},
    }


def comparison_json(comparison: Comparison, expect: str, violations: tuple[str, ...]) -> dict[str, object]:
    """What ``diff`` found."""
    return {**dataclass_to_dict(comparison), "expect": expect, "unexpected": list(violations), "ok": not violations}


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, object]:
    """Where a state dict stood, and what stood beside it."""
    return {
        "path": checkpoint.shown_path,
        "format": checkpoint.format,
        "weights": checkpoint.weights,
        "prefix": checkpoint.prefix,
        "tensors": len(checkpoint.tensors),
        "left_out": list(checkpoint.left_out),
    }


def _layer(layer: LayerResult) -> dict[str, object]:
    found = dataclass_to_dict(layer)
    ratio, error = found.pop("ratio"), found.pop("error")
    return {
        **found,
        "ratio": ratio and {"median": ratio["median"], "min": ratio["low"], "max": ratio["high"]},
        "relative_standard_error": error and {"median": error["median"], "max": error["high"]},
    }


def _site(site: DropoutSite, walk: Walk) -> dict[str, object]:
    """``depth``: how many BN layers run before the first one that the site reaches, null if it reaches none."""
    behind = (site.name in (*layer.downstream_of, *layer.potentially_downstream_of) for layer in walk.batch_norms)
    depth = next((index for index, reached in enumerate(behind) if reached), None)
    return {**dataclasses.asdict(site), "active": site.active, "depth": depth}


def _input(spec: InputSpec | None) -> dict[str, object] | None:
    return None if spec is None else dataclass_to_dict(spec)


def library_versions() -> dict[str, str]:
    """Versions of what made the numbers."""
    found = {}
    for name in ("torch", "torchvision", "timm", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def to_plain_values(value: object) -> object:
    """What JSON can hold: infinities become null, and what it does not know its representation; no endless texts."""
    if isinstance(value, Mapping):
        return {str(key): to_plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_values(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, bool, type(None))) else shorten(str(value), LONGEST_VALUE)


def dataclass_to_dict(value: Any) -> dict[str, Any]:
    """A dataclass as plain values."""
    found = to_plain_values(dataclasses.asdict(value))
    assert isinstance(found, dict)
    return found
