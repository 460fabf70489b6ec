"""Results as JSON: plain dicts and lists, ready for ``json.dumps``."""

from __future__ import annotations

import dataclasses
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ckpt_tools.contract import Checkpoint, InputSpec, LayerResult, LoadedModel, Walk
from ckpt_tools.job import Outcome
from ckpt_tools.storage.compare import Comparison
from ckpt_tools.version import VERSION


def outcome_json(outcome: Outcome) -> dict[str, object]:
    """The whole of a ``bn-reestimate``: what was in force, every layer, the controls, the output."""
    plan, result = outcome.plan, outcome.result
    return {
        "tool": {"name": "ckpt-tools", "version": VERSION},
        "libraries": _libraries(),
        "checkpoint": {**_checkpoint(plan.checkpoint), "sha256": outcome.source_sha256},
        "architecture": plan.loaded.recipe.architecture,
        "model_kwargs": {name: _plain(value) for name, value in plan.loaded.recipe.kwargs.items()},
        "rates": plan.loaded.rates,
        "data": {
            "spec": plan.request.data,
            "kind": plan.source.kind,
            "images": result.images,
            "batches": result.batches,
            "batch_size": plan.batch_size,
            "transform": plan.stream.transform,
            "input": _input(plan.input_spec),
            "skipped": [dataclasses.asdict(item) for item in outcome.skipped],
        },
        "estimator": result.estimator,
        "statistics": result.statistics,
        "passes": result.passes,
        "residual": result.residual,
        "stopped_early": result.stopped_early,
        "why": result.why,
        "layers": [_layer(layer) for layer in result.layers],
        "controls": _finite(dataclasses.asdict(result.controls)),
        "left_alone": [dataclasses.asdict(item) for item in result.left_alone],
        "output": {"path": str(plan.output), "sha256": outcome.output_sha256},
        "containers_trained": plan.walk.containers_trained,
        "device": result.device,
        "seconds": round(result.seconds, 3),
    }


def inspection_json(loaded: LoadedModel, walk: Walk) -> dict[str, object]:
    """What ``inspect`` found in a checkpoint or an architecture."""
    return {
        "architecture": loaded.recipe.architecture,
        "model_kwargs": {name: _plain(value) for name, value in loaded.recipe.kwargs.items()},
        "rates": loaded.rates,
        "checkpoint": None if loaded.checkpoint is None else _checkpoint(loaded.checkpoint),
        "input": _input(loaded.input_spec),
        "batch_norms": [dataclasses.asdict(layer) for layer in walk.batch_norms],
        "dropout_sites": [dataclasses.asdict(site) for site in walk.dropout_sites],
        "left_alone": [dataclasses.asdict(item) for item in walk.left_alone],
        "containers_trained": walk.containers_trained,
    }


def comparison_json(comparison: Comparison, expect: str, violations: tuple[str, ...]) -> dict[str, object]:
    """What ``diff`` found."""
    found = _finite(dataclasses.asdict(comparison))
    assert isinstance(found, dict)
    return {**found, "expect": expect, "unexpected": list(violations), "ok": not violations}


def _checkpoint(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "weights": checkpoint.weights,
        "prefix": checkpoint.prefix,
        "tensors": len(checkpoint.tensors),
        "left_out": list(checkpoint.left_out),
    }


def _layer(layer: LayerResult) -> dict[str, object]:
    found = _finite(dataclasses.asdict(layer))
    assert isinstance(found, dict)
    error = found.pop("error")
    return {**found, "relative_standard_error": error and {"median": error["median"], "max": error["high"]}} | {
        "ratio": found["ratio"] and {"median": layer.ratio.median, "min": layer.ratio.low, "max": layer.ratio.high}  # type: ignore[union-attr]
    }


def _input(spec: InputSpec | None) -> dict[str, object] | None:
    return None if spec is None else dataclasses.asdict(spec)


def _libraries() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchvision", "timm", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else repr(value)


def _finite(value: object) -> object:
    """JSON knows no infinity: it becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
