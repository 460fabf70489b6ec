"""Results as JSON: plain dicts and lists, ready for ``json.dumps``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ckpt_tools.contract import Checkpoint, InputSpec, LayerResult, LoadedModel, Walk
from ckpt_tools.jobs.reestimation import Outcome
from ckpt_tools.storage.compare import Comparison
from ckpt_tools.version import VERSION


def outcome_json(outcome: Outcome) -> dict[str, object]:
    """The whole of a ``bn-reestimate``: what was in force, every layer, the controls, the output."""
    plan, result = outcome.plan, outcome.result
    return {
        "tool": {"name": "ckpt-tools", "version": VERSION},
        "libraries": libraries(),
        "checkpoint": {**checkpoint_json(plan.checkpoint), "sha256": outcome.source_sha256},
        "architecture": plan.loaded.recipe.architecture,
        "model_kwargs": plain(plan.loaded.recipe.kwargs),
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
        "controls": plain_dict(result.controls),
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
        "model_kwargs": plain(loaded.recipe.kwargs),
        "rates": loaded.rates,
        "checkpoint": None if loaded.checkpoint is None else checkpoint_json(loaded.checkpoint),
        "input": _input(loaded.input_spec),
        "batch_norms": [dataclasses.asdict(layer) for layer in walk.batch_norms],
        "dropout_sites": [dataclasses.asdict(site) for site in walk.dropout_sites],
        "left_alone": [dataclasses.asdict(item) for item in walk.left_alone],
        "containers_trained": walk.containers_trained,
    }


def comparison_json(comparison: Comparison, expect: str, violations: tuple[str, ...]) -> dict[str, object]:
    """What ``diff`` found."""
    return {**plain_dict(comparison), "expect": expect, "unexpected": list(violations), "ok": not violations}


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, object]:
    """Where a state dict stood, and what stood beside it."""
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "weights": checkpoint.weights,
        "prefix": checkpoint.prefix,
        "tensors": len(checkpoint.tensors),
        "left_out": list(checkpoint.left_out),
    }


def _layer(layer: LayerResult) -> dict[str, object]:
    found = plain_dict(layer)
    ratio, error = found.pop("ratio"), found.pop("error")
    return {
        **found,
        "ratio": ratio and {"median": ratio["median"], "min": ratio["low"], "max": ratio["high"]},
        "relative_standard_error": error and {"median": error["median"], "max": error["high"]},
    }


def _input(spec: InputSpec | None) -> dict[str, object] | None:
    return None if spec is None else plain_dict(spec)


def libraries() -> dict[str, str]:
    """Versions of what made the numbers."""
    found = {}
    for name in ("torch", "torchvision", "timm", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def plain(value: object) -> object:
    """What JSON can hold: infinities become null, and what it does not know its representation."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def plain_dict(value: Any) -> dict[str, Any]:
    """A dataclass as plain values."""
    found = plain(dataclasses.asdict(value))
    assert isinstance(found, dict)
    return found
