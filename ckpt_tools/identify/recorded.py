"""Drop rates that a pickled module tree records, and setting them on the model that was built in its place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ckpt_tools.contract import Checkpoint

Rates = Mapping[str, Mapping[str, float]]


def recorded_rates(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Drop rates by module path and attribute, from the words of a file that held a whole module; {} elsewhere."""
    module = checkpoint.words.get("module")
    rates = module.get("rates") if isinstance(module, Mapping) else None
    found: dict[str, dict[str, float]] = {}
    for path, attributes in rates.items() if isinstance(rates, Mapping) else ():
        place = f"{path}."
        if isinstance(attributes, Mapping) and place.startswith(checkpoint.prefix):
            numbers = {name: rate for name, rate in attributes.items() if _is_rate(rate)}
            if numbers:
                found[place.removeprefix(checkpoint.prefix).removesuffix(".")] = numbers
    return found


def class_of(checkpoint: Checkpoint) -> str:
    """The dotted name of the pickled module's class, "" where the file held none."""
    module = checkpoint.words.get("module")
    name = module.get("class") if isinstance(module, Mapping) else None
    return name if isinstance(name, str) else ""


def set_rates(model: nn.Module, rates: Rates) -> float:
    """Set what the model has a place for. Returns the largest rate of drop paths it has none for, 0 without."""
    modules = dict(model.named_modules())
    hidden = 0.0
    for path, attributes in rates.items():
        for name, rate in attributes.items():
            module = modules.get(path)
            if module is not None and _is_rate(getattr(module, name, None)):
                setattr(module, name, rate)
            elif name == "drop_prob":
                hidden = max(hidden, rate)
    return hidden


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
