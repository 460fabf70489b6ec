"""Drop rates that nobody recorded: read from the stored statistics, by building the model at trial
rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ckpt_tools.contract import LoadedModel
from ckpt_tools.diagnosis.data_sample import draw_sample
from ckpt_tools.diagnosis.rate_fit import SAMPLES, RateFit, fit_rates
from ckpt_tools.errors import CkptToolsError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.candidate import build_with_rates, rebuild_with_rates
from ckpt_tools.identify.key_matching import has_counters
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import device_of
from ckpt_tools.reestimate.frozen import frozen_layers
from ckpt_tools.results import Walk
from ckpt_tools.walker.downstream import walk

_TRIAL_RATE = 0.2  # at which it is seen what an argument can reach
_MOST_ARGUMENTS = 2  # that are fitted; each costs eight passes over the samples


def estimate_drop_rates(loaded: LoadedModel, model_walk: Walk, batches: Iterable[Batch]) -> RateFit | None:
    """Find the drop rates at which the stored statistics fit the data best.

    Only rates that are arguments of the constructor are fitted, so that a library's own schedule
    decides what a layer gets, and of these at most the two that put noise in front of most BN
    layers. The other rates stay as the model is built.

    Args:
        loaded: the model; it is not changed.
        model_walk: of this model, with its probe.
        batches: of the training data, best of ``rate_fit.BATCH_SIZE`` samples. The first 512
            samples are read.

    Returns:
        None where no rate can be fitted: the architecture takes none that matters, or the samples
        are too few.

    Raises:
        DataError: NaN in a batch.
    """
    if not any(layer.potentially_downstream_of or layer.downstream_of for layer in model_walk.batch_norms):
        return None
    samples = draw_sample(batches, SAMPLES)  # without outliers, NaN among them
    names = _rates_before_batch_norm(loaded, samples[0]) if samples else ()
    if not names:
        return None
    device, state = device_of(loaded.model), loaded.model.state_dict()

    def make_model(rates: Mapping[str, float]) -> nn.Module:
        return build_with_rates(loaded, rates, state).to(device)

    counted = loaded.checkpoint is None or has_counters(loaded.checkpoint)
    frozen = frozen_layers(loaded.model, model_walk)
    rows_are_samples = getattr(batches, "rows_are_samples", False)
    return fit_rates(
        make_model,
        names,
        samples,
        model_walk,
        frozen=frozen,
        counted=counted,
        rows_are_samples=rows_are_samples,
    )


def apply_estimate(loaded: LoadedModel, fit: RateFit) -> LoadedModel:
    """Return the same weights in a model that is built at the estimated rates."""
    return rebuild_with_rates(loaded, fit.rates)


def describe_rates(loaded: LoadedModel, fit: RateFit | None = None) -> dict[str, object]:
    """Return where the drop rates stem from, with values and errors, for JSON and provenance."""
    arguments = {
        name: value
        for name, value in loaded.recipe.kwargs.items()
        if ("drop" in name or "stochastic_depth" in name) and type(value) in (int, float)
    }
    description: dict[str, object] = {
        "source": loaded.rates,
        "values": arguments if loaded.rates != "unknown" else {},
        "errors": dict(fit.errors) if fit is not None and loaded.rates == "estimated" else {},
    }
    if loaded.dropout:
        description["declared"] = dict(loaded.dropout)
    return description | ({} if fit is None else {"fit": fit.sentence})


def _rates_before_batch_norm(loaded: LoadedModel, example: Batch) -> list[str]:
    """Names of the rate arguments that put noise in front of BN layers, that of the most first."""
    recipe = loaded.recipe
    if recipe.adapter == "module":
        return []
    try:
        names = plugins.adapter(recipe.adapter).rate_kwargs(recipe.name)
    except CkptToolsError:
        return []
    reached_layers: dict[str, int] = {}
    for name in names:
        rates = {**dict.fromkeys(names, 0.0), name: _TRIAL_RATE}
        try:
            trial_walk = walk(build_with_rates(loaded, rates), example)
        except CkptToolsError:
            continue  # The constructor refuses this rate, or the model cannot run with it.
        count = sum(bool(layer.downstream_of) for layer in trial_walk.batch_norms if layer.reached)
        if count:
            reached_layers[name] = count
    return sorted(reached_layers, key=lambda name: -reached_layers[name])[:_MOST_ARGUMENTS]
