"""A plan whose drop rates nobody knew, once the data has told them."""

from __future__ import annotations

from dataclasses import replace

from ckpt_tools.data.preprocessing import example_input
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.diagnosis.rate_fit import BATCH_SIZE, RateFit
from ckpt_tools.errors import NothingToDo
from ckpt_tools.jobs.drop_rates import apply_estimate, estimate_drop_rates
from ckpt_tools.jobs.plan import Plan, choose_layers
from ckpt_tools.machine.device import move_to_device
from ckpt_tools.walker.downstream import walk


def estimate_unknown_rates(plan: Plan) -> Plan:
    """Return the plan with the model at the rates that the stored statistics show.

    It stays as it is where rates are known, where the user has chosen estimator or layers, and
    where there is no data. Without a clear result it only gains the fit, and every layer is
    rewritten as in the paper. Of a team, rank 0 estimates. Raises NothingToDo if the rates are
    clearly zero.
    """
    method = plan.request.method
    automatic = (method.estimator, method.layers, method.statistics) == ("auto", "auto", "variance")
    if not automatic or plan.loaded_model.rates != "unknown" or plan.request.data is None:
        return plan
    fit = plan.team.first(lambda: _estimate(plan))
    if fit is None or not fit.is_clear:
        return replace(plan, rate_fit=fit)
    if fit.is_zero:
        raise NothingToDo(
            f"nothing to do: {fit.sentence}, so no BN layer saw dropout. Use --layers all to "
            "re-estimate every BN layer all the same, or give the rates of the training run "
            "(--model-kwargs)."
        )
    return plan.team.each(lambda: _apply(plan, fit))


def _estimate(plan: Plan) -> RateFit | None:
    batches = plan.source.batches(plan.input_spec, Reading(BATCH_SIZE, plan.request.reading.workers))
    return estimate_drop_rates(plan.loaded_model, plan.walk, batches)


def _apply(plan: Plan, fit: RateFit) -> Plan:
    loaded = apply_estimate(plan.loaded_model, fit)
    # Walked before it moves to its device, as every model is.
    model_walk = walk(loaded.model, example_input(plan.input_spec, plan.source), probe=loaded.probe)
    choice = choose_layers(loaded, model_walk, plan.request.method)
    move_to_device(loaded.model, plan.device)
    return replace(
        plan,
        recognised=replace(plan.recognised, loaded=loaded),
        walk=model_walk,
        choice=choice,
        rate_fit=fit,
    )
