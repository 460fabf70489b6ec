"""Drop rates that a pickled module tree records, and setting them on the model that was built in its place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ckpt_tools.contract import Checkpoint

_PATH_RATE, _BLOCK_RATE = "drop_path_rate", "drop_block_rate"

RatesByModule = Mapping[str, Mapping[str, float]]


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


def recorded_class(checkpoint: Checkpoint) -> str:
    """The dotted name of the pickled module's class, "" where the file held none."""
    module = checkpoint.words.get("module")
    name = module.get("class") if isinstance(module, Mapping) else None
    return name if isinstance(name, str) else ""


def set_rates(model: nn.Module, rates: RatesByModule) -> dict[str, float]:
    """Set what the model has a place for. Returns the largest rate it has none for, by the constructor's keyword.

    Only ``drop_prob`` counts: drop paths and drop blocks are built where their rate is above zero.
    """
    modules = dict(model.named_modules())
    hidden: dict[str, float] = {}
    for path, attributes in rates.items():
        for name, rate in attributes.items():
            module = modules.get(path)
            if module is not None and _is_rate(getattr(module, name, None)):
                setattr(module, name, rate)
            elif name == "drop_prob" and rate > 0:
                keyword = _BLOCK_RATE if "block" in path.rpartition(".")[2] else _PATH_RATE
                hidden[keyword] = max(hidden.get(keyword, 0.0), rate)
    return hidden


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
