"""Pickled module trees: their state dicts and recorded drop rates, without their classes.

A module arrives as an OpaqueObject whose state has the attributes of ``nn.Module``
(``_parameters``, ``_buffers``, ``_modules``), or as one of TorchScript, whose state has parameters,
buffers and children side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.pickles import NOT_DENSE, OpaqueObject

__all__ = ["TreeBudget", "module_class_name", "module_drop_rates", "module_state"]

_PARTS = ("_parameters", "_buffers", "_modules")
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"  # pickled as the call (module, settings)
_SCRIPT = "__torch__."  # how the classes in TorchScript archives are named
# TorchScript tells classes of one name apart by a number in their path.
_MANGLED = re.compile(r"___torch_mangle_\d+\.")
_WRAPPED = ("module", "_orig_mod")  # DataParallel, AveragedModel; torch.compile
_MAX_WRAPPERS = 8  # around each other
# Layers that hold packed weights, not the stubs of a model that could be quantised.
_QUANTISED = re.compile(r"^torch\.(ao\.)?nn\.(intrinsic\.)?quantized\.(?!modules\.functional)")
_MAX_VALUES = 100_000  # modules and tensors
_MAX_DEPTH = 200


@dataclass
class TreeBudget:
    """How many modules and tensors may still be visited.

    A tree whose branches are shared takes a few bytes of a file, and can unfold to any number of
    modules.
    """

    left: int = _MAX_VALUES


@dataclass(frozen=True)
class _Module:
    """One module of a tree: ``path`` is "" for the root, "layer1." for a child."""

    path: str
    name: str
    attributes: Mapping[object, object]
    tensors: Mapping[str, object]


def module_state(value: object, budget: TreeBudget | None = None) -> dict[str, object] | None:
    """Return what ``state_dict()`` of a pickled module gives, in its order; None for other values.

    The module is one of ``nn.Module`` or of TorchScript. Values are tensors, the same one for tied
    parameters, or an OpaqueObject for a tensor that is not dense. Several calls may share a
    ``budget``.

    Raises CheckpointError for a tree that contains itself, and for quantised layers, which hide
    their weights.
    """
    if _children(value) is None:
        return None
    modules = list(_iterate_modules(value, budget or TreeBudget()))
    packed = next((module for module in modules if _QUANTISED.search(module.name)), None)
    if packed is not None:
        raise CheckpointError(
            f"{module_class_name(value)}: expected a model of floating-point layers, found a "
            f"quantised one ({packed.path.removesuffix('.')}: {packed.name}): quantisation packs "
            "weights and folds BatchNorm into the layers before it. Give the checkpoint that was "
            "quantised."
        )
    return {module.path + key: tensor for module in modules for key, tensor in module.tensors.items()}


def module_drop_rates(value: object) -> dict[str, dict[str, float]]:
    """Return the drop rates by their names, by the paths of the modules ("" for the root).

    A drop rate is a number in [0, 1] whose name contains "drop", or ``p`` of a class whose name
    contains "drop" or "StochasticDepth".
    """
    drop_rates = {}
    for module in _iterate_modules(value, TreeBudget()):
        class_name = module.name.rpartition(".")[2].lower()
        drops = "drop" in class_name or "stochasticdepth" in class_name
        rates = {
            key: float(number)
            for key, number in module.attributes.items()
            if isinstance(key, str)
            and ("drop" in key.lower() or (key == "p" and drops))
            and isinstance(number, int | float)
            and not isinstance(number, bool)
            and 0 <= number <= 1
        }
        if rates:
            drop_rates[module.path.removesuffix(".")] = rates
    return drop_rates


def module_class_name(value: object) -> str:
    """Return ``package.module.Class`` of a pickled module; "" for other values.

    Of a wrapper such as DataParallel this is the class of the module inside.
    """
    for _ in range(_MAX_WRAPPERS):
        children = _children(value) or {}
        if len(children) != 1:
            break
        ((name, child),) = children.items()
        if name not in _WRAPPED or _children(child) is None:
            break
        value = child
    if type(value) is not OpaqueObject or _children(value) is None:
        return ""
    return _MANGLED.sub("", value.name).removeprefix(_SCRIPT)


def _iterate_modules(root: object, budget: TreeBudget) -> Iterator[_Module]:
    """Yield the modules of a tree, each before its children and as often as it is reached.

    Raises CheckpointError when the budget is spent, and for a tree that is deeper than any network.
    """
    waiting: list[tuple[str, object, int]] = [("", root, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        children = _children(value)
        if children is None or type(value) is not OpaqueObject:
            continue
        tensors = _tensors(value)
        budget.left -= 1 + len(tensors) + len(children)
        if budget.left < 0 or depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{module_class_name(root)}: expected a tree of modules, found one that contains "
                "itself or unfolds without end. Save model.state_dict() where the model was "
                "trained."
            )
        yield _Module(path, value.name, _attributes(value), tensors)
        # The last is taken first, so that reversed children come in their order.
        waiting += [(f"{path}{name}.", child, depth + 1) for name, child in reversed(children.items())]


def _attributes(value: OpaqueObject) -> Mapping[object, object]:
    """Return the attributes of a module by their names.

    A ``torch.fx`` module has no state: its attributes are the argument of the function that
    rebuilds it.
    """
    for candidate in (value.state, *(value.args or ())[:1]):
        if isinstance(candidate, dict):
            return candidate
    return {}


def _children(value: object) -> dict[str, object] | None:
    """Return the modules directly inside a module; None if the value is no module."""
    if type(value) is not OpaqueObject:
        return None
    if value.name == _COMPILED and value.args and _children(value.args[0]) is not None:
        return {"_orig_mod": value.args[0]}
    attributes = _attributes(value)
    if all(isinstance(attributes.get(part), dict) for part in _PARTS):
        return _string_keyed(attributes["_modules"])
    if value.name.startswith(_SCRIPT) and isinstance(value.state, dict):
        items = _string_keyed(attributes).items()
        return {name: child for name, child in items if _is_script(child)}
    return None


def _is_script(value: object) -> bool:
    return type(value) is OpaqueObject and value.name.startswith(_SCRIPT)


def _tensors(value: OpaqueObject) -> dict[str, object]:
    """Return parameters and persistent buffers of a module, without those of its children."""
    attributes = _attributes(value)
    if value.name.startswith(_SCRIPT):
        candidates = _string_keyed(attributes)
    elif "_parameters" in attributes:
        transient = attributes.get("_non_persistent_buffers_set")
        if not isinstance(transient, set | frozenset | list | tuple):
            transient = ()
        buffers = _string_keyed(attributes["_buffers"]).items()
        candidates = _string_keyed(attributes["_parameters"])
        candidates |= {name: buffer for name, buffer in buffers if name not in transient}
    else:
        return {}
    return {name: tensor for name, tensor in candidates.items() if _is_tensor(tensor)}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (
        type(value) is OpaqueObject and value.args is not None and value.name in NOT_DENSE
    )


def _string_keyed(values: object) -> dict[str, object]:
    if not isinstance(values, dict):
        return {}
    return {key: value for key, value in values.items() if isinstance(key, str)}
