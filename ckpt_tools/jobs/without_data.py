"""What must be known where there is no training data."""

from __future__ import annotations

import contextlib

from ckpt_tools.contract import LoadedModel
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.identify.plugins import adapter
from ckpt_tools.model.input_shape import needs_integer_inputs


def require_known_rates(loaded: LoadedModel) -> None:
    """Raise UsageError if nobody knows the drop rates, which only data could show."""
    if loaded.rates == "unknown":
        raise UsageError(
            "the drop rates of the training are not recorded, and without data nothing shows them. "
            f"Give them, for example --model-kwargs {_rate_example(loaded)}, or give the training data "
            "(--data)."
        )


def data_needed_error(loaded: LoadedModel, error: ModelError) -> UsageError:
    """The error to raise where a model cannot run on random inputs, as ``error`` says."""
    reason = str(error)
    if needs_integer_inputs(loaded.model):
        reason = (
            f"{loaded.recipe.architecture} takes integers, such as token ids, and random ones are no text."
        )
    return UsageError(
        f"{reason} Without data a model gets one tensor of random numbers, of the shape of "
        "--input-size. If that is not what it takes, give real data (--data)."
    )


def _rate_example(loaded: LoadedModel) -> str:
    recipe = loaded.recipe
    names: tuple[str, ...] = ()
    with contextlib.suppress(Exception):  # an example is no reason to fail
        names = adapter(recipe.adapter).rate_kwargs(recipe.name)
    usual = [name for name in names if name in ("drop_rate", "drop_path_rate")]
    return f"{[*usual, *names, 'drop_rate'][0]}=0.2"
