"""What must be known where there is no training data."""

from __future__ import annotations

import contextlib

from torch import nn

from ckpt_tools.contract import LoadedModel
from ckpt_tools.errors import UsageError
from ckpt_tools.identify.plugins import adapter
from ckpt_tools.method import Method
from ckpt_tools.model.input_shape import needs_integer_inputs


def require_what_data_would_show(loaded: LoadedModel, method: Method) -> None:
    """Raise UsageError if a correction without data is not possible.

    Only the paired measurement needs no training data, and it needs the drop rates.
    """
    method.require_no_data()
    takes_ids = any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in loaded.model.modules())
    if takes_ids and needs_integer_inputs(loaded.model):
        raise UsageError(
            f"{loaded.recipe.architecture} takes integers, such as token ids, and random ones are no "
            "text. Give real data (--data)."
        )
    if loaded.rates == "unknown":
        raise UsageError(
            "the drop rates of the training are not recorded, and without data nothing shows them. "
            f"Give them, for example --model-kwargs {_rate_example(loaded)}, or give the training data "
            "(--data)."
        )


def _rate_example(loaded: LoadedModel) -> str:
    recipe = loaded.recipe
    names: tuple[str, ...] = ()
    with contextlib.suppress(Exception):  # an example is no reason to fail
        names = adapter(recipe.adapter).rate_kwargs(recipe.name)
    usual = [name for name in names if name in ("drop_rate", "drop_path_rate")]
    return f"{[*usual, *names, 'drop_rate'][0]}=0.2"
