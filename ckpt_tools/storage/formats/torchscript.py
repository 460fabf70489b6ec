"""TorchScript archives, which torch.jit.save writes of scripted or traced modules.

The state dict and the drop rates are read, and nothing is executed. ``data.pkl`` holds the modules'
attributes; the text of their classes under ``code/`` says which of them are parameters and buffers.
Constants of frozen modules are not looked at.
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

# The text of a class ends where the next class or function begins.
_CLASS = re.compile(r"^class (\w+)\(Module\):\n(.*?)(?=^class |^def |\Z)", re.MULTILINE | re.DOTALL)
_NAMES = re.compile(r"^  __(?:parameters|buffers)__ = \[([^\]\n]*)\]", re.MULTILINE)
_DROPPING = re.compile("drop|StochasticDepth", re.IGNORECASE)
_FLOAT_CONSTANT = re.compile(r"^  (\w+) : Final\[float\] = ([-+.\deE]+)$", re.MULTILINE)
_MAX_DEPTH = 100
_MAX_MODULES = 200_000  # a hostile tree may share its branches exponentially often


@dataclass(frozen=True)
class _Declaration:
    """The parameters and buffers that the text of a class declares, and its drop rates."""

    tensors: frozenset[str]
    rates: Mapping[str, float]


@dataclass(frozen=True)
class _Module:
    """A module of the pickled tree; ``path`` is "" for the root, "layer1." for a child."""

    path: str
    class_name: str
    state: Mapping[object, object]


def is_torchscript(names: set[str]) -> bool:
    """Return whether the records of an archive are those that torch.jit.save writes.

    ``names`` are the records' names without their common folder.
    """
    return {"data.pkl", "constants.pkl"} <= names


def load_torchscript(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the state dict of a scripted or traced module, and its class and drop rates as words.

    Raises CheckpointError, also for a frozen module: freezing turns its parameters into constants.
    """
    root = load_archive(path)
    declarations = _read_declarations(path)
    tensors: dict[str, Tensor] = {}
    rates: dict[str, Mapping[str, float]] = dict(module_drop_rates(root))
    for module in _iterate_modules(root, path):
        declaration = declarations.get(module.class_name)
        for key, value in module.state.items():
            # Where the text of a class is missing, all of its tensors are taken.
            if isinstance(value, Tensor) and (declaration is None or key in declaration.tensors):
                tensors[f"{module.path}{key}"] = value
        if declaration is not None and declaration.rates:
            # What the pickle holds for a module takes precedence over a constant of its class.
            place = module.path.removesuffix(".")
            rates[place] = {**declaration.rates, **rates.get(place, {})}
    if not tensors:
        raise CheckpointError(
            f"{path}: expected the parameters of a TorchScript module, found none: freezing turns "
            "them into constants and folds BatchNorm away. Give the archive from before "
            "torch.jit.freeze, or the training checkpoint."
        )
    return tensors, {"module": {"class": module_class_name(root), "rates": rates}}


def _iterate_modules(root: object, path: Path) -> Iterator[_Module]:
    """Yield each module before its children. Raises CheckpointError for a tree without end."""
    waiting, count = [("", root, 0)], 0
    while waiting:
        prefix, value, depth = waiting.pop()
        if not isinstance(value, OpaqueObject) or not isinstance(value.state, Mapping):
            continue
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_MODULES:
            raise CheckpointError(
                f"{path}: expected a tree of modules, found one without end. Do not use this file."
            )
        yield _Module(prefix, value.name, value.state)
        children = [(f"{prefix}{key}.", child, depth + 1) for key, child in value.state.items()]
        waiting.extend(reversed(children))


def _read_declarations(path: Path) -> dict[str, _Declaration]:
    """Return the declarations of all classes in an archive, by the names that the pickle uses.

    Such a name is ``__torch__.torch.nn.modules.conv.Conv2d``.
    """
    declarations = {}
    with open_zip_archive(path, "the archive of torch.jit.save") as archive:
        for record in archive.records:
            if record.startswith("code/") and record.endswith(".py"):
                module = record.removeprefix("code/").removesuffix(".py").replace("/", ".")
                text = archive.read(record).decode("utf-8", "replace")
                declarations.update(
                    {f"{module}.{m[1]}": _parse_class(m[1], m[2]) for m in _CLASS.finditer(text)}
                )
    return declarations


def _parse_class(name: str, body: str) -> _Declaration:
    names = [quoted for listed in _NAMES.findall(body) for quoted in re.findall(r'"([^"]+)"', listed)]
    rates = {
        key: float(number)
        for key, number in _FLOAT_CONSTANT.findall(body)
        if "drop" in key.lower() or (key == "p" and _DROPPING.search(name))
    }
    return _Declaration(frozenset(names), rates)
