"""Which BN layers are rewritten, which serve as controls, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from ckpt_tools.arguments import advise
from ckpt_tools.contract import LayerChoice, Rates, Statistics
from ckpt_tools.errors import NothingToDo
from ckpt_tools.reestimate.layer_patterns import select_layers
from ckpt_tools.results import BatchNormLayer, Walk


@dataclass(frozen=True)
class Choice:
    """Names of the layers to rewrite and of the control layers, and the sentence that says why.

    ``kept`` has the layers that are left out for a reason of their own, which is in words.
    """

    rewrite: frozenset[str]
    controls: frozenset[str]
    why: str
    kept: Mapping[str, str] = field(default_factory=dict)


def choose(
    walk: Walk,
    layers: LayerChoice,
    *,
    rates: Rates,
    statistics: Statistics,
    only: Sequence[str] = (),
    keep: Sequence[str] = (),
    frozen: Mapping[str, str] | None = None,
) -> Choice:
    """Choose the layers by whether the drop rates are known and above zero, unknown, or zero.

    Of these, the layers that the user excludes and those that training left as they were are kept.

    Args:
        walk: of the model: which layers a forward reaches, and which lie behind dropout.
        layers: "auto", "downstream" or "all", as the user asked for.
        rates: where the drop rates stem from; "unknown" makes "auto" choose every layer.
        statistics: "mean+variance" (precise BN) concerns every layer, too.
        only: patterns of the layers that may be rewritten; no pattern means every layer.
        keep: patterns of layers that are kept.
        frozen: the result of ``frozen_layers``. These layers are kept unless ``only`` names them,
            and are no control layers either way.

    Raises:
        NothingToDo: no running variance is wrong, every layer is kept, or there is no BN layer.
        UsageError: a pattern matches no BN layer.
    """
    # Before anything else: a mistyped name should not be hidden by another outcome.
    allowed = select_layers(walk.batch_norms, only, "only")
    excluded = select_layers(walk.batch_norms, keep, "keep")
    choice = _choose_by_rates(walk, layers, rates, statistics)
    frozen = frozen or {}
    kept = {name: reason for name, reason in frozen.items() if name not in allowed}
    for name in choice.rewrite - kept.keys():
        if only and name not in allowed:
            kept[name] = f"kept: not among the layers that {advise('--only', 'only')} names"
        elif name in excluded:
            kept[name] = f"kept: asked for with {advise('--keep', 'keep')}"
    return _leave_out(choice, kept, frozen.keys())


def _leave_out(choice: Choice, kept: Mapping[str, str], frozen: Set[str]) -> Choice:
    """Take the kept layers out of a choice, and say in its sentence which and why."""
    rewrite = choice.rewrite - kept.keys()
    controls = choice.controls - frozen
    affected = sorted(choice.rewrite & kept.keys())
    if not affected:
        return replace(choice, controls=controls, kept=kept)
    reasons = "; ".join(
        f"{count} {reason}" for reason, count in Counter(kept[name] for name in affected).items()
    )
    if not rewrite:
        raise NothingToDo(
            f"nothing to do: {choice.why}, and each of them is left as it is ({reasons}). Name layers "
            f"with {advise('--only', 'only=')} to rewrite them all the same, or leave "
            f"{advise('--keep', 'keep=')} out."
        )
    why = f"{choice.why}; {len(affected)} of them left as they are ({reasons})"
    return Choice(rewrite, controls, why, kept)


def _choose_by_rates(walk: Walk, layers: LayerChoice, rates: Rates, statistics: Statistics) -> Choice:
    reached = [layer for layer in walk.batch_norms if layer.reached]
    if not reached:
        raise NothingToDo(_no_layer_message(walk))
    behind = [layer for layer in reached if layer.downstream_of]
    # If only leaf modules ran in training mode, a container may inject noise that the walk has not
    # seen. Then no layer is known to be free of it.
    free = [layer for layer in reached if walk.containers_trained and not layer.downstream_of]
    controls = [layer for layer in free if not layer.potentially_downstream_of]
    if layers == "all":
        return _make_choice(reached, controls, "asked for every BN layer")
    if layers == "auto" and statistics == "mean+variance":
        why = "mean and variance (precise BN) concern every BN layer"
        return _make_choice(reached, controls, why)
    if behind:
        # A site whose rate is zero in the model as it stands disturbs no layer, so here all layers
        # that are not behind an active site serve as controls.
        why = f"{len(behind)} of {len(reached)} BN layers lie behind active dropout"
        return _make_choice(behind, free, why + _hidden_noise_note(walk))
    if layers == "auto" and rates == "unknown" and _may_be_behind(walk, reached):
        return _make_choice(reached, controls, _unknown_rates_reason(walk))
    raise NothingToDo(_not_behind_message(walk, rates))


def _make_choice(rewrite: list[BatchNormLayer], controls: list[BatchNormLayer], why: str) -> Choice:
    names = frozenset(layer.name for layer in rewrite)
    return Choice(names, frozenset(layer.name for layer in controls), why)


def _may_be_behind(walk: Walk, reached: list[BatchNormLayer]) -> bool:
    """Whether some layer may lie behind dropout at other rates than the model's.

    False where there is no dropout site at any rate, and where the sites are active and none of
    them lies before a BN layer.
    """
    if any(layer.potentially_downstream_of for layer in reached):
        return True
    if not walk.dropout_sites:
        return not walk.containers_trained  # what was not seen may be there
    return not any(site.active for site in walk.dropout_sites)


def _unknown_rates_reason(walk: Walk) -> str:
    why = "drop rates are not recorded in a state dict, so every BN layer is rewritten, as in the paper"
    return f"{why} ({_advise_rates()}, to rewrite only what lies behind dropout){_hidden_noise_note(walk)}"


def _hidden_noise_note(walk: Walk) -> str:
    if walk.containers_trained:
        return ""
    return (
        " (only leaf modules ran in training mode, as the model wants targets there; other noise "
        "was not seen)"
    )


def _no_layer_message(walk: Walk) -> str:
    layers = [f"{item.name} ({item.reason})" for item in walk.left_alone]
    layers += [f"{layer.name} (never reached by an evaluation forward)" for layer in walk.batch_norms]
    message = (
        "no BatchNorm layer with running statistics that a forward reaches; there is nothing to re-estimate"
    )
    return f"{message}. Found: {'; '.join(layers[:3])}" if layers else f"{message}."


def _not_behind_message(walk: Walk, rates: Rates) -> str:
    whose_rates = {
        "given": "the drop rates given",
        "recorded": "the drop rates recorded in the checkpoint",
        "estimated": "the drop rates that the stored statistics fit",
        "model": "the drop rates of the model",
        "unknown": "the architecture's default drop rates",
    }[rates]
    active = [site for site in walk.dropout_sites if site.active]
    if active:
        names = ", ".join(site.name for site in active[:3])
        cause = f"no BN layer lies behind an active dropout site ({names})"
    elif not walk.dropout_sites and rates == "unknown":
        cause = "there is no dropout site in this architecture, so no BN layer saw dropout"
    else:
        note = _hidden_noise_note(walk)
        cause = f"every drop rate is zero, so no BN layer saw dropout{note}"
    if walk.left_alone:
        cause += f" (left alone: {walk.left_alone[0].name}, {walk.left_alone[0].reason})"
    all_layers = advise("--layers all", "layers='all'")
    return (
        f"nothing to do: with {whose_rates}, {cause}. Use {all_layers} to re-estimate every BN layer "
        f"all the same, or {_advise_rates()}."
    )


def _advise_rates() -> str:
    return advise(
        "give the rates of the training run (--model-kwargs drop_rate=0.2; --dropout NAME=RATE where this "
        "architecture lacks them)",
        "build the model with the drop rates of the training run, or name them where it has none: "
        "dropout={'pool*': 0.25}",
    )
