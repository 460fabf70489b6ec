"""Dropout sites: which operations inject noise, at which rate, and under which name.

No list of module classes decides this. A site is wherever an operation draws random numbers during a forward
in training mode; the calls of ``torch.nn.functional`` are read for their rate only.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload

DROPOUT_FUNCTIONS: dict[Callable[..., object], str] = {
    F.dropout: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    F.alpha_dropout: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
    torch.dropout: "dropout",
    torch.dropout_: "dropout",
    torch.feature_dropout: "feature_dropout",
    torch.feature_dropout_: "feature_dropout",
    torch.alpha_dropout: "alpha_dropout",
    torch.alpha_dropout_: "alpha_dropout",
    torch.feature_alpha_dropout: "feature_alpha_dropout",
    torch.feature_alpha_dropout_: "feature_alpha_dropout",
}
"""Functions with arguments (input, p, training, …) that return their input when not training."""

PROBE_RATE = 0.5  # the rate given to sites that are switched off, to see what they would reach
_RATE_ATTRIBUTES = ("p", "drop_prob", "drop_rate", "dropout", "prob")
_PROBABILITY_ARGUMENTS = ("p", "dropout_p")


@dataclass(frozen=True)
class DropoutCall:
    """One call of a function in DROPOUT_CALLS with its arguments sorted out."""

    op: str
    input: torch.Tensor
    rate: float
    training: bool


def parse_dropout_call(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> DropoutCall | None:
    """Read a call of the dropout family; None if ``func`` is something else."""
    op = DROPOUT_FUNCTIONS.get(func)
    if op is None:
        return None
    defaults = {"p": 0.5, "training": func not in (F.alpha_dropout, F.feature_alpha_dropout)}
    given = {**defaults, **dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
    given.setdefault("p", given.get("dropout_p", 0.5))
    given["training"] = given.get("train", given["training"])
    tensor = given["input"]
    assert isinstance(tensor, torch.Tensor)
    return DropoutCall(op, tensor, float(given["p"]), bool(given["training"]))  # type: ignore[arg-type]


def disable_attention_dropout(
    func: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which attention drops nothing; those of any other function as they are."""
    if func is F.scaled_dot_product_attention:
        return args[:4], {**dict(zip(_ATTENTION, args[4:], strict=False)), **kwargs, "dropout_p": 0.0}
    if func is F.multi_head_attention_forward and len(args) <= _MHA_TRAINING:
        return args, {**kwargs, "training": False}
    return args, kwargs


_ATTENTION = ("dropout_p", "is_causal")  # positional arguments behind query, key, value and mask
_MHA_TRAINING = list(inspect.signature(F.multi_head_attention_forward).parameters).index("training")


def draws_random_numbers(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether this operation, called like this, makes random numbers."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    if arguments.get("train") is False:
        return False
    certain = (0.0, 1.0) if "bernoulli" in func._schema.name else (0.0,)
    return all(arguments.get(name) not in certain for name in _PROBABILITY_ARGUMENTS if name in arguments)


def module_drop_rate(module: nn.Module | None) -> float | None:
    """The drop rate that a module keeps among its attributes; None if it keeps none above zero."""
    for attribute in _RATE_ATTRIBUTES:
        value = getattr(module, attribute, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
    return None


def bernoulli_drop_rate(func: OpOverload, args: Sequence[object]) -> float | None:
    """The drop rate that follows from the keep probability of a Bernoulli draw; None for any other operation."""
    if "bernoulli" in func._schema.name and len(args) > 1 and isinstance(args[1], float):
        return 1.0 - args[1]
    return None


def activate_dropout(model: nn.Module) -> None:
    """Give every drop rate that is zero, wherever a module of ``model`` keeps one, the value ALIVE.

    Brings to life sites that a forward hides behind ``if self.drop_rate > 0``. Changes ``model``.
    """
    for module in model.modules():
        leaf = not any(True for _ in module.children()) and not module._parameters
        for name, value in vars(module).items():
            is_rate = "drop" in name or (leaf and name == "p")
            if is_rate and type(value) in (int, float) and value == 0:
                object.__setattr__(module, name, PROBE_RATE)


def ignores_input_values(func: OpOverload) -> bool:
    """Whether the output depends on the shape of the input alone, as with ``zeros_like`` and ``new_empty``."""
    name = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


class HostRandomness:
    """Notices draws from Python's and numpy's global generators, which no tensor operation shows."""

    def __init__(self) -> None:
        self._seen = self._position()

    def has_advanced(self) -> bool:
        """Whether anything was drawn since the last call."""
        before, self._seen = self._seen, self._position()
        return before != self._seen

    @staticmethod
    def _position() -> tuple[int, int]:
        state = np.random.get_state(legacy=False)
        assert isinstance(state, dict)
        return random.getstate()[1][-1], state["state"]["pos"]
