"""Pickled module trees: what ``state_dict()`` would give, and the drop rates they record, without their classes."""

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
_MANGLED = re.compile(r"___torch_mangle_\d+\.")
_WRAPPED = ("module", "_orig_mod")  # DataParallel, AveragedModel; torch.compile
_WRAPPERS = 8
# Layers that hold packed weights, not the stubs of a model that could be quantised.
_QUANTISED = re.compile(r"^torch\.(ao\.)?nn\.(intrinsic\.)?quantized\.(?!modules\.functional)")
_MOST = 100_000  # modules and tensors


@dataclass
class TreeBudget:
    """How many modules and tensors may still be met: trees that share their branches can unfold to any number."""

    left: int = _MOST


@dataclass(frozen=True)
class _Module:
    """One module of a tree: ``path`` is "" for the root, "layer1." for a child."""

    path: str
    name: str
    attributes: Mapping[object, object]
    tensors: Mapping[str, object]


def module_state(value: object, allowance: TreeBudget | None = None) -> dict[str, object] | None:
    """What ``state_dict()`` of a pickled ``nn.Module`` or TorchScript module gives, in its order; None for others.

    Values are tensors, the same one for tied parameters, or an Opaque for a tensor that is not dense. Raises
    CheckpointError for a tree that contains itself, and for quantised layers, which hide their weights. Several calls
    may share an ``allowance``.
    """
    if _children(value) is None:
        return None
    modules = list(_walk(value, allowance or TreeBudget()))
    packed = next((module for module in modules if _QUANTISED.search(module.name)), None)
    if packed is not None:
        raise CheckpointError(
            f"{module_class_name(value)}: expected a model of floating-point layers, found a quantised one "
            f"({packed.path.removesuffix('.')}: {packed.name}): quantisation packs weights and folds "
            "BatchNorm into the layers before it. Give the checkpoint that was quantised."
        )
    return {
        module.path + key: tensor for module in modules for key, tensor in module.tensors.items()
    }


def module_drop_rates(value: object) -> dict[str, dict[str, float]]:
    """The drop rates, as attributes by the paths of the modules that have them ("" for the root).

    A rate is a number in [0, 1] whose name contains "drop", or ``p`` of a class that does or is a StochasticDepth.
    """
    found = {}
    for module in _walk(value, TreeBudget()):
        kind = module.name.rpartition(".")[2].lower()
        dropping = "drop" in kind or "stochasticdepth" in kind
        rates = {
            key: rate for key, rate in module.attributes.items() if _is_rate(key, rate, dropping)
        }
        if rates:
            found[module.path.removesuffix(".")] = {
                str(key): float(rate) for key, rate in rates.items()
            }  # type: ignore[arg-type]
    return found


def module_class_name(value: object) -> str:
    """``package.module.Class`` of a pickled module, or of the one inside DataParallel and the like; "" for others."""
    for _ in range(_WRAPPERS):
        inner = [child for name, child in (_children(value) or {}).items() if name in _WRAPPED]
        if len(inner) != 1 or len(_children(value) or {}) != 1 or _children(inner[0]) is None:
            break
        value = inner[0]
    if type(value) is not OpaqueObject or _children(value) is None:
        return ""
    return _MANGLED.sub("", value.name).removeprefix(_SCRIPT)


def _is_rate(key: object, rate: object, dropping: bool) -> bool:
    if (
        not isinstance(key, str)
        or isinstance(rate, bool)
        or not isinstance(rate, int | float)
        or not 0 <= rate <= 1
    ):
        return False
    return "drop" in key.lower() or (key == "p" and dropping)


def _walk(root: object, allowance: TreeBudget) -> Iterator[_Module]:
    """The modules of a tree, each before its children and as often as it is reached."""
    todo: list[tuple[str, object, int]] = [("", root, 0)]
    while todo:
        path, value, depth = todo.pop()
        children = _children(value)
        if children is None or type(value) is not OpaqueObject:
            continue
        tensors = _tensors(value)
        allowance.left -= 1 + len(tensors) + len(children)
        if allowance.left < 0 or depth > 200:
            raise CheckpointError(
                f"{module_class_name(root)}: expected a tree of modules, found one that contains itself or unfolds without "
                "end. Save model.state_dict() where the model was trained."
            )
        yield _Module(path, value.name, _attributes(value), tensors)
        todo += [(f"{path}{name}.", child, depth + 1) for name, child in reversed(children.items())]


def _attributes(value: OpaqueObject) -> Mapping[object, object]:
    """Attributes by name; of a ``torch.fx`` module they are the argument of what rebuilds it."""
    for candidate in (value.state, *(value.args or ())[:1]):
        if isinstance(candidate, dict):
            return candidate
    return {}


def _children(value: object) -> dict[str, object] | None:
    """The modules directly inside a module; None if the value is no module."""
    if type(value) is not OpaqueObject:
        return None
    if value.name == _COMPILED and value.args and _children(value.args[0]) is not None:
        return {"_orig_mod": value.args[0]}
    attributes = _attributes(value)
    if all(isinstance(attributes.get(part), dict) for part in _PARTS):
        return _string_keyed(attributes["_modules"])
    if value.name.startswith(_SCRIPT) and isinstance(value.state, dict):
        return {
            name: inner for name, inner in _string_keyed(attributes).items() if _is_script(inner)
        }
    return None


def _is_script(value: object) -> bool:
    return type(value) is OpaqueObject and value.name.startswith(_SCRIPT)


def _tensors(value: OpaqueObject) -> dict[str, object]:
    attributes = _attributes(value)
    if not value.name.startswith(_SCRIPT) and "_parameters" not in attributes:
        return {}
    if value.name.startswith(_SCRIPT):
        return {
            name: inner for name, inner in _string_keyed(attributes).items() if _is_tensor(inner)
        }
    passing = attributes.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set | frozenset | list | tuple) else ()
    parameters, buffers = (
        _string_keyed(attributes["_parameters"]),
        _string_keyed(attributes["_buffers"]),
    )
    kept = {name: buffer for name, buffer in buffers.items() if name not in passing}
    return {name: inner for name, inner in (parameters | kept).items() if _is_tensor(inner)}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (
        type(value) is OpaqueObject and value.args is not None and value.name in NOT_DENSE
    )


def _string_keyed(values: object) -> dict[str, object]:
    return (
        {key: value for key, value in values.items() if isinstance(key, str)}
        if isinstance(values, dict)
        else {}
    )
