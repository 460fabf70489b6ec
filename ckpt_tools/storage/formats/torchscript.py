"""TorchScript archives (torch.jit.save of scripted or traced modules): state dict and drop rates, nothing run.

``data.pkl`` holds the modules' attributes; the text of their classes under ``code/`` says which of them are parameters
and buffers. Constants of frozen modules are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.formats.module_trees import module_class_name, module_drop_rates
from ckpt_tools.storage.formats.pickles import OpaqueObject, load_archive
from ckpt_tools.storage.formats.zip_records import open_zip_archive

__all__ = ["is_torchscript", "load_torchscript"]

_CLASS = re.compile(r"^class (\w+)\(Module\):\n(.*?)(?=^class |^def |\Z)", re.MULTILINE | re.DOTALL)
_NAMES = re.compile(r"^  __(?:parameters|buffers)__ = \[([^\]\n]*)\]", re.MULTILINE)
_DROPPING = re.compile("drop|StochasticDepth", re.IGNORECASE)
_CONSTANT = re.compile(r"^  (\w+) : Final\[float\] = ([-+.\deE]+)$", re.MULTILINE)
_DEEPEST = 100
_MOST = 200_000  # modules; a hostile tree may share its branches exponentially often


@dataclass(frozen=True)
class _Class:
    """What the text of a class declares: its parameters and buffers, and constants that are drop rates."""

    tensors: frozenset[str]
    rates: Mapping[str, float]


@dataclass(frozen=True)
class _Module:
    path: str
    name: str
    state: Mapping[object, object]


def is_torchscript(names: set[str]) -> bool:
    """Whether the names of an archive's records, without their common folder, are those of torch.jit.save."""
    return {"data.pkl", "constants.pkl"} <= names


def load_torchscript(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The state dict of a scripted or traced module, and its class and drop rates as words. Raises CheckpointError."""
    root = load_archive(path)
    classes = _classes(path)
    tensors: dict[str, Tensor] = {}
    rates: dict[str, Mapping[str, float]] = dict(module_drop_rates(root))
    for module in _modules(root, path):
        declared = classes.get(module.name)
        for key, value in module.state.items():
            if isinstance(value, Tensor) and (declared is None or key in declared.tensors):
                tensors[f"{module.path}{key}"] = value
        if declared is not None and declared.rates:
            place = module.path.removesuffix(".")
            rates[place] = {**declared.rates, **rates.get(place, {})}
    if not tensors:
        raise CheckpointError(
            f"{path}: expected the parameters of a TorchScript module, found none: freezing turns them into constants "
            "and folds BatchNorm away. Give the archive from before torch.jit.freeze, or the training checkpoint."
        )
    return tensors, {"module": {"class": module_class_name(root), "rates": rates}}


def _modules(root: object, path: Path) -> Iterator[_Module]:
    """Each module before its children, the children in their order."""
    waiting, count = [("", root, 0)], 0
    while waiting:
        prefix, value, depth = waiting.pop()
        if not isinstance(value, OpaqueObject) or not isinstance(value.state, Mapping):
            continue
        count += 1
        if depth > _DEEPEST or count > _MOST:
            raise CheckpointError(
                f"{path}: expected a tree of modules, found one without end. Do not use this file."
            )
        yield _Module(prefix, value.name, value.state)
        children = [(f"{prefix}{key}.", child, depth + 1) for key, child in value.state.items()]
        waiting.extend(reversed(children))


def _classes(path: Path) -> dict[str, _Class]:
    """By the qualified name that the pickle uses, such as ``__torch__.torch.nn.modules.conv.Conv2d``."""
    found = {}
    with open_zip_archive(path, "the archive of torch.jit.save") as archive:
        for record in archive.records:
            if record.startswith("code/") and record.endswith(".py"):
                module = record.removeprefix("code/").removesuffix(".py").replace("/", ".")
                text = archive.read(record).decode("utf-8", "replace")
                found.update(
                    {f"{module}.{m[1]}": _parse_class(m[1], m[2]) for m in _CLASS.finditer(text)}
                )
    return found


def _parse_class(name: str, body: str) -> _Class:
    names = [
        quoted for listed in _NAMES.findall(body) for quoted in re.findall(r'"([^"]+)"', listed)
    ]
    rates = {
        key: float(number)
        for key, number in _CONSTANT.findall(body)
        if "drop" in key.lower() or (key == "p" and _DROPPING.search(name))
    }
    return _Class(frozenset(names), rates)
