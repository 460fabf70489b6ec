"""Which BN layers are rewritten, which serve as controls, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tools.contract import LayerChoice, Rates, Statistics
from ckpt_tools.errors import NothingToDo
from ckpt_tools.results import BatchNormLayer, Walk


@dataclass(frozen=True)
class Choice:
    """Names of the layers to rewrite and of the control layers, and the sentence that says why."""

    rewrite: frozenset[str]
    controls: frozenset[str]
    why: str


def choose(walk: Walk, layers: LayerChoice, *, rates: Rates, statistics: Statistics) -> Choice:
    """Decide by the three cases: drop rates known and above zero, not recorded, known to be zero.

    Raises NothingToDo if no running variance is wrong.
    """
    reached = [layer for layer in walk.batch_norms if layer.reached]
    if not reached:
        raise NothingToDo(_no_layer(walk))
    behind = [layer for layer in reached if layer.downstream_of]
    controls = frozenset(
        layer.name
        for layer in reached
        if walk.containers_trained and not layer.downstream_of and not layer.potentially_downstream_of
    )
    if layers == "all":
        return _all(reached, controls, "asked for every BN layer")
    if layers == "auto" and statistics == "mean+variance":
        return _all(reached, controls, "mean and variance (precise BN) concern every BN layer")
    if behind:
        # Whatever other rates might be, these layers are untouched by dropout as the model stands.
        if walk.containers_trained:
            controls = frozenset(layer.name for layer in reached if not layer.downstream_of)
        why = f"{len(behind)} of {len(reached)} BN layers lie behind active dropout{_unseen(walk)}"
        return Choice(frozenset(layer.name for layer in behind), controls, why)
    if layers == "auto" and rates == "unknown" and _may_be_behind(walk, reached):
        return _all(reached, controls, _unknown(walk))
    raise NothingToDo(_not_behind(walk, rates))


def _unknown(walk: Walk) -> str:
    why = "drop rates are not recorded in a state dict, so every BN layer is rewritten, as in the paper"
    if walk.dropout_sites:
        return f"{why} (give them with --model-kwargs, e.g. drop_rate=0.2, to rewrite only what lies behind dropout)"
    return f"{why}; this architecture shows no dropout site at all"


def _all(reached: list[BatchNormLayer], controls: frozenset[str], why: str) -> Choice:
    return Choice(frozenset(layer.name for layer in reached), controls, why)


def _may_be_behind(walk: Walk, reached: list[BatchNormLayer]) -> bool:
    """False only where the sites are known to be active and none of them, at any rate, lies before a BN layer."""
    potential = any(layer.potentially_downstream_of for layer in reached)
    return potential or not any(site.active for site in walk.dropout_sites)


def _unseen(walk: Walk) -> str:
    if walk.containers_trained:
        return ""
    return " (only leaf modules ran in training mode, as the model wants targets there; other noise was not seen)"


def _no_layer(walk: Walk) -> str:
    found = [f"{item.name} ({item.reason})" for item in walk.left_alone]
    found += [f"{layer.name} (never reached by an evaluation forward)" for layer in walk.batch_norms]
    what = "no BatchNorm layer with running statistics that a forward reaches; there is nothing to re-estimate"
    return f"{what}. Found: {'; '.join(found[:3])}" if found else f"{what}."


def _not_behind(walk: Walk, rates: Rates) -> str:
    known = {
        "given": "the drop rates given",
        "recorded": "the drop rates recorded in the checkpoint",
        "model": "the drop rates of the model",
        "unknown": "the architecture's default drop rates",
    }[rates]
    active = [site for site in walk.dropout_sites if site.active]
    if active:
        names = ", ".join(site.name for site in active[:3])
        cause = f"no BN layer lies behind an active dropout site ({names})"
    else:
        cause = f"every drop rate is zero, so no BN layer saw dropout{_unseen(walk)}"
    if walk.left_alone:
        cause += f" (left alone: {walk.left_alone[0].name}, {walk.left_alone[0].reason})"
    return (
        f"nothing to do: with {known}, {cause}. Use --layers all (layers='all') to re-estimate every BN layer "
        "all the same, or give the rates of the training run (--model-kwargs)."
    )
