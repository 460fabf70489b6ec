"""Turning a raw state dict into plain keys and plain tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.pickles import NOT_DENSE, OpaqueObject

__all__ = ["plain_tensors", "strip_wrappers"]

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, DDP and AveragedModel; torch.compile
_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts in a buffer beside `module.`
_LONGEST_PREFIX = 1000  # characters
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")


def plain_tensors(state: Mapping[str, object], where: object) -> tuple[dict[str, Tensor], list[str]]:
    """Return the dense CPU tensors of a state dict, and the keys of entries that are no tensors.

    The tensors are detached. Raises CheckpointError for a tensor or a key that no safetensors file
    can hold as it is.
    """
    for key, value in state.items():
        _require_storable(key, value, where)
    tensors = {
        key: _require_dense(key, value, where) for key, value in state.items() if isinstance(value, Tensor)
    }
    return tensors, [key for key in state if key not in tensors]


def strip_wrappers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Remove the prefixes that wrappers put before keys.

    They are removed from all keys, in any nesting, and ``_orig_mod.`` also inside keys. Returns the
    tensors under plain keys, the prefix that was removed from all, and the keys left out.
    """
    plain, prefix, left_out = dict(tensors), "", []
    while (wrapper := _find_wrapper(plain)) and len(prefix) < _LONGEST_PREFIX:
        if _COUNTER in plain:
            del plain[_COUNTER]
            left_out.append(prefix + _COUNTER)
        plain = {key.removeprefix(wrapper): tensor for key, tensor in plain.items()}
        prefix += wrapper
    # A compiled submodule has _orig_mod. inside its keys. Where two keys would become one without
    # it, somebody has given this name to a module.
    without_compiled = {_COMPILED.sub(r"\1", key): tensor for key, tensor in plain.items()}
    if len(without_compiled) == len(plain):
        plain = without_compiled
    return plain, prefix, left_out


def _find_wrapper(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the prefix of a wrapper that all keys have, but for the counter of AveragedModel."""
    keys = [key for key in tensors if key != _COUNTER]
    for wrapper in _WRAPPERS:
        if keys and all(key.startswith(wrapper) and key != wrapper for key in keys):
            # Only AveragedModel, which wraps as `module.`, has the counter beside the wrapped
            # model.
            return wrapper if wrapper == "module." or _COUNTER not in tensors else None
    return None


def _require_storable(key: str, value: object, where: object) -> None:
    """Raise CheckpointError for a tensor that is not dense, and for a key that is not Unicode."""
    if type(value) is OpaqueObject and value.args is not None and value.name in NOT_DENSE:
        raise _not_dense_error(key, NOT_DENSE[value.name], where)
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{where}: expected keys that are text, found {key!a}, which is not Unicode. Rename it "
            "and save again."
        ) from error


def _require_dense(key: str, value: Tensor, where: object) -> Tensor:
    problem = _describe_problem(value)
    if problem:
        raise _not_dense_error(key, problem, where)
    return value.detach()


def _not_dense_error(key: str, problem: str, where: object) -> CheckpointError:
    return CheckpointError(
        f"{where}: {key}: expected a dense tensor, found one that is {problem}. "
        "Convert it (to_dense, dequantize, full_tensor) and save the state dict again."
    )


def _describe_problem(value: Tensor) -> str | None:
    if is_lazy(value):
        return "without values (lazy)"
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    if value.device.type != "cpu":
        return f"without values (on the device {value.device})"
    kind = type(value.detach())
    return None if kind is Tensor else f"of the subclass {kind.__module__}.{kind.__qualname__}"
