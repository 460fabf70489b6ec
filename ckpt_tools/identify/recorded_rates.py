"""Drop rates of a pickled module tree, and how to set them on the model that is built in its place.

A pickle of a whole module is read without running it. Its modules and their drop rates then stand
in `checkpoint.words["module"]`. A corrected file has them in its provenance.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.storage.provenance import recorded_correction

_PATH_RATE, _BLOCK_RATE = "drop_path_rate", "drop_block_rate"

RatesByModule = Mapping[str, Mapping[str, float]]


def recorded_rates(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Return the drop rates of a file that held a whole module, by module path and attribute.

    The output of a correction of such a file has them in its provenance.

    Paths are those of the model, without the prefix that was removed from the keys. Returns {} for
    other files.
    """
    module = checkpoint.words.get("module")
    if isinstance(module, Mapping):
        rates = module.get("rates")
    else:
        rates = recorded_correction(checkpoint).get("module_rates")
    if not isinstance(rates, Mapping):
        return {}
    rates_by_path: dict[str, dict[str, float]] = {}
    for path, attributes in rates.items():
        dotted = f"{path}."  # The prefix ends in a dot, too.
        # Each entry of the mapping is a word of the file, and may be anything.
        if isinstance(attributes, Mapping) and dotted.startswith(checkpoint.prefix):
            numbers = {name: rate for name, rate in attributes.items() if _is_rate(rate)}
            if numbers:
                own_path = dotted.removeprefix(checkpoint.prefix).removesuffix(".")
                rates_by_path[own_path] = numbers
    return rates_by_path


def recorded_class(checkpoint: Checkpoint) -> str:
    """Return the dotted name of the pickled module's class, or "" if the file held no module."""
    module = checkpoint.words.get("module")
    name = module.get("class") if isinstance(module, Mapping) else None
    return name if isinstance(name, str) else ""


def set_rates(model: nn.Module, rates: RatesByModule) -> dict[str, float]:
    """Set the drop rates of the modules that the model has.

    Returns, by the constructor's keyword, the largest rate of the modules that it lacks. Drop paths
    and drop blocks, which have an attribute `drop_prob`, are built only where their rate is above
    zero: building the model again with the returned arguments brings them in.
    """
    modules = dict(model.named_modules())
    missing: dict[str, float] = {}
    for path, attributes in rates.items():
        for name, rate in attributes.items():
            module = modules.get(path)
            # An attribute is set only where the model has a rate there, since the file names it.
            if module is not None and _is_rate(getattr(module, name, None)):
                setattr(module, name, rate)
            elif name == "drop_prob" and rate > 0:
                # timm scales the rate of drop paths with depth; the constructor takes the largest.
                keyword = _BLOCK_RATE if "block" in path.rpartition(".")[2] else _PATH_RATE
                missing[keyword] = max(missing.get(keyword, 0.0), rate)
    return missing


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
