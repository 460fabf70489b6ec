"""Dropout sites: which operations inject noise, at which rate, and under which name.

No list of module classes decides this. A site is wherever an operation draws random numbers during
a forward in training mode. The calls of ``torch.nn.functional`` are only read for their rate.
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
from torch._ops import OpOverload, OpOverloadPacket

# Functions with the arguments (input, p, training, …) that return their input when not training.
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

PROBE_RATE = 0.5  # sites that are switched off run at this rate, to see what they would reach
# Under these names modules keep their rate: ``p`` in nn.Dropout, ``drop_prob`` in timm's DropPath.
_RATE_ATTRIBUTES = ("p", "drop_prob", "drop_rate", "dropout", "prob")
_PROBABILITY_ARGUMENTS = ("p", "dropout_p")
# Operators that tell by a tag whether they are random, or never are.
_KNOWN_NAMESPACES = {
    "aten", "prim", "prims", "c10d", "quantized", "quantized_decomposed", "mkldnn", "mkldnn_prepacked",
    "onednn", "inductor", "profiler", "symm_mem", "torchvision", "rngprims", "ckpt_tools",
}  # fmt: skip


@dataclass(frozen=True)
class DropoutCall:
    """One call of a function in DROPOUT_FUNCTIONS, with the arguments that matter by name."""

    op: str
    input: torch.Tensor
    rate: float
    training: bool


def parse_dropout_call(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> DropoutCall | None:
    """Read the arguments of a dropout function; return None if ``func`` is another function."""
    if isinstance(func, OpOverload):  # torch.ops.aten.dropout.default
        func = func.overloadpacket
    if isinstance(func, OpOverloadPacket):  # torch.ops.aten.dropout is torch.dropout
        func = getattr(torch, func._qualified_op_name.removeprefix("aten::"), func)
    op = DROPOUT_FUNCTIONS.get(func)
    if op is None:
        return None
    # These two drop nothing unless they are called with training=True; the others drop by default.
    training: object = func not in (F.alpha_dropout, F.feature_alpha_dropout)
    arguments = {"p": 0.5, "training": training}
    arguments |= dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
    training = arguments.get("train", arguments["training"])  # torch.dropout calls it "train"
    tensor = arguments["input"]
    assert isinstance(tensor, torch.Tensor)
    return DropoutCall(op, tensor, float(arguments["p"]), bool(training))  # type: ignore[arg-type]


def enable_dropout(
    func: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with which a dropout function drops, whatever the mode of its caller.

    The arguments of any other function come back as they are.
    """
    if func not in DROPOUT_FUNCTIONS:
        return args, kwargs
    # torch.dropout calls its third argument "train", F.dropout calls it "training".
    is_builtin = not inspect.isfunction(func)
    by_name = dict(zip(("p", "train" if is_builtin else "training", "inplace"), args[1:], strict=False))
    return args[:1], {**by_name, **kwargs, "train" if is_builtin else "training": True}


def disable_attention_dropout(
    func: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with which an attention function drops nothing.

    The arguments of any other function come back as they are. Attention needs this because it
    applies dropout inside, without a call of a function in DROPOUT_FUNCTIONS.
    """
    if func is F.scaled_dot_product_attention:
        by_name = dict(zip(("dropout_p", "is_causal"), args[4:], strict=False))
        return args[:4], {**by_name, **kwargs, "dropout_p": 0.0}  # query, key, value, mask
    if func is F.multi_head_attention_forward and len(args) <= _MHA_TRAINING:
        return args, {**kwargs, "training": False}
    return args, kwargs


# A call that passes so many arguments by position has passed ``training`` among them.
_MHA_PARAMETERS = inspect.signature(F.multi_head_attention_forward).parameters
_MHA_TRAINING = list(_MHA_PARAMETERS).index("training")


def draws_random_numbers(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Tell whether this operation, called with these arguments, makes random numbers.

    torch tags its random operations. Dropout that is off, at rate 0 or with ``train=False``, and a
    Bernoulli draw with the probability 0 or 1 have only one possible outcome and do not count.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = _arguments_by_name(func, args, kwargs)
    if arguments.get("train") is False or arguments.get("training") is False:
        return False
    certain = (0.0, 1.0) if "bernoulli" in func._schema.name else (0.0,)
    probabilities = [arguments[name] for name in _PROBABILITY_ARGUMENTS if name in arguments]
    return not any(probability in certain for probability in probabilities)


def is_custom_operator(func: OpOverload) -> bool:
    """Tell whether an operator is none of torch's, so that its tags say nothing about random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return func.namespace not in _KNOWN_NAMESPACES and not func.namespace.startswith("_")


def module_drop_rate(module: nn.Module | None) -> float | None:
    """Return the drop rate that a module keeps among its attributes; None if none is above zero."""
    for attribute in _RATE_ATTRIBUTES:
        value = getattr(module, attribute, None)
        # True is an int in Python, but a flag named ``dropout`` is no rate of 1.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
    return None


def masking_drop_rate(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> float | None:
    """Return the drop rate of an operation that draws a mask: 1 − p of a Bernoulli draw with the
    keep probability p, p of dropout that is one operation. None for other operations.
    """
    probability = _arguments_by_name(func, args, kwargs).get("p")
    if not isinstance(probability, float):
        return None
    if "bernoulli" in func._schema.name:
        return 1.0 - probability
    return probability if "dropout" in func._schema.name else None


def _arguments_by_name(
    func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return the arguments of a call; torch leaves those out that have their default."""
    parameters = func._schema.arguments
    defaults = {item.name: item.default_value for item in parameters if item.has_default_value()}
    return defaults | dict(zip((item.name for item in parameters), args, strict=False)) | dict(kwargs)


def activate_dropout(model: nn.Module) -> None:
    """Set every drop rate of zero that a module of ``model`` keeps to PROBE_RATE.

    This brings sites to life that a forward hides behind ``if self.drop_rate > 0``. It changes
    ``model``, so pass a copy.
    """
    for module in model.modules():
        is_leaf = not any(True for _ in module.children()) and not module._parameters
        for name, value in vars(module).items():
            # ``p`` is the drop rate of a layer such as nn.Dropout; elsewhere it may mean anything.
            is_rate = "drop" in name or (is_leaf and name == "p")
            if is_rate and type(value) in (int, float) and value == 0:
                # A module's own __setattr__ may do more than to store the value, or refuse it.
                object.__setattr__(module, name, PROBE_RATE)


def ignores_input_values(func: OpOverload) -> bool:
    """Tell whether the output depends only on the input's shape (``zeros_like``, ``new_empty``)."""
    name = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


class HostRandomness:
    """Notices draws from Python's and numpy's global generators, which no tensor operation shows.

    Both are Mersenne Twisters. Comparing their positions is cheaper than comparing whole states,
    and it happens before every operation.
    """

    def __init__(self) -> None:
        self._position = self._read_position()

    def has_advanced(self) -> bool:
        """Tell whether anything has been drawn since the last call."""
        before, self._position = self._position, self._read_position()
        return before != self._position

    @staticmethod
    def _read_position() -> tuple[int, int]:
        state = np.random.get_state(legacy=False)
        assert isinstance(state, dict)
        return random.getstate()[1][-1], state["state"]["pos"]
