"""An initialisation as JSON: the settings, every weight, and the signals."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tools.initialize.init_results import LayerSignal
from ckpt_tools.jobs.initialization import InitOutcome
from ckpt_tools.jobs.verification import HEALTHY_VARIANCES, VerificationBatches, count_healthy_layers
from ckpt_tools.report.records.plain_values import TOOL, dataclass_to_dict, library_versions, to_plain_values
from ckpt_tools.report.records.reestimation_json import checkpoint_json


def init_json(outcome: InitOutcome) -> dict[str, object]:
    """Return all about a finished ``init-rewrite``.

    ``layers`` has the weights that are new, with the factors that each was divided by; ``left`` has
    the others, each with the reason. ``verification`` has every layer's signals before and after,
    null where they were not measured.
    """
    loaded, result, trial = outcome.loaded, outcome.result, outcome.trial
    checkpoint = loaded.checkpoint and {**checkpoint_json(loaded.checkpoint), "sha256": outcome.source_sha256}
    # The fields of the result are the settings in force, and the layers.
    settings = dataclass_to_dict(result)
    layers = settings.pop("layers")
    return {
        "tool": TOOL,
        "libraries": library_versions(),
        "checkpoint": checkpoint,
        "architecture": loaded.recipe.architecture,
        "model_kwargs": to_plain_values(loaded.recipe.kwargs),
        "rates": loaded.rates,
        **settings,
        "layers": [layer for layer in layers if layer["rewritten"]],
        "left": [layer for layer in layers if not layer["rewritten"]],
        "verification": trial and _verification(trial, outcome.before, outcome.after),
        "report": None if outcome.request.report is None else str(outcome.request.report),
        "output": {"path": str(outcome.output), "sha256": outcome.output_sha256},
    }


def _verification(
    trial: VerificationBatches, before: Sequence[LayerSignal], after: Sequence[LayerSignal]
) -> dict[str, object]:
    signals_before = {signal.parameter: _signal(signal) for signal in before}
    return {
        "inputs": trial.inputs,
        "samples": trial.samples,
        "batches": len(trial.batches),
        "batch_size": trial.batch_size,
        "device": trial.device,
        "range": list(HEALTHY_VARIANCES),
        "within_range": {"before": count_healthy_layers(before), "after": count_healthy_layers(after)},
        "layers": [
            {
                "name": signal.name,
                "parameter": signal.parameter,
                "before": signals_before.get(signal.parameter),
                "after": _signal(signal),
            }
            for signal in after
        ],
    }


def _signal(signal: LayerSignal) -> object:
    return to_plain_values({"variance": signal.variance, "error_variance": signal.error_variance})
